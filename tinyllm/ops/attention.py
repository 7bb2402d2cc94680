"""scaled_dot_product_attention: declaration, checks, autograd, shapes for the compiler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import reference
from tinyllm.ops._context import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops._random import draw_rng, dropout_factors
from tinyllm.ops.dispatch import (
    FLOATS,
    HALVES,
    NOT_DOUBLE,
    Kernels,
    Limit,
    Operator,
    choose,
    kernels,
    left_to_pytorch,
    register_fake,
)

MOST_HEAD_DIM = 1024  # of the C++ kernel
_CUDA_HEAD_DIMS = (64, 128)


def _refuses(query: Tensor, value: Tensor, attn_mask: Tensor | None, *_: Any) -> str | None:
    if attn_mask is not None and needs_grad(attn_mask):
        return "attn_mask requires a gradient; the kernel gives none"
    return None


def _too_wide(query: Tensor, value: Tensor, *_: Any) -> str | None:
    head_dim, value_dim = query.size(-1), value.size(-1)
    if head_dim <= MOST_HEAD_DIM and value_dim <= MOST_HEAD_DIM:
        return None
    return f"head_dim is {max(head_dim, value_dim)}"


def _another_width(query: Tensor, value: Tensor, *_: Any) -> str | None:
    head_dim, value_dim = query.size(-1), value.size(-1)
    if head_dim in _CUDA_HEAD_DIMS and value_dim == head_dim:
        return None
    return f"head_dim is {head_dim}, value's {value_dim}"


ATTENTION = Operator(
    "attention",
    cpp=Kernels(FLOATS, (Limit(f"heads up to {MOST_HEAD_DIM} wide", _too_wide),)),
    cuda=Kernels(  # strides and alignment are the kernel's own affair
        HALVES,
        (
            Limit(f"head_dim {' or '.join(map(str, _CUDA_HEAD_DIMS))}", _another_width),
            Limit("no attn_mask", lambda q, v, mask, *_: None if mask is None else "attn_mask is given"),
            Limit("no dropout", lambda q, v, mask, p, *_: f"dropout_p is {p}" if p > 0.0 else None),
            Limit("scale above 0", lambda q, v, mask, p, scale, _: None if scale > 0.0 else f"scale is {scale}"),
            Limit("no causal_offset", lambda *call: None if call[-1] is None else "causal_offset is given"),
        ),
    ),
    triton=Kernels(NOT_DOUBLE, note="heads of any width, above 256 (float32: 64) in chunks"),
    refuses=_refuses,
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_lengths: Tensor | None = None,
    causal_offset: int | Tensor = 0,
) -> Tensor:
    """Compute softmax(query key^T * scale + mask) value, as `torch.nn.functional.scaled_dot_product_attention`.

    The (queries x keys) matrix is never stored (Dao 2023, "FlashAttention-2"). `is_causal` lets query i see keys 0 ...
    causal_offset + i: by default the diagonal starts in the top left corner, whatever the numbers of queries and keys:

        4 queries, 2 keys    2 queries, 4 keys    2 queries, 4 keys, causal_offset 1
             1 0                 1 0 0 0              1 1 0 0
             1 1                 1 1 0 0              1 1 1 0
             1 1
             1 1

    What a query may not see cannot touch it: keys and values behind `key_lengths`, above the diagonal or hidden by a
    bool mask may hold NaN and infinities, which PyTorch would multiply by 0. Outputs and gradients are of the visible
    ones; the gradients of keys and values that no query sees are exactly 0. That is so while queries and output
    gradients are finite. Where PyTorch serves a causal call because there is no kernel (`tinyllm.info()`), it ends at
    the diagonal, and double backward where PyTorch's does.

    Args:
        query: (*, H, T, D), or (*, T, D), any strides.
        key: (*, Hkv, S, D), of query's dtype and device; leading dimensions broadcast. Hkv = H unless enable_gqa.
        value: (*, Hkv, S, Dv).
        attn_mask: broadcastable to (*, H, T, S). bool: True where a key takes part. Floating, of query's dtype: added
            to the scores; beyond two thirds of the largest finite number all count as equal. Unlike PyTorch's, it may
            be combined with is_causal.
        dropout_p: probability of dropping an attention weight, in [0, 1]; applied whenever it is above 0, as in
            PyTorch. Which ones follows from the default generator's state, though other ones than in PyTorch.
        is_causal: hide later keys.
        scale: default 1 / sqrt(D).
        enable_gqa: H may be a multiple of Hkv; each key/value head serves H / Hkv query heads.
        key_lengths: int32 or int64, of query's leading dimensions without the heads, (B) for (B, H, T, D): of sequence
            b only the keys 0 ... key_lengths[b] - 1 take part; lengths below 0 count as 0, above S as S. On a GPU no
            work is done for the others, and the host need not know the numbers: they may change between the replays of
            a CUDA graph.
        causal_offset: how many tokens come before the first query, as the keys of a cache do where a long text is read
            in chunks. An int, or where sequences differ a tensor as key_lengths is, with the same bounds. It needs
            is_causal.

    Returns:
        (*, H, T, Dv) of query's dtype; a query that sees no key gives 0, not NaN. Scores are accumulated in float32
        (float64 for float64).

    Raises:
        TypeError: dtypes that are not floating or differ, a mask, key_lengths or causal_offset of another type.
        ValueError: shapes that do not fit, tensors on different devices, dropout_p outside [0, 1], a negative
            causal_offset, or one without is_causal.
    """
    dtype = autocast_dtype(query)
    if dtype is not None and query.dtype != torch.float64:  # which autocast leaves alone
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype.is_floating_point:
            attn_mask = attn_mask.to(dtype)
    if not _alike(query, key, value) or not 0.0 <= dropout_p <= 1.0:
        _check(query, key, value, dropout_p, enable_gqa)
        query, key, value = _broadcast(query, key, value, enable_gqa)
    _check_mask(attn_mask, query, key)
    if key_lengths is not None:
        _check_of_sequences("key_lengths", key_lengths, query)
    offset = None
    if type(causal_offset) is not int or causal_offset != 0:
        offset = _checked_offset(causal_offset, is_causal, query)
        if not isinstance(offset, Tensor) and offset >= key.size(-2) - 1:  # which hides nothing
            is_causal, offset = False, None
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0
    backend = choose(ATTENTION, query, value, attn_mask, dropout_p, scale, offset)
    if backend == "reference":
        if key_lengths is not None:
            attn_mask = _mask_of_lengths(key_lengths, attn_mask, key.size(-2))
        return _plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, offset)
    rng = draw_rng(query.device) if dropout_p > 0.0 else None
    if offset is not None and not isinstance(offset, Tensor):
        offset = torch.full(query.shape[:-3], offset, dtype=torch.int64, device=query.device)
    options = (is_causal, scale, dropout_p, backend)
    if needs_grad(query, key, value):
        return record(_Attention, query, key, value, attn_mask, rng, key_lengths, offset, options)
    return _forward(query, key, value, attn_mask, rng, key_lengths, offset, options)[0]


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    offset: int | Tensor | None,
) -> Tensor:
    """Run PyTorch's operator where it may serve, else the reference: so with a mask, for what it hides may hold NaN."""
    whole = query.numel() > 0 and key.numel() > 0 and query.dim() == 4
    flash = scale > 0.0 or not is_causal  # else PyTorch's kernel on CPUs gives NaN
    if attn_mask is None and offset is None and whole and flash and left_to_pytorch(ATTENTION, query):
        out: Tensor = F.scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out
    return reference.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_offset=_or_zero(offset)
    )


def _or_zero(offset: int | Tensor | None) -> int | Tensor:
    return 0 if offset is None else offset


def _alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the three agree so plainly that nothing needs a closer look, which for small tensors costs as much
    as the kernel."""
    shape, dtype, device = query.shape, query.dtype, query.device
    return (
        len(shape) > 2
        and key.shape == value.shape
        and key.shape[:-2] == shape[:-2]
        and key.shape[-1] == shape[-1]
        and key.dtype == value.dtype == dtype
        and dtype.is_floating_point
        and key.device == value.device == device
    )


def _check(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool) -> None:
    if not query.dtype.is_floating_point:
        raise TypeError(f"query has dtype {query.dtype}; a floating dtype is needed")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < (3 if enable_gqa else 2):
            dims = "(..., heads, T, D)" if enable_gqa else "(..., T, D)"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; {dims} is needed")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must have query's, {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on query's device, {query.device}")
    if key.size(-1) != query.size(-1):
        raise ValueError(f"key has head_dim {key.size(-1)}; it must have query's, {query.size(-1)}")
    if value.size(-2) != key.size(-2):
        raise ValueError(f"value has length {value.size(-2)}; it must have key's, {key.size(-2)}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; a probability in [0, 1] is needed")
    if enable_gqa:
        heads, key_heads, value_heads = query.size(-3), key.size(-3), value.size(-3)
        if value_heads != key_heads:
            raise ValueError(f"value has {value_heads} heads; it must have key's, {key_heads}")
        if key_heads == 0 or heads % key_heads != 0:
            raise ValueError(f"key has {key_heads} heads; with enable_gqa they must divide query's, {heads}")


def _check_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    if attn_mask is None:
        return
    if attn_mask.dtype not in (torch.bool, query.dtype):
        raise TypeError(f"attn_mask has dtype {attn_mask.dtype}; torch.bool or query's, {query.dtype}, is needed")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device}; it must be on query's device, {query.device}")
    wanted = [*query.shape[:-1], key.size(-2)]
    sizes = zip(reversed(attn_mask.shape), reversed(wanted), strict=False)
    if attn_mask.dim() > len(wanted) or any(size not in (1, want) for size, want in sizes):
        raise ValueError(f"attn_mask has shape {list(attn_mask.shape)}; it must broadcast to {wanted}")


def _check_of_sequences(name: str, numbers: Tensor, query: Tensor) -> None:
    if numbers.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {numbers.dtype}; int32 or int64 is needed")
    if numbers.device != query.device:
        raise ValueError(f"{name} is on {numbers.device}; it must be on query's device, {query.device}")
    if query.dim() < 4 or numbers.shape != query.shape[:-3]:
        raise ValueError(
            f"{name} has shape {list(numbers.shape)}; query's, {list(query.shape)}, without (heads, T, D) is needed, "
            "of at least one dimension"
        )


def _checked_offset(causal_offset: int | Tensor, is_causal: bool, query: Tensor) -> int | Tensor:
    if isinstance(causal_offset, Tensor):
        _check_of_sequences("causal_offset", causal_offset, query)
    elif isinstance(causal_offset, bool) or not isinstance(causal_offset, (int, torch.SymInt)):
        raise TypeError(f"causal_offset is {causal_offset!r}; an int or a tensor is needed")
    elif causal_offset < 0:
        raise ValueError(f"causal_offset is {causal_offset}; it must be at least 0")
    if not is_causal:
        raise ValueError(f"causal_offset is {causal_offset}; without is_causal it must be 0")
    return causal_offset


def _mask_of_lengths(key_lengths: Tensor, attn_mask: Tensor | None, keys: int) -> Tensor:
    """Return attn_mask with the keys hidden that are beyond their sequence's length."""
    visible = torch.arange(keys, device=key_lengths.device) < key_lengths[..., None, None, None]
    if attn_mask is None:
        return visible
    return attn_mask & visible if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~visible, -math.inf)


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three with equal leading dimensions (those before the heads with enable_gqa)."""
    end = -3 if enable_gqa else -2
    shapes = [x.shape[:end] for x in (query, key, value)]
    if shapes[0] == shapes[1] == shapes[2]:
        return query, key, value
    try:
        leading = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"leading dimensions do not broadcast: query {list(query.shape)}, key {list(key.shape)}, "
            f"value {list(value.shape)}"
        ) from None
    query, key, value = (x.expand(*leading, *x.shape[end:]) for x in (query, key, value))
    return query, key, value


def _four_dims(x: Tensor) -> Tensor:
    """Return (..., T, D) as (B, H, T, D)."""
    if x.dim() == 4:
        return x
    if x.dim() == 3:
        return x.unsqueeze(1)
    return x.reshape(-1, *x.shape[-3:]) if x.dim() > 4 else x[None, None]


# is_causal, scale, dropout_p, backend. Not a NamedTuple, which takes longer to make.
_Options = tuple[bool, float, float, str]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    key_lengths: Tensor | None,
    causal_offset: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    if attn_mask is not None:
        attn_mask = _four_dims(attn_mask.expand(*query.shape[:-1], key.size(-2)))
    is_causal, scale, dropout_p, backend = options
    out, lse = kernels(backend).attention_fwd(
        _four_dims(query),
        _four_dims(key),
        _four_dims(value),
        attn_mask,
        is_causal,
        scale,
        dropout_p,
        rng,
        *_rest(query, key_lengths, causal_offset),
    )
    return _shape_back(out, query, value.size(-1)), lse


def _rest(query: Tensor, key_lengths: Tensor | None, causal_offset: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the last arguments of a raw operator, as far as they are given: a number for each sequence."""
    if key_lengths is not None:
        key_lengths = key_lengths.reshape(-1)
    if causal_offset is None:
        return () if key_lengths is None else (key_lengths,)
    return key_lengths, causal_offset.reshape(-1).expand(_four_dims(query).size(0))


def _shape_back(x: Tensor, like: Tensor, columns: int) -> Tensor:
    return x if like.dim() == 4 else x.reshape(*like.shape[:-1], columns)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        out, lse = _forward(query, key, value, *others)
        *tensors, ctx.options = others
        ctx.save_for_backward(query, key, value, *tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        query, key, value, attn_mask, rng, key_lengths, causal_offset, out, lse = ctx.saved_tensors
        is_causal, scale, dropout_p, backend = ctx.options
        if differs_from_kernels(grad):
            if key_lengths is not None:
                attn_mask = _mask_of_lengths(key_lengths, attn_mask, key.size(-2))
            gqa = query.dim() > 2 and query.size(-3) != key.size(-3)
            shape = (*query.shape[:-1], key.size(-2))
            factors = None
            if rng is not None:
                factors = dropout_factors(backend, rng, math.prod(shape[:-1]), shape[-1], dropout_p).view(shape)
            found = grads_by_reference(
                lambda q, k, v: reference.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask,
                    0.0,
                    is_causal,
                    scale,
                    gqa,
                    causal_offset=_or_zero(causal_offset),
                    weight_factors=factors,
                ),
                (query, key, value),
                ctx.needs_input_grad[:3],
                (grad,),
            )
            return *found, *(None,) * 5
        if attn_mask is not None:
            attn_mask = _four_dims(attn_mask.expand(*query.shape[:-1], key.size(-2)))
        grads = kernels(backend).attention_bwd(
            *(_four_dims(x) for x in (grad, query, key, value)),
            attn_mask,
            _four_dims(out),
            lse,
            is_causal,
            scale,
            dropout_p,
            rng,
            *_rest(query, key_lengths, causal_offset),
        )
        return *(_shape_back(g, x, x.size(-1)) for g, x in zip(grads, (query, key, value), strict=True)), *(None,) * 5


def _heads_inside(x: Tensor, columns: int) -> Tensor:
    # (B, H, T, D) over memory in the order (B, T, H, D): joining the heads afterwards is free.
    batch, heads, rows, _ = x.shape
    return x.new_empty(batch, rows, heads, columns).transpose(1, 2)


@register_fake("attention_fwd")
def _(query, key, value, attn_mask, is_causal, scale, dropout_p=0.0, rng=None, key_lengths=None, causal_offset=None):  # type: ignore[no-untyped-def]
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    lse_shape = (2, *query.shape[:3]) if additive else query.shape[:3]  # with what rounding took from it
    lse = query.new_empty(lse_shape, dtype=torch.promote_types(query.dtype, torch.float32))
    return _heads_inside(query, value.size(-1)), lse


@register_fake("attention_bwd")
def _(  # type: ignore[no-untyped-def]
    grad, query, key, value, attn_mask, out, lse, is_causal, scale,
    dropout_p=0.0, rng=None, key_lengths=None, causal_offset=None,
):  # fmt: skip
    return tuple(_heads_inside(x, x.size(-1)) for x in (query, key, value))
