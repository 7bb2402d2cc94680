"""layer_norm, add_layer_norm (in PyTorch an addition, then layer_norm) and rms_norm against PyTorch's and Liger's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from .. import work
from ..row import BACKWARD, BYTES, COMPILED, FORWARD, STEP, Case, Function, Row, Target, passes

LIGER = "Liger"


def layer_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(input, weight.shape, weight, bias)


def torch_layer_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(input, weight.shape, weight, bias)


def add_layer_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(input, residual, weight.shape, weight, bias)


def torch_add_layer_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = input + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


def rms_norm(input: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(input, weight.shape, weight)


def torch_rms_norm(input: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(input, weight.shape, weight)


class Norm(NamedTuple):
    """A norm, ours and others', and its inputs: so many (rows, C), then so many (C)."""

    ours: Function
    torchs: Function
    large: int
    small: int
    work: Callable[[str, int, int, int], int]
    ligers: str = ""


NORMS = {
    "layer_norm": Norm(layer_norm, torch_layer_norm, 1, 2, work.layer_norm_bytes, "liger_layer_norm"),
    "add_layer_norm": Norm(add_layer_norm, torch_add_layer_norm, 2, 2, work.add_layer_norm_bytes),
    "rms_norm": Norm(rms_norm, torch_rms_norm, 1, 1, work.rms_norm_bytes, "liger_rms_norm"),
}


def liger(name: str) -> dict[str, Function]:
    """Return a function of Liger's as a provider, where it is installed."""
    try:
        return {LIGER: getattr(importlib.import_module("liger_kernel.transformers.functional"), name)}
    except ImportError:
        return {}


def _liger_norm(function: Function, input: Tensor, *parameters: Tensor) -> Tensor:
    eps = 1e-5 if len(parameters) == 2 else torch.finfo(input.dtype).eps  # each as PyTorch's default
    out: Tensor = function(input, *parameters, eps)
    return out


def _build(target: Target, name: str, direction: str, n: int, c: int) -> Case:
    norm = NORMS[name]
    inputs = [target.randn(n, c) for _ in range(norm.large)] + [target.randn(c) for _ in range(norm.small)]
    functions = target.sides(norm.ours, norm.torchs)
    if target.gpu and norm.ligers:
        functions |= {who: partial(_liger_norm, function) for who, function in liger(norm.ligers).items()}
    case = passes(functions, direction, inputs)
    # torch.compile sums the weight's gradient too inaccurately on a CPU to pass as a right result.
    return case.without({COMPILED: ""} if name == "rms_norm" and direction == BACKWARD and not target.gpu else {})


def _row(target: Target, name: str, direction: str, n: int, c: int, headline: bool = False) -> Row:
    return target.row(
        name,
        section="layer_norm",
        operation=name,
        direction=direction,
        shape=f"{n}x{c}",
        work=NORMS[name].work(direction, n, c, target.dtype.itemsize),
        unit=BYTES,
        build=partial(_build, target, name, direction, n, c),
        headline=headline,
    )


def rows(target: Target) -> list[Row]:
    if not target.gpu:
        sizes = [(768, 128), (4096, 768), (8192, 1024)]
        return [
            _row(target, name, direction, n, c, headline=name == "add_layer_norm" and n == 8192)
            for name in NORMS
            for direction in ((FORWARD, BACKWARD, STEP) if name == "layer_norm" else (FORWARD, BACKWARD))
            for n, c in sizes
        ]
    cut = target.cut
    widths = [cut(c, 32 + i) for i, c in enumerate((4096, 768, 8192, 1024))]
    found = [
        _row(target, name, direction, cut(16384, 64), c, headline=c == widths[0] and name != "rms_norm")
        for c in widths
        for name in NORMS
        for direction in (FORWARD, BACKWARD)
    ]
    # Few and short rows; and rows that no block's registers hold.
    for n, c in [(cut(4096, 32), cut(768, 33)), (cut(2048, 4), cut(65536, 300))]:
        found += [_row(target, "layer_norm", direction, n, c) for direction in (FORWARD, BACKWARD)]
    return found
