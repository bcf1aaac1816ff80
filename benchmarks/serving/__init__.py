"""Measure one workload on Headrace and other inference servers: `python -m benchmarks.serving --help`."""
