"""Data sets, one file per family, and their case lists."""
