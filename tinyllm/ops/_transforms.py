"""Transforms of the program that the kernels cannot follow, and that plain PyTorch can."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from tinyllm.ops._compiler import constant_for_compiler

# Looked up once: these are asked at every call of an operator.
_functorch_is_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


@constant_for_compiler  # which watches these states itself, and compiles again where they are others
def active_transform() -> str | None:
    """Return why only the reference can serve a call here and now; None, in a tenth of a microsecond, where any backend
    can.

    An autograd.Function would have to be written with setup_context, jvp and vmap for torch.func, which makes each of
    its calls slower. torch.func.grad also wants a backward that can be differentiated again, which is the reference's
    in any case. A trace is for programs without this package, and may be trained.
    """
    if _functorch_is_active():
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is active"
    if _is_tracing():
        return "torch.jit.trace is recording"
    return None
