"""embedding: declaration, checks, autograd, shapes for the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops._context import active_transform, differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops._random import draw_rng, dropout_factors
from tinyllm.ops.dispatch import FLOATS, NOT_DOUBLE, Kernels, Limit, Operator, choose, kernels, register_fake

# max_norm, norm_type, scale_grad_by_freq, sparse, which only PyTorch serves.
_PyTorchs = tuple[float | None, float, bool, bool]


def _refuses(weight: Tensor, options: _PyTorchs, positions: Tensor | None, dropout_p: float) -> str | None:
    max_norm, _, scaled, sparse = options
    if max_norm is not None:
        return "max_norm changes the weight itself"
    if scaled or sparse:
        return "the kernel's gradient is dense and not scaled"
    if positions is not None and positions.dtype != weight.dtype:
        return f"positions is {positions.dtype}; the kernel takes weight's dtype, {weight.dtype}"
    return None


EMBEDDING = Operator(
    "embedding",
    cpp=Kernels(FLOATS),
    cuda=Kernels(
        NOT_DOUBLE, (Limit("no dropout", lambda *call: f"dropout_p is {call[-1]}" if call[-1] > 0.0 else None),)
    ),
    triton=Kernels(FLOATS),
    refuses=_refuses,
)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute weight[input] + positions in one pass, as `torch.nn.functional.embedding` and an addition behind it.

    Args:
        input: (*), or (*, T) with positions: ids, int32 or int64.
        weight: (V, D), any floating dtype and strides.
        padding_idx: the row that gets no gradient; negative: counted from the end.
        max_norm, norm_type, scale_grad_by_freq, sparse: as in PyTorch, which then does the work.
        positions: (T, D), added to every sequence; weight's dtype, else both are promoted.
        dropout_p: probability of dropping an element of the sum, the others being scaled by 1 / (1 - dropout_p).
            Applied whenever it is above 0; which elements go follows from the default generator's state.

    Returns:
        (*, D). The gradient of weight is dense; each of its rows is summed in the order of the tokens, so that its bits
        do not depend on the number of threads.

    Raises:
        IndexError: an id is negative or not below V; the message names it. Not in a compiled graph (RuntimeError
            there), nor on a GPU, where that would need to wait for it: the token's row is NaN there.
        TypeError: a dtype that does not serve.
        ValueError: shapes that do not fit, tensors on different devices, a number out of range.
    """
    padding_idx = _check(input, weight, padding_idx, positions, dropout_p)
    options = (max_norm, norm_type, scale_grad_by_freq, sparse)
    backend = choose(EMBEDDING, weight, options, positions, dropout_p)
    arguments = (input, weight, padding_idx, options, positions, dropout_p)
    if torch.compiler.is_compiling() or active_transform() is not None:  # which cannot look for the bad id
        return _run(backend, *arguments)
    try:
        return _run(backend, *arguments)
    except (IndexError, RuntimeError, ValueError):
        raise_for_ids(input, weight.size(0))
        raise


def _run(
    backend: str,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    options: _PyTorchs,
    positions: Tensor | None,
    dropout_p: float,
) -> Tensor:
    if backend == "reference":
        return reference.embedding(input, weight, padding_idx, *options, positions=positions, dropout_p=dropout_p)
    rng = draw_rng(weight.device) if dropout_p > 0.0 else None
    if needs_grad(weight, positions):
        return record(_Embedding, input, weight, padding_idx, positions, dropout_p, rng, backend)
    return kernels(backend).embedding_fwd(input, weight, positions, dropout_p, rng)


def _check(
    input: Tensor, weight: Tensor, padding_idx: int | None, positions: Tensor | None, dropout_p: float
) -> int | None:
    """Return padding_idx, counted from the beginning."""
    if input.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input has dtype {input.dtype}; int64 or int32 is needed")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight has dtype {weight.dtype}; a floating dtype is needed")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; (V, D) is needed")
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device}; it must be on weight's device, {weight.device}")
    if positions is not None:
        if input.dim() == 0 or positions.shape != (input.size(-1), weight.size(1)):
            raise ValueError(
                f"positions has shape {list(positions.shape)}; (T, D) is needed, where input is {list(input.shape)} "
                f"and weight {list(weight.shape)}"
            )
        if not positions.dtype.is_floating_point:
            raise TypeError(f"positions has dtype {positions.dtype}; a floating dtype is needed")
        if positions.device != weight.device:
            raise ValueError(f"positions is on {positions.device}; it must be on weight's device, {weight.device}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be from 0 to 1")
    if padding_idx is None:
        return None
    rows = weight.size(0)
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx is {padding_idx}; it must be in {-rows} .. {rows - 1}")
    return padding_idx % rows


def raise_for_ids(input: Tensor, rows: int) -> None:
    """Raise IndexError if there is an id out of range, which is then why a look-up failed."""
    bad = input[(input < 0) | (input >= rows)]
    if bad.numel() > 0:
        raise IndexError(f"input has the token id {int(bad[0])}; ids must be in 0 .. {rows - 1}") from None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        positions: Tensor | None,
        dropout_p: float,
        rng: Tensor | None,
        backend: str,
    ) -> Tensor:
        # Backward needs no value of weight or positions, but their shapes and, for a second backward, themselves.
        ctx.save_for_backward(input, weight, positions, rng)
        ctx.padding_idx, ctx.dropout_p, ctx.backend = padding_idx, dropout_p, backend
        return kernels(backend).embedding_fwd(input, weight, positions, dropout_p, rng)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, weight, positions, rng = ctx.saved_tensors
        _, need_weight, _, need_positions = ctx.needs_input_grad[:4]
        if differs_from_kernels(grad):
            factors = None
            if rng is not None:
                factors = dropout_factors(ctx.backend, rng, input.numel(), weight.size(1), ctx.dropout_p).view(
                    grad.shape
                )
            found = grads_by_reference(
                lambda w, p: reference.embedding(input, w, ctx.padding_idx, positions=p, factors=factors),
                (weight, positions),
                (need_weight, need_positions),
                (grad,),
            )
            return None, found[0], None, found[1], None, None, None
        grad_weight, grad_positions = kernels(ctx.backend).embedding_bwd(
            grad, input, weight.size(0), ctx.padding_idx, need_weight, need_positions, ctx.dropout_p, rng
        )
        results = grad_weight if need_weight else None, grad_positions if need_positions else None
        return None, results[0], None, results[1], None, None, None


@register_fake("embedding_fwd")
def _(input, weight, positions, dropout_p=0.0, rng=None):  # type: ignore[no-untyped-def]
    return weight.new_empty([*input.shape, weight.size(1)])


@register_fake("embedding_bwd")
def _(grad, input, num_embeddings, padding_idx, weight_grad, positions_grad, dropout_p=0.0, rng=None):  # type: ignore[no-untyped-def]
    size = grad.size(-1)
    return (
        grad.new_empty([num_embeddings, size] if weight_grad else [0]),
        grad.new_empty([input.size(-1), size] if positions_grad else [0]),
    )
