"""Data sets, one file per family, and their lists of test cases."""
