"""Compute kernels for the CPU, compiled by numba when a worker first starts and cached after that.

`machine` emits vector instructions, `matmul`, `attention` and `elementwise` are the operations, `team` runs
them on torch's own OpenMP threads, `forward` strings them together into one step of a model. Nothing
here imports torch: tensors come in as addresses.

Why not torch's operators: a step of a small model is 400 calls of some microseconds' overhead each, and
oneDNN's int8 product reaches half of what the same instructions give here. Every kernel computes a row
in an order that depends on the row alone, so its bits are the same alone, in a batch and in a chunk.
"""
