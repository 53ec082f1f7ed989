"""The program of every rank: trains, saves checkpoints, and resumes from the newest one."""
