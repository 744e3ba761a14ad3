"""Benchmarks of the service: every figure a ratio between sides that ran in turn in one run."""
