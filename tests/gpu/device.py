"""Where the Triton kernels are tested: on the GPU, or in Triton's interpreter on the CPU."""

import torch

from tinyllm.ops.backends import triton

why_not = triton.why_not
DEVICE = "cpu" if triton.interpreted or not torch.cuda.is_available() else "cuda"
ON_GPU = DEVICE == "cuda"


def draw(*shape, dtype=torch.float32, seed=0):
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
