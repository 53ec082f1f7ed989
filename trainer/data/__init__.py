"""Shards, the order in which samples are used, and the loader that gives batches to the step."""
