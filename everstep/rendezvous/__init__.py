"""Rendezvous of the processes of one start: its key-value store, and who may use it. Torch-free."""
