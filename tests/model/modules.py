"""Small blocks and models, and the same with their modules called one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyllm.nn
from tests.model.test_nn import grads, randomise
from tinyllm import SimpleLLM

Module = Any  # a SimpleLLM or a TransformerBlock
KINDS = ["block", "model"]


def small(kind: str, **options: Any) -> Module:
    torch.manual_seed(0)
    if kind == "block":
        module: Module = tinyllm.nn.TransformerBlock(12, 20, **options)
    else:
        module = SimpleLLM(11, 12, 20, options.pop("num_layers", 2), max_seq_len=9, **options)
    randomise(module)
    return module


def by_modules(module: Module) -> Module:
    """Return a copy whose modules are called one by one, because one of them, or of each block, has a hook."""
    other = copy.deepcopy(module)
    for part in other.modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda *_: None)
    return other


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(11, (3, 8), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def input_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return tokens()[0] if kind == "model" else torch.randn(2, 7, 12, dtype=dtype, generator=generator)


def assert_same(ours: Module, theirs: Module, **tolerance: Any) -> None:
    """Compare outputs, losses and all gradients."""
    calls: list[Callable[[Module, Tensor], Tensor]] = [lambda module, x: module(x).sin()]
    x = input_of("block", next(ours.parameters()).dtype).requires_grad_()
    if isinstance(ours, SimpleLLM):
        x, targets = tokens()
        calls.append(lambda model, ids: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()))
        calls.append(lambda model, ids: model.loss(ids, targets))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **tolerance)
    for call in calls:
        out, expected = call(ours, x), call(theirs, x)
        torch.testing.assert_close(out, expected, **tolerance)
        more = [x] if x.requires_grad else []
        found = [grads(y, *more, *module.parameters()) for y, module in ((out, ours), (expected, theirs))]
        torch.testing.assert_close(*found, **tolerance)
