"""Embedding with positions added, against PyTorch's embedding and an addition."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from ..row import BACKWARD, BYTES, FORWARD, Case, Row, Target, passes
from ..work import embedding_bytes

# Sequences, tokens in each, V, D: the article's model on characters and GPT-2; GPT-2 again on a GPU.
CPU = [(12, 64, 65, 128), (4, 256, 50257, 768)]
GPU = [(16, 1024, 50257, 768)]


def embedding(weight: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    return ops.embedding(ids, weight, positions=positions)


def torch_embedding(weight: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, weight) + positions


def _build(target: Target, direction: str, batch: int, seq_len: int, vocab_size: int, size: int) -> Case:
    inputs = [target.randn(vocab_size, size), target.randn(seq_len, size)]
    return passes(
        target.sides(embedding, torch_embedding), direction, inputs, [target.randint(vocab_size, batch, seq_len)]
    )


def rows(target: Target) -> list[Row]:
    found = []
    for direction in (FORWARD, BACKWARD):
        for sizes in GPU if target.gpu else CPU:
            batch, seq_len, vocab_size, size = map(target.cut, sizes, (2, 16, 50, 32))
            found.append(
                target.row(
                    "embedding",
                    section="embedding",
                    operation="embedding + positions",
                    direction=direction,
                    shape=f"{batch}x{seq_len} V{vocab_size} D{size}",
                    work=embedding_bytes(direction, batch * seq_len, seq_len, vocab_size, size, target.dtype.itemsize),
                    unit=BYTES,
                    build=partial(_build, target, direction, batch, seq_len, vocab_size, size),
                    headline=target.gpu and direction == BACKWARD,
                )
            )
    return found
