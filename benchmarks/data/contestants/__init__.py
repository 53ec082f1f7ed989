"""One script a way of storing and reading a dataset; each is a `Reader` and is run in a process of its own."""
