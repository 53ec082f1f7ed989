"""Readers: from files of any kind to Arrow tables, one format per file."""
