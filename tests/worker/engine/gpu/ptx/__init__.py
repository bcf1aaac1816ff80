"""An emulator of PTX: kernels of Triton, compiled for a GPU, run on tensors of the CPU.

`plugin` lets pytest run the tests of kernels with it. Triton compiles a kernel as for the GPU, and `driver`
runs the PTX: programs in random order, the warps of a program in random order from one barrier to the next,
shared memory of random bytes, asynchronous copies and products that take effect when they are issued or not
before their wait. So it shows what Triton's interpreter cannot: accesses outside of tensors, missing barriers
and waits, layouts, products of bfloat16. It does not show speed, registers, missing fences, races that no
order of whole warps shows, and the last bits of approximate instructions and of sums in tensor cores.

Semantics are those of NVIDIA's "Parallel Thread Execution ISA", version 9; the modules name its sections.
"""
