"""A project of its own that trains on Everstep."""
