"""rotary_embedding: declaration, checks, autograd, shapes for the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops._context import differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops.dispatch import FLOATS, NOT_DOUBLE, Kernels, Operator, choose, kernels, register_fake


def _refuses(query: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return "cos or sin requires a gradient; the kernel gives none" if needs_grad(cos, sin) else None


ROTARY_EMBEDDING = Operator(
    "rotary_embedding",
    cpp=Kernels(FLOATS),
    cuda="Triton's kernel serves it",
    triton=Kernels(NOT_DOUBLE),
    refuses=_refuses,
)


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions (Su et al. 2021, "RoFormer"), both in one call.

    Of R columns, column i is rotated with column i + R / 2, as transformers' models have it:

        x[..., :R] * cos + rotate_half(x[..., :R]) * sin        where rotate_half((a, b)) = (-b, a)

    Args:
        query: (B, H, T, D), floating, any strides.
        key: (B, Hkv, T, D), of query's dtype and device.
        cos, sin: (B or 1, T, R) of the same shape, R even and at most D; floating. Columns from R on stay as they are.

    Returns:
        query and key rotated, of their shapes and dtype; each head's rows follow one another as in (B, T, H, D).
        Products are float32 (float64 for float64).

    Raises:
        TypeError: dtypes that are not floating, or query's and key's differ.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    _check(query, key, cos, sin)
    backend = choose(ROTARY_EMBEDDING, query, cos, sin)
    if backend == "reference":
        return reference.rotary_embedding(query, key, cos, sin)
    if needs_grad(query, key):
        rotated: tuple[Tensor, Tensor] = record(_Rotary, query, key, cos, sin, backend)
        return rotated
    found: tuple[Tensor, Tensor] = kernels(backend).rotary_embedding_fwd(query, key, cos, sin)
    return found


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {tensor.dtype}; a floating dtype is needed")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on query's device, {query.device}")
    if key.dtype != query.dtype:
        raise TypeError(f"key has dtype {key.dtype}; it must have query's, {query.dtype}")
    if query.dim() != 4:
        raise ValueError(f"query has shape {list(query.shape)}; (B, H, T, D) is needed")
    batch, _, tokens, head_dim = query.shape
    if key.dim() != 4 or (key.size(0), *key.shape[2:]) != (batch, tokens, head_dim):
        raise ValueError(f"key has shape {list(key.shape)}; it must be query's, {list(query.shape)}, up to the heads")
    if (
        cos.dim() != 3
        or cos.size(0) not in (1, batch)
        or cos.size(1) != tokens
        or cos.size(2) % 2
        or cos.size(2) > head_dim
    ):
        raise ValueError(
            f"cos has shape {list(cos.shape)}; ({batch} or 1, {tokens}, an even number up to {head_dim}) is needed"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {list(sin.shape)}; it must have cos's, {list(cos.shape)}")


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query, key, cos, sin)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        found: tuple[Tensor, Tensor] = kernels(backend).rotary_embedding_fwd(query, key, cos, sin)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, cos, sin = ctx.saved_tensors
        given = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, (query, key), strict=True)]
        if any(differs_from_kernels(grad) for grad in given):
            found = grads_by_reference(
                lambda q, k: reference.rotary_embedding(q, k, cos, sin), (query, key), ctx.needs_input_grad[:2], given
            )
            return *found, None, None, None
        return *kernels(ctx.backend).rotary_embedding_bwd(*given, cos, sin), None, None, None


def _by_tokens(x: Tensor) -> Tensor:
    batch, heads, tokens, columns = x.shape
    return x.new_empty(batch, tokens, heads, columns).transpose(1, 2)


@register_fake("rotary_embedding_fwd")
def _(query, key, cos, sin):  # type: ignore[no-untyped-def]
    return _by_tokens(query), _by_tokens(key)


@register_fake("rotary_embedding_bwd")
def _(grad_query, grad_key, cos, sin):  # type: ignore[no-untyped-def]
    return _by_tokens(grad_query), _by_tokens(grad_key)
