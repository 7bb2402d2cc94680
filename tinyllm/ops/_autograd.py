"""What the operators' autograd functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tinyllm.ops._transforms import active_transform


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differs_from_kernels(grad: Tensor) -> bool:
    """Return whether a backward with this output gradient is more than numbers, which is all that the kernels compute:
    whether it will be differentiated again, or stands for many (`vmap`, `is_grads_batched`)."""
    if torch.is_grad_enabled() or active_transform() is not None:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that an enclosing torch.autocast asks for on a device type; None outside one."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # autocast does not know meta
        return None
    return torch.get_autocast_dtype(device_type)


def grads_by_reference(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that can be differentiated again or batched: the kernels' own cannot."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: a tensor passed twice must get each role's gradient, not the sum twice.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        outputs = function(*aliases)
    pairs = [
        (out, grad)
        for out, grad in zip((outputs,) if isinstance(outputs, Tensor) else outputs, grad_outputs, strict=True)
        if grad is not None
    ]
    targets = [x for x, want in zip(aliases, wanted, strict=True) if want and x is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            targets,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if want and x is not None else None for x, want in zip(aliases, wanted, strict=True)]
