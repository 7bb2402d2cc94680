"""The state of PyTorch around a call: autograd, autocast, transforms of functions, tracing, compiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers  # of tensors that have left a transform
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Looked up once: these are asked at every call of an operator.
_functorch_is_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


def constant_for_compiler(function: _Function) -> _Function:
    """Do what `torch.compiler.assume_constant_result` does: the compiler calls the function, and keeps the result.

    That one imports the compiler, for which every `import tinyllm` would pay more than a second and 145 MB. A test
    compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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


def device_type(tensor: Tensor) -> str:
    """Return `tensor.device.type`, in a tenth of its time where that is "cpu"."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that an enclosing torch.autocast asks for on a tensor's device; None outside one."""
    device = device_type(tensor)
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know meta
        return None
    return torch.get_autocast_dtype(device)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd would record an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator would take twice the time
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Do what `function.apply` does where no transform is active, as where kernels serve. It prepares for one as well,
    which takes a fifth of its time."""
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]


def differs_from_kernels(grad: Tensor) -> bool:
    """Return whether a backward with this output gradient is more than numbers, which is all that the kernels compute:
    whether it will be differentiated again, or stands for many (`vmap`, `is_grads_batched`)."""
    if torch.is_grad_enabled() or active_transform() is not None:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def grads_by_reference(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of `function(*inputs)`, which unlike the kernels' can be differentiated again or batched."""
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
