"""One script a contestant; all train the problem of benchmarks/problem.py, each in a fresh process."""
