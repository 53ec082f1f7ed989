"""Schedulers: one module or package each."""
