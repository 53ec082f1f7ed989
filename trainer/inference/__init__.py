"""Use of a trained run: evaluate a checkpoint on any data, and predict."""
