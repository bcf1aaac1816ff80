"""Check and measure a GPU worker by one command: `python -m benchmarks.gpu`; see docs/gpu.md.

`__main__` reads the flags, `jobs` decides what is measured and in which order, `runner` has child
`processes` measure it, and `results` writes what came out. The measurements are in `parts`.
"""
