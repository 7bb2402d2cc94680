"""How attention's time grows with the length of the sequence: what the picture over T shows.

torch.compile runs the very kernel that eager PyTorch has, so it is no line of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from tinyllm import ops

from .harness import BACKWARD, EAGER, FLOPS, FORWARD, OURS, Case, Outputs, Provider, Row, each_provider, randn
from .work import attention_flops, visible_pairs

HEADS, HEAD_DIM = 12, 64
LENGTHS = {FORWARD: [2**n for n in range(6, 15)], BACKWARD: [2**n for n in range(6, 14)]}


def _row(seq_len: int, direction: str) -> Row:
    shape = (1, HEADS, seq_len, HEAD_DIM)

    def build() -> Case:
        # Heads do not depend on each other: the exact result of one is enough, and takes a twelfth of the time.
        inputs, upstream = [randn(shape, seed) for seed in range(3)], randn(shape, 7)

        def bind(function: Callable[..., torch.Tensor], dtype: torch.dtype, heads: int) -> Callable[[], Outputs]:
            leaves = [x[:, :heads].to(dtype).requires_grad_(direction == BACKWARD) for x in inputs]
            if direction == FORWARD:
                return lambda: (function(*leaves, is_causal=True),)
            out, grad = function(*leaves, is_causal=True), upstream[:, :heads].to(dtype)
            return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

        def first_head(outputs: Outputs) -> Outputs:
            return [x[:, :1] for x in outputs]

        functions = {OURS: ops.scaled_dot_product_attention, EAGER: F.scaled_dot_product_attention}
        providers = {
            name: Provider(bind(function, torch.float32, HEADS), first_head) for name, function in functions.items()
        }
        return Case(providers, lambda: bind(F.scaled_dot_product_attention, torch.float64, 1)())

    return Row(
        section="length",
        operation="causal attention over T",
        direction=direction,
        shape=f"B1 H{HEADS} T{seq_len} D{HEAD_DIM}",
        work=attention_flops(direction, HEADS * visible_pairs(seq_len, seq_len, True), HEAD_DIM),
        unit=FLOPS,
        build=build,
        providers=(OURS, EAGER),
        facts_of_shape={"seq_len": seq_len},
    )


def _rows() -> list[Row]:
    return [_row(seq_len, direction) for direction, lengths in LENGTHS.items() for seq_len in lengths]


@pytest.mark.parametrize(("row", "provider"), each_provider(_rows()))
def test_attention_length(row: Row, provider: str, report: Callable[[Row, str], None]) -> None:
    report(row, provider)
