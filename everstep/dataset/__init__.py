"""Prepared datasets: shards, their index and verification; preparation and readers."""
