"""Replay of the steps between two checkpoints, compared with the run to the last bit."""
