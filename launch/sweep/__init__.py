"""Hyperparameter sweeps: many runs of one experiment, chosen by a sampler, stopped early by a pruner."""
