"""Benchmarks: every variant is checked against its reference, then timed."""
