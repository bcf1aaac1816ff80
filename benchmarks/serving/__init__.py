"""One workload against Headrace and what people would use instead: `python -m benchmarks.serving --help`."""
