"""cross_entropy, and the projection and loss at the end of a language model in one, against PyTorch and Liger."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from ..row import BYTES, FLOPS, FORWARD, STEP, Case, Function, Row, Target, passes
from ..work import cross_entropy_bytes, linear_cross_entropy_flops
from .norms import liger

CHUNKED = "torch, chunked"  # F.linear_cross_entropy, which is new in torch 2.13


def torch_linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def torch_chunked(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # A quarter of the rows at a time: smaller blocks save it more memory and cost it more time.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=input.size(0) // 4, chunking_method=None)
    return F.linear_cross_entropy(input, weight, target, options=options)


def _liger_loss(function: Function, input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    loss = function(input, weight, target)
    return loss[0] if isinstance(loss, tuple) else loss


def _build(target: Target, direction: str, n: int, c: int, d: int | None) -> Case:
    """Mean losses, whose upstream gradient is 1, as in training. With `d` the logits are a product of (n, d) and a
    weight (c, d), scaled as a layer's is."""
    if d is None:
        functions, inputs = target.sides(ops.cross_entropy, F.cross_entropy), [target.randn(n, c)]
    else:
        functions = target.sides(ops.linear_cross_entropy, torch_linear_cross_entropy)
        if hasattr(F, "linear_cross_entropy"):
            functions[CHUNKED] = torch_chunked
        if target.gpu:
            ligers = liger("liger_fused_linear_cross_entropy")
            functions |= {name: partial(_liger_loss, function) for name, function in ligers.items()}
        inputs = [target.randn(n, d), target.randn(c, d) / d**0.5]
    one = torch.ones((), dtype=target.dtype, device=target.device)
    return passes(functions, direction, inputs, [target.randint(c, n)], upstream=[one])


def _row(target: Target, direction: str, n: int, c: int, d: int | None = None, headline: bool = True) -> Row:
    operation = "cross_entropy" if d is None else "linear_cross_entropy"
    return target.row(
        operation,
        section="losses",
        operation=operation,
        direction=direction,
        shape=f"{n}x{c}" if d is None else f"{n}x{d}x{c}",
        work=(
            cross_entropy_bytes(direction, n, c, target.dtype.itemsize)
            if d is None
            else linear_cross_entropy_flops(direction, n, d, c)
        ),
        unit=BYTES if d is None else FLOPS,
        build=partial(_build, target, direction, n, c, d),
        headline=headline,
        shows_memory=target.gpu,
    )


def rows(target: Target) -> list[Row]:
    if not target.gpu:
        plain = [
            _row(target, direction, n, c, headline=direction == STEP and n == 1024)
            for n, c in [(1024, 50257), (4096, 8192)]
            for direction in (FORWARD, STEP)
        ]
        return [*plain, _row(target, STEP, 1024, 50257, 768)]
    cut = target.cut
    return [
        *(_row(target, STEP, cut(n, 32), cut(c, 101)) for n, c in [(8192, 50257), (4096, 128256)]),
        *(
            _row(target, STEP, cut(n, 32), cut(c, 101), cut(d, 16))
            for n, d, c in [(8192, 768, 50257), (8192, 4096, 128256)]
        ),
    ]
