"""Models, optimizers and datasets as people bring them, each with one habit that makes an exact resume hard."""
