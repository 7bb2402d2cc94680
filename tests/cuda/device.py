"""The device on which the CUDA C++ kernels are tested: the GPU, or emulated threads on the CPU (tests/emulation)."""

import torch

from tests.gpu.device import draw  # which has the same devices to choose from
from tinyllm.ops.backends import cuda

ON_GPU = torch.cuda.is_available() and not cuda.emulated
DEVICE = "cuda" if ON_GPU else "cpu"
why_not = None if cuda.emulated else cuda.why_not or (None if ON_GPU else "there is no GPU")
__all__ = ["DEVICE", "DTYPES", "ON_GPU", "draw", "raw", "why_not"]
# What they take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def raw():
    """The namespace of the operators."""
    return cuda.operators()
