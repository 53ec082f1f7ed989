"""Checks before the first step: parts, memory, one step, a resume in memory."""
