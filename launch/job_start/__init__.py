"""One start of a job by its scheduler: nodes, processes, output and the record in the run folder."""
