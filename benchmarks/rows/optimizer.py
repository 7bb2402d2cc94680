"""Clipping and a step of AdamW, against PyTorch's clip_grad_norm_ and its fused and foreach AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW as TorchAdamW

from tinyllm import SimpleLLM
from tinyllm.optim import AdamW

from ..peers import clip_and_step
from ..row import BYTES, EAGER, OURS, UPDATE, Case, Provider, Row, Target
from ..work import adamw_bytes

FOREACH = "torch, foreach"
MAX_NORM = 1.0
# The models of nanoGPT's recipe for CPUs and of GPT-2: V, embedding_dim, hidden_dim, num_layers, T.
MODELS = {"character model": (65, 128, 512, 4, 64), "GPT-2": (50257, 768, 3072, 12, 1024)}


def _shapes(vocab_size: int, embedding_dim: int, hidden_dim: int, num_layers: int, seq_len: int) -> list[list[int]]:
    with torch.device("meta"):
        model = SimpleLLM(
            vocab_size,
            embedding_dim,
            hidden_dim,
            num_layers,
            num_heads=4,
            causal=True,
            norm_first=True,
            max_seq_len=seq_len,
            tie_embeddings=vocab_size > embedding_dim,
        )
    return [list(parameter.shape) for parameter in model.parameters()]


def _build(target: Target, shapes: Sequence[Sequence[int]]) -> Case:
    weights, grads = ([target.randn(*shape) for shape in shapes] for _ in range(2))

    def made(optimizer: Callable[..., Any], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        parameters = [torch.nn.Parameter(weight.to(dtype, copy=True)) for weight in weights]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.to(dtype, copy=True)
        steps = optimizer(parameters)

        def call() -> list[Tensor]:
            clip_and_step(steps, parameters, MAX_NORM)
            return list(parameters)

        return call

    fused = partial(TorchAdamW, fused=True)
    sides: dict[str, Callable[..., Any]] = {OURS: AdamW, EAGER: fused, FOREACH: partial(TorchAdamW, foreach=True)}
    return Case(
        {name: Provider(made(optimizer, target.dtype)) for name, optimizer in sides.items()},
        lambda: made(fused, torch.float64)(),
    )


def rows(target: Target) -> list[Row]:
    if target.gpu:  # where ours is PyTorch's
        return []
    found = []
    for name, sizes in MODELS.items():
        shapes = _shapes(*sizes)
        elements = sum(map(prod, shapes))
        found.append(
            target.row(
                section="optimizer",
                operation="clipping + AdamW",
                direction=UPDATE,
                shape=f"{name}, {len(shapes)} tensors, {elements / 1e6:.1f}M",
                work=adamw_bytes(elements, target.dtype.itemsize),
                unit=BYTES,
                build=partial(_build, target, shapes),
            )
        )
    return found
