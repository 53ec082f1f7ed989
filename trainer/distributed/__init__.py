"""Processes and the model over them: the mesh, DDP and FSDP, and comparison of ranks."""
