"""Decisions about restarts after an attempt has ended."""
