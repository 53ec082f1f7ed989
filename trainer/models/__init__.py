"""Small models for the tasks that come with Everstep."""
