"""Records of a run: metrics, events, the terminal, logs of ranks, outcomes."""
