"""Runs as their folders record them: history, liveness, state, goodput."""
