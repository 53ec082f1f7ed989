"""Shards, the order in which samples are used, and the loader that hands them to the step."""
