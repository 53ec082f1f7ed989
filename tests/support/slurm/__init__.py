"""A real Slurm of many nodes on this machine, and jobs on it."""
