"""Where a job runs: one file a scheduler."""
