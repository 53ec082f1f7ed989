"""Optimizers that are part of everstep: one file each."""
