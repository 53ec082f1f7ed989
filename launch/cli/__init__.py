"""Verbs of the command `everstep`, one file each. Nothing imports them."""
