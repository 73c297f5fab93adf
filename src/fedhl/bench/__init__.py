"""Timings, each checked for correctness in the run that makes it."""
