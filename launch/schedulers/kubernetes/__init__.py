"""Kubernetes: what a job becomes (pure), what is wrong with it (pure), and the few calls that a cluster is asked."""
