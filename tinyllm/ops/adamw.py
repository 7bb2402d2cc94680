"""adamw: declaration, checks, the step and the norm for clipping, shapes for the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from tinyllm import reference
from tinyllm.ops.dispatch import FLOATS, Kernels, Limit, Operator, choose, kernels, register_fake

_attributes = attrgetter("dtype", "layout", "is_cpu")


def _beyond(first: Tensor, *lists: Sequence[Tensor]) -> str | None:
    # Of hundreds of tensors, so each look takes all of them; one by one it would take half of a small model's step.
    tensors = list(chain.from_iterable(lists))
    if set(map(_attributes, tensors)) != {(first.dtype, torch.strided, True)}:
        return "dtypes, layouts or devices differ"
    if not set(map(type, tensors)) <= {Tensor, Parameter}:  # such as a DTensor, which has a part of its elements
        return "a tensor is of a subclass"
    return None if all(map(Tensor.is_contiguous, tensors)) else "a tensor is not contiguous"


_PYTORCHS = "PyTorch's fused AdamW serves it"
ADAMW = Operator(
    "adamw",
    cpp=Kernels(FLOATS, (Limit("contiguous tensors of one dtype", _beyond),)),
    cuda=_PYTORCHS,
    triton=_PYTORCHS,
)


def adamw_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all elements of some tensors, as `torch.nn.utils.get_total_norm` does.

    The kernel's result does not depend on the number of threads.

    Args:
        tensors: at least one, of any shapes.

    Returns:
        (): in the tensors' dtype, float32 for 16-bit ones.
    """
    backend = choose(ADAMW, tensors[0], tensors)
    if backend == "reference":
        return reference.adamw_norm(tensors)
    norm: Tensor = kernels(backend).adamw_norm(tensors)
    return norm


@torch.no_grad()
def adamw_step(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coef: float = 1.0,
) -> None:
    """Update parameters and moments in place by a step of AdamW (Loshchilov and Hutter 2019), in one pass over memory.

    `tinyllm.optim.AdamW` calls it. The lists are equally long: a parameter's gradient and moments have its shape.

    Args:
        parameters, grads, exp_avgs, exp_avg_sqs: of one dtype; arithmetic is in float32 at least.
        steps: (): float32, the numbers of steps before, which are counted up.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        clip_coef: what each gradient is multiplied by as it is read, for clipping; gradients stay as they are.
    """
    lists = (parameters, grads, exp_avgs, exp_avg_sqs)
    backend = choose(ADAMW, parameters[0], *lists)
    step = reference.adamw_step if backend == "reference" else step_by_kernel
    step(*lists, steps, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip_coef=clip_coef)


def step_by_kernel(
    *lists: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coef: float,
) -> None:
    """Do what `adamw_step` does, for a caller that knows that the C++ kernel serves it."""
    kernels("cpp").adamw_step(*lists, lr, *betas, eps, weight_decay, clip_coef)
    # The dispatcher does not count the changes that an extension's operator makes, by which autograd notices that a
    # tensor is no longer what a backward needs. The moments are in no graph.
    torch.autograd.graph.increment_version(lists[0])


@register_fake("adamw_norm")
def _(tensors):  # type: ignore[no-untyped-def]
    return tensors[0].new_empty((), dtype=torch.promote_types(tensors[0].dtype, torch.float32))


@register_fake("adamw_step")
def _(parameters, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, clip_coef):  # type: ignore[no-untyped-def]
    return None
