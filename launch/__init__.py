"""The program that gets a trainer started, here or on a cluster, until its work is done."""
