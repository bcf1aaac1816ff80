"""Triton kernels of GPU steps, each module with functions that launch its kernels.

The kernels run on CUDA devices, and on CPU tensors if TRITON_INTERPRET=1 is set before Triton is imported.
Each module lists in `variants()` how its kernels are compiled for real models; `report` compiles these
without a device and prints their use of registers.
"""
