"""Explanation of a trained run: attributions of its outputs to the inputs of samples."""
