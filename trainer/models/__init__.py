"""Small models for the tasks of everstep."""
