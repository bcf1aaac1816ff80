"""An emulator of PTX: kernels of Triton, compiled for a GPU, run on tensors of the CPU.

`plugin` lets pytest run the tests of kernels with it. Triton compiles a kernel as for the GPU, and `driver` runs
the PTX: programs in random order, the warps of a program in random order from one barrier to the next, shared
memory of random bytes, asynchronous copies and products that take effect at any time between their issue and
their wait. So it shows what Triton's interpreter cannot: wrong masks, barriers or waits that are missing, layouts
and products of bfloat16. It shows no speed, no limits of registers, and no exact bits of approximate
instructions and of sums in tensor cores.

Semantics are those of NVIDIA's "Parallel Thread Execution ISA", version 9; the modules name its sections.
"""
