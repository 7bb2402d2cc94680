"""Attention against PyTorch's scaled_dot_product_attention, a flash kernel on the CPU too, and on a GPU each of
PyTorch's kernels and FlexAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tinyllm import ops

from ..row import (
    BACKWARD,
    BYTES,
    COMPILED,
    FLOPS,
    FORWARD,
    STEP,
    Case,
    Function,
    Provider,
    Row,
    Target,
    passes,
)
from ..work import attention_flops, visible_pairs

# Where a processor has no bfloat16 products, PyTorch's bfloat16 attention is very slow, and this is the best peer.
VIA_FLOAT32 = "torch via float32"
FLASH, CUDNN, EFFICIENT, FLEX = "SDPA FLASH", "SDPA CUDNN", "SDPA EFFICIENT", "FlexAttention"
PINNED = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}


class Shape(NamedTuple):
    """B sequences, H heads, T queries and keys, D = head_dim."""

    batch: int
    heads: int
    seq_len: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} T{self.seq_len} D{self.head_dim}"


# ---- Whole sequences


def _plain(function: Function) -> Function:
    """Return an attention function with positional arguments only: query, key, value, mask, is_causal."""
    return lambda query, key, value, mask, causal: function(query, key, value, mask, is_causal=causal)


attention = _plain(ops.scaled_dot_product_attention)
torch_attention = _plain(F.scaled_dot_product_attention)


def via_float32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    out: Tensor = torch_attention(query.float(), key.float(), value.float(), mask, causal)
    return out.to(query.dtype)


def pinned(backend: SDPBackend) -> Function:
    """Return PyTorch's attention by one of its kernels, or an error."""

    def attention(*arguments: Any, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*arguments, **options)

    return attention


def flex(length: int, causal: bool, device: str) -> Function:
    """Return FlexAttention, compiled; its mask over `length` positions is made once."""
    made: list[Function] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        if not made:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device) if causal else None
            made.append(partial(torch.compile(flex_attention, dynamic=False), block_mask=mask))
        out: Tensor = made[0](query, key, value, enable_gqa=enable_gqa)
        return out

    return attention


def attention_by_parts(query: Tensor, key: Tensor, value: Tensor, mask: None, causal: bool) -> Tensor:
    """Compute attention a few heads at a time, and their scores again for the gradients: there is no memory for the
    scores of all heads."""
    batch, heads, length, _ = query.shape
    part = max(1, (1 << 27) // length**2)
    flat = [x.flatten(0, 1) for x in (query, key, value)]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch_attention(q[None], k[None], v[None], None, causal)[0]
        return out

    outs = [
        checkpoint(formula, *(x[i : i + part] for x in flat), use_reentrant=False)
        for i in range(0, batch * heads, part)
    ]
    return torch.cat(outs).unflatten(0, (batch, heads))


def padding_mask(shape: Shape) -> Tensor:
    """Return (B, 1, 1, T) bool: sequences of different lengths, from a quarter of T to all of it, padded at the end."""
    lengths = torch.linspace(shape.seq_len // 4, shape.seq_len, shape.batch).long()
    return (torch.arange(shape.seq_len) < lengths[:, None])[:, None, None, :]


def _row(
    target: Target,
    kind: str,
    direction: str,
    shape: Shape,
    dtype: torch.dtype | None = None,
    headline: bool = False,
    section: str = "attention",
    with_flex: bool = False,
) -> Row:
    """Return a row of causal, full or padded attention. In the section "length" torch.compile is left
    out: it runs the very kernel that eager PyTorch has."""
    causal, dtype = kind == "causal", dtype or target.dtype
    if kind == "padded":
        pairs = int(padding_mask(shape).sum()) * shape.seq_len * shape.heads
    else:
        pairs = shape.batch * shape.heads * visible_pairs(shape.seq_len, shape.seq_len, causal)

    def build() -> Case:
        functions = target.sides(attention, torch_attention)
        if target.gpu:
            functions |= {name: _plain(pinned(backend)) for name, backend in PINNED.items()}
            functions |= {FLEX: _plain(flex(shape.seq_len, causal, target.device))} if with_flex else {}
        elif dtype != torch.float32:
            functions[VIA_FLOAT32] = via_float32
        inputs = [target.randn(*shape, dtype=dtype) for _ in range(3)]
        mask = padding_mask(shape) if kind == "padded" else None
        many = target.gpu or section == "length"
        exact = attention_by_parts if many else None
        return passes(functions, direction, inputs, (mask, causal), compiled=not many, exact=exact)

    return target.row(
        "attention",
        section=section,
        operation=f"{kind} attention{' over T' if section == 'length' else ''}",
        direction=direction,
        shape=str(shape),
        work=attention_flops(direction, pairs, shape.head_dim),
        unit=FLOPS,
        build=build,
        dtype=dtype,
        headline=headline,
        facts_of_shape={"seq_len": shape.seq_len, "head_dim": shape.head_dim, "causal": causal},
    )


def _dropout_row(target: Target, shape: Shape, dropout_p: float = 0.1) -> Row:
    """Forward and backward, because backward needs forward's mask. The masks are random and differ between providers,
    so what is verified is an expectation: the weights of a query sum to 1, and with gradients of 1 that is what
    value's gradients sum to."""

    def build() -> Case:
        inputs, ones = [target.randn(*shape) for _ in range(3)], torch.ones(shape)
        functions = target.sides(ops.scaled_dot_product_attention, F.scaled_dot_product_attention)
        functions[COMPILED] = torch.compile(F.scaled_dot_product_attention, dynamic=False)
        case = passes(functions, STEP, inputs, (None, dropout_p, True), compiled=False, upstream=[ones])
        queries = shape.batch * shape.heads * shape.seq_len
        return Case(
            {
                name: Provider(side.call, lambda grads: (grads[2].sum((0, 1, 2)),))
                for name, side in case.providers.items()
            },
            lambda: (torch.full((shape.head_dim,), float(queries)),),
        )

    row = _row(target, "causal", STEP, shape)
    return replace(row, operation=f"{row.operation}, dropout {dropout_p}", build=build, smooth=False)


# ---- One query against all keys, as when a token is generated


def grouped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention for one query (B, H, 1, D) and maybe fewer heads of keys and values."""
    batch, key_heads, _, size = key.shape
    grouped = query.view(batch, key_heads, -1, size)
    weights = torch.softmax(grouped @ key.mT * size**-0.5, -1)
    return (weights @ value).view(query.shape)


def build_decode(target: Target, shape: Shape, key_heads: int, others: Sequence[str] = (COMPILED,)) -> Case:
    """One query of each sequence against its cache of keys and values, which fewer heads may have."""
    functions = target.sides(ops.scaled_dot_product_attention, F.scaled_dot_product_attention)
    functions |= {name: pinned(backend) for name, backend in PINNED.items() if name in others}
    functions |= {FLEX: flex(shape.seq_len, False, target.device)} if FLEX in others else {}
    if key_heads != shape.heads:
        functions = {name: partial(function, enable_gqa=True) for name, function in functions.items()}
    cache = [target.randn(shape.batch, key_heads, shape.seq_len, shape.head_dim) for _ in range(2)]
    query = target.randn(*shape._replace(seq_len=1))
    return passes(functions, FORWARD, [query, *cache], compiled=COMPILED in others, exact=grouped_attention)


def _decode_row(
    target: Target, shape: Shape, key_heads: int, others: Sequence[str] = (COMPILED,), headline: bool = False
) -> Row:
    heads = f"{shape.heads}/{key_heads}" if key_heads != shape.heads else str(shape.heads)
    return target.row(
        "attention",
        section="decode",
        operation="one query's attention",
        direction=FORWARD,
        shape=f"B{shape.batch} H{heads} T{shape.seq_len} D{shape.head_dim}",
        # Reading the keys and values.
        work=2 * target.dtype.itemsize * shape.batch * key_heads * shape.seq_len * shape.head_dim,
        unit=BYTES,
        build=partial(build_decode, target, shape, key_heads, others),
        headline=headline,
    )


# ---- All of them


def rows(target: Target) -> list[Row]:
    return _gpu_rows(target) if target.gpu else _cpu_rows(target)


def _cpu_rows(target: Target) -> list[Row]:
    gpt, one_head = Shape(8, 12, 256, 64), Shape(1, 1, 1024, 512)  # one head, as in the article
    kinds = [
        ("causal", Shape(12, 4, 64, 32)),
        ("causal", gpt),
        ("causal", Shape(4, 12, 1024, 64)),
        ("causal", Shape(1, 8, 4096, 64)),
        ("full", Shape(4, 12, 1024, 64)),
        ("causal", one_head),
        ("full", one_head),
    ]
    found = [
        _row(target, kind, direction, shape, headline=(kind, shape) == ("causal", gpt))
        for kind, shape in kinds
        for direction in (FORWARD, BACKWARD)
    ]
    lengths = {FORWARD: [2**n for n in range(6, 15)], BACKWARD: [2**n for n in range(6, 14)]}
    return [
        *found,
        _row(target, "causal", BACKWARD, Shape(1, 12, 2048, 64)),
        *(_row(target, "full", direction, Shape(12, 1, 64, 128)) for direction in (FORWARD, BACKWARD)),  # the article's
        *(_row(target, "padded", direction, gpt) for direction in (FORWARD, BACKWARD)),
        _row(target, "causal", FORWARD, gpt, torch.bfloat16),
        _dropout_row(target, gpt),
        *(_decode_row(target, Shape(1, heads, 4096, 64), heads) for heads in (1, 12)),
        *(
            _row(target, "causal", direction, Shape(1, 12, length, 64), section="length")
            for direction in lengths
            for length in lengths[direction]
        ),
    ]


def _gpu_rows(target: Target) -> list[Row]:
    cut = target.cut
    tokens, width = cut(16384, 128), cut(1024, 64)
    found = []
    for kind, direction, size, lengths in [
        ("causal", FORWARD, 128, (4096, 2048, 16384, 1024)),
        ("causal", FORWARD, 64, (4096, 1024, 512, 2048, 16384)),
        ("full", FORWARD, 128, (4096,)),
        ("causal", BACKWARD, 128, (4096, 2048)),
        ("causal", BACKWARD, 64, (4096, 1024)),
        ("full", BACKWARD, 128, (4096,)),
        ("full", BACKWARD, 64, (4096,)),
    ]:
        size = cut(size, 32)
        for length in dict.fromkeys(cut(length, 64) for length in lengths):
            shape = Shape(tokens // length, width // size, length, size)
            first = length == cut(
                lengths[0], 64
            )  # FlexAttention, which compiles for long, is at one length of each kind
            headline = first and (kind == "causal" or direction == FORWARD)
            found.append(_row(target, kind, direction, shape, headline=headline, with_flex=first))

    heads, key_heads, size = cut(32, 4), cut(8, 2), cut(128, 32)  # as in Llama 3 8B
    for batch, length, with_flex, headline in [
        (1, cut(4096, 32), False, True),
        (1, cut(8192, 33), False, True),
        (1, cut(16384, 34), False, True),
        (1, cut(32768, 64), True, True),
        (16, cut(4096, 32), True, True),
        (cut(64, 8), cut(4096, 32), False, False),
        (16, cut(32768, 64), False, False),
    ]:
        others = (*PINNED, *([FLEX] if with_flex else []))
        found.append(_decode_row(target, Shape(batch, heads, length, size), key_heads, others, headline))
    return found
