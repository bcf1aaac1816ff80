"""What is measured, one module per part; each has `run(report, shape)`, which reports rows of figures."""
