"""embedding with positions added, against PyTorch's embedding and an addition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from .harness import BACKWARD, BYTES, EAGER, FORWARD, OURS, Case, Row, each_provider, passes, randn
from .work import embedding_bytes

# Sequences, tokens in each, V, D: the article's model on characters, and GPT-2.
SHAPES = [(12, 64, 65, 128), (4, 256, 50257, 768)]


def embedding(weight: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    return ops.embedding(ids, weight, positions=positions)


def torch_embedding(weight: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, weight) + positions


def _build(direction: str, batch: int, seq_len: int, rows: int, size: int) -> Callable[[], Case]:
    def build() -> Case:
        ids = torch.randint(rows, (batch, seq_len), generator=torch.Generator().manual_seed(2))
        inputs = [randn((rows, size), 0), randn((seq_len, size), 1)]
        return passes({OURS: embedding, EAGER: torch_embedding}, direction, inputs, [ids])

    return build


def _rows() -> list[Row]:
    rows = []
    for direction in (FORWARD, BACKWARD):
        for batch, seq_len, vocab, size in SHAPES:
            work = embedding_bytes(direction, batch * seq_len, seq_len, vocab, size)
            shape, build = f"{batch}x{seq_len} V{vocab} D{size}", _build(direction, batch, seq_len, vocab, size)
            rows.append(Row("embedding", "embedding + positions", direction, shape, work, BYTES, build))
    return rows


@pytest.mark.parametrize(("row", "provider"), each_provider(_rows()))
def test_embedding(row: Row, provider: str, report: Callable[[Row, str], None]) -> None:
    report(row, provider)
