"""`everstep ui`: runs and their reports, served to this machine's browser."""
