"""The device of the tests in this folder: a GPU if there is one, else a CPU with Triton's interpreter."""

from __future__ import annotations

import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu")

# The interpreter multiplies matrices of bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_CUDA else ()))
