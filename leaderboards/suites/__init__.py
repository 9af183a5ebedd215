"""A verdict across tasks: consensus ranks, and how likely a claim is false, from the tables of a suite."""
