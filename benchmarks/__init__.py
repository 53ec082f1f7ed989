"""Measurements of Everstep beside a hand-written loop and its peers; docs/benchmarks.md says how and what."""
