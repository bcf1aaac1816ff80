"""Measure how a mesh grows: many workers behind one or several batchers and routers, and what limits it.

`processes` starts any number of services; `costs` measures the CPU time of router and batcher with echo
workers, which sleep instead of computing; `simulation` computes larger meshes from these costs, step by step,
and `queueing` has the formulas that check it. `cards` computes what a GPU can hold and how fast it decodes.
`python -m benchmarks.fleet --help` lists the parts.
"""
