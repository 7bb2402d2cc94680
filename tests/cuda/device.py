"""Where the CUDA C++ kernels are tested: on the GPU, or on the CPU with emulated threads (tests/cuda_host)."""

import torch

from tinyllm.ops import _cuda

ON_GPU = torch.cuda.is_available() and not _cuda.emulated
DEVICE = "cuda" if ON_GPU else "cpu"
why_not = None if _cuda.emulated else _cuda.why_not or (None if ON_GPU else "there is no GPU")
# What they take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32, seed=0):
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def raw():
    """The namespace of the operators."""
    return _cuda.operators()
