"""Compute kernels for the CPU, compiled by numba when a worker first starts and cached after that.

`machine` emits vector instructions. `matmul`, `attend` and `elementwise` are the operations, `decoder_step`
combines them into one step of a model, and `team` runs it on the OpenMP threads of torch. `cache` keeps
compiled code. This package does not import torch: tensors are passed as addresses.

Why not torch's operators: a step of a small model is 400 calls of some microseconds' overhead each, and
oneDNN's int8 product reaches half of what the same instructions give here. Every kernel computes a row
in an order that depends on the row alone, so its bits are the same alone, in a batch and in a chunk.
"""
