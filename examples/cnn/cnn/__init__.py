"""A residual network that trains on Everstep."""
