"""Processes and the model over them: the mesh, DDP and FSDP, what ranks hold alike."""
