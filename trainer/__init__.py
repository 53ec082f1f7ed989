"""The program that torchrun starts: trains, checkpoints, and goes on from where it was."""
