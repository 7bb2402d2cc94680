"""Attention against PyTorch's scaled_dot_product_attention: a flash kernel on the CPU, too, and the best it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from .harness import (
    BACKWARD,
    BYTES,
    COMPILED,
    EAGER,
    FLOPS,
    FORWARD,
    OURS,
    PROVIDERS,
    STEP,
    Case,
    Provider,
    Row,
    each_provider,
    passes,
    randn,
)
from .work import attention_flops, visible_pairs

# Where a processor has no bfloat16 products, PyTorch's bfloat16 attention is very slow, and this is the best peer.
VIA_FLOAT32 = "torch via float32"


class Shape(NamedTuple):
    """B sequences, H heads, T queries and keys, D = head_dim."""

    batch: int
    heads: int
    seq_len: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} T{self.seq_len} D{self.head_dim}"


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    return ops.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal)


def via_float32(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    out = torch_attention(query.float(), key.float(), value.float(), attn_mask, is_causal)
    return out.to(query.dtype)


def padding_mask(shape: Shape) -> Tensor:
    """(B, 1, 1, T) bool: sequences of different lengths, from a quarter of T to all of it, padded at the end."""
    lengths = torch.linspace(shape.seq_len // 4, shape.seq_len, shape.batch).long()
    return (torch.arange(shape.seq_len) < lengths[:, None])[:, None, None, :]


def _row(kind: str, shape: Shape, direction: str, dtype: torch.dtype = torch.float32, headline: bool = False) -> Row:
    if kind == "padded":
        pairs = int(padding_mask(shape).sum()) * shape.seq_len * shape.heads
    else:
        pairs = shape.batch * shape.heads * visible_pairs(shape.seq_len, shape.seq_len, kind == "causal")
    functions: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {OURS: attention, EAGER: torch_attention}
    if dtype != torch.float32:
        functions[VIA_FLOAT32] = via_float32

    def build() -> Case:
        inputs = [randn(shape, seed).to(dtype) for seed in range(3)]
        mask = padding_mask(shape) if kind == "padded" else None
        return passes(functions, direction, inputs, (mask, kind == "causal"))

    return Row(
        section="attention",
        operation=f"{kind} attention",
        direction=direction,
        shape=str(shape),
        work=attention_flops(direction, pairs, shape.head_dim),
        unit=FLOPS,
        build=build,
        dtype=dtype,
        providers=(*PROVIDERS, *(name for name in functions if name not in PROVIDERS)),
        headline=headline,
    )


def _dropout_row(shape: Shape, dropout_p: float = 0.1) -> Row:
    """Forward and backward, because backward needs forward's mask. The masks are random and differ between providers,
    so what is verified is an expectation: the weights of a query sum to 1, and with gradients of 1 that is what
    value's gradients sum to."""

    def build() -> Case:
        inputs = [randn(shape, seed) for seed in range(3)]
        ones = torch.ones(shape)

        def bind(function: Callable[..., Tensor]) -> Provider:
            leaves = [x.detach().requires_grad_() for x in inputs]
            return Provider(
                lambda: torch.autograd.grad(function(*leaves, None, dropout_p, True), leaves, ones),
                lambda grads: (grads[2].sum((0, 1, 2)),),
            )

        functions: dict[str, Callable[..., Tensor]] = {
            OURS: ops.scaled_dot_product_attention,
            EAGER: F.scaled_dot_product_attention,
            COMPILED: torch.compile(F.scaled_dot_product_attention, dynamic=False),
        }
        queries = shape.batch * shape.heads * shape.seq_len
        return Case(
            {name: bind(function) for name, function in functions.items()},
            lambda: (torch.full((shape.head_dim,), float(queries)),),
        )

    pairs = shape.batch * shape.heads * visible_pairs(shape.seq_len, shape.seq_len, True)
    return Row(
        section="attention",
        operation=f"causal attention, dropout {dropout_p}",
        direction=STEP,
        shape=str(shape),
        work=attention_flops(STEP, pairs, shape.head_dim),
        unit=FLOPS,
        build=build,
        smooth=False,
    )


def _decode_row(shape: Shape) -> Row:
    """One query against all keys, as when a token is generated: the work is reading keys and values."""

    def build() -> Case:
        query = randn(shape._replace(seq_len=1), 0)
        functions = {OURS: attention, EAGER: torch_attention}
        return passes(functions, FORWARD, [query, randn(shape, 1), randn(shape, 2)], (None, False))

    return Row(
        section="attention",
        operation="one query's attention",
        direction=FORWARD,
        shape=str(shape),
        work=2 * 4 * math.prod(shape),
        unit=BYTES,
        build=build,
    )


def _rows() -> list[Row]:
    gpt = Shape(8, 12, 256, 64)
    kinds = [
        ("causal", Shape(12, 4, 64, 32)),
        ("causal", gpt),
        ("causal", Shape(4, 12, 1024, 64)),
        ("causal", Shape(1, 8, 4096, 64)),
        ("full", Shape(4, 12, 1024, 64)),
        ("causal", Shape(1, 1, 1024, 512)),  # one head, as in the article
        ("full", Shape(1, 1, 1024, 512)),
    ]
    rows = [
        _row(kind, shape, direction, headline=(kind, shape) == ("causal", gpt))
        for kind, shape in kinds
        for direction in (FORWARD, BACKWARD)
    ]
    return [
        *rows,
        _row("causal", Shape(1, 12, 2048, 64), BACKWARD),
        _row("full", Shape(12, 1, 64, 128), FORWARD),  # the article's heads
        _row("full", Shape(12, 1, 64, 128), BACKWARD),
        _row("padded", gpt, FORWARD),
        _row("padded", gpt, BACKWARD),
        _row("causal", gpt, FORWARD, torch.bfloat16),
        _dropout_row(gpt),
        _decode_row(Shape(1, 1, 4096, 64)),
        _decode_row(Shape(1, 12, 4096, 64)),
    ]


@pytest.mark.parametrize(("row", "provider"), each_provider(_rows()))
def test_attention(row: Row, provider: str, report: Callable[[Row, str], None]) -> None:
    report(row, provider)
