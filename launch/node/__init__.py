"""Programs and parts that run on the nodes of a job."""
