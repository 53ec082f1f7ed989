"""The program that torchrun starts: trains, saves checkpoints, and resumes from the newest one."""
