"""Tasks that come with Everstep: one file each."""
