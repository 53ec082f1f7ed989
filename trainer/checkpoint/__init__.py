"""Saving and restoring: torch.distributed.checkpoint plans the bytes, everstep commits the checkpoint."""
