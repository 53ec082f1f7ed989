"""Checks of a run before it is submitted, without torch."""
