"""layer_norm, add_layer_norm (PyTorch: an addition, then layer_norm) and rms_norm against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from .harness import (
    BACKWARD,
    BYTES,
    EAGER,
    FORWARD,
    OURS,
    PROVIDERS,
    STEP,
    Case,
    Row,
    each_provider,
    passes,
    randn,
)
from .work import add_layer_norm_bytes, layer_norm_bytes, rms_norm_bytes

SHAPES = [(768, 128), (4096, 768), (8192, 1024)]


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


def _build(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    torchs: Callable[..., Tensor | tuple[Tensor, ...]],
    direction: str,
    shapes: Sequence[Sequence[int]],
    providers: Sequence[str] = PROVIDERS,
) -> Callable[[], Case]:
    def build() -> Case:
        inputs = [randn(shape, seed) for seed, shape in enumerate(shapes)]
        case = passes({OURS: ours, EAGER: torchs}, direction, inputs)
        return Case({name: case.providers[name] for name in providers}, case.exact)

    return build


def _rows() -> list[Row]:
    rows = []
    for direction in (FORWARD, BACKWARD, STEP):
        for n, c in SHAPES:
            work = layer_norm_bytes(direction, n, c)
            build = _build(layer_norm, torch_layer_norm, direction, [(n, c), (c,), (c,)])
            rows.append(Row("layer_norm", "layer_norm", direction, f"{n}x{c}", work, BYTES, build))
    for direction in (FORWARD, BACKWARD):
        for n, c in SHAPES:
            work = add_layer_norm_bytes(direction, n, c)
            build = _build(add_layer_norm, torch_add_layer_norm, direction, [(n, c), (n, c), (c,), (c,)])
            headline = (n, c) == (8192, 1024)
            row = Row("layer_norm", "add_layer_norm", direction, f"{n}x{c}", work, BYTES, build, headline=headline)
            rows.append(row)
    for direction in (FORWARD, BACKWARD):
        for n, c in SHAPES:
            work = rms_norm_bytes(direction, n, c)
            # torch.compile sums the weight's gradient too inaccurately to pass as a right result.
            providers = PROVIDERS if direction == FORWARD else (OURS, EAGER)
            build = _build(rms_norm, torch_rms_norm, direction, [(n, c), (c,)], providers)
            row = Row("layer_norm", "rms_norm", direction, f"{n}x{c}", work, BYTES, build, providers=providers)
            rows.append(row)
    return rows


@pytest.mark.parametrize(("row", "provider"), each_provider(_rows()))
def test_layer_norm(row: Row, provider: str, report: Callable[[Row, str], None]) -> None:
    report(row, provider)
