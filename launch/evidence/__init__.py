"""Evidence of a run for an auditor: its records in one archive that can be checked without the run."""
