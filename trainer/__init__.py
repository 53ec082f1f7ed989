"""The program that torchrun starts: trains, checkpoints, and goes on from where it was."""

__version__ = "0.1.0"
