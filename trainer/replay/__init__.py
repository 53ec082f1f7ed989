"""Replay: the steps between two checkpoints once more, in a folder of its own, and a comparison to the last bit."""
