"""Export of a trained model into files that other programs read, each compared with the original."""
