"""Saving and restoring: the bytes are torch.distributed.checkpoint's, the commit is ours."""
