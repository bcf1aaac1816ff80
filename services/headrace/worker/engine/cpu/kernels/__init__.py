"""Compute kernels for the CPU, compiled by numba when a worker first starts and cached after that.

`machine` emits vector instructions. `matmul`, `elementwise` and `attend` (with `kv_layout`, `block_products`
and `softmax`) are the operations. `decoder_step` combines them into one step of a model, `paging` computes
attention alone, `sampling` draws tokens with the arithmetic of `vector_math`, and `team` runs them on the
OpenMP threads of torch. `cache` keeps compiled code. This package does not import torch: tensors are passed
as addresses.

The kernels replace torch's operators for two reasons. A step of a small model would be 400 calls with some
microseconds of overhead each, and oneDNN's int8 product is half as fast as the same instructions here. Every
kernel computes a row in an order that depends only on the row, so results are batch-invariant: bit-identical
alone, in a batch and in a chunk.
"""
