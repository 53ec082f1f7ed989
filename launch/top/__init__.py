"""`everstep top`: all runs below a folder, live in a terminal."""
