"""Verbs of the command `everstep`, one file each. No other module imports them."""
