"""Modules that are changed, hooked or replaced are called one by one, and not as one operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinyllm.nn
from tests.helpers.needs import needs_extension
from tests.model.modules import KINDS, Module, by_modules, input_of, small, tokens


class Doubled(nn.Linear):
    """Stands for LoRA and its like."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def attribute(path: str, value: object) -> Callable[[nn.Module], object]:
    """Return the change of an attribute, or of one of a Sequential's modules."""
    owner, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(owner), name, copy.deepcopy(value))


def within(path: str, change: Callable[[Any], object]) -> Callable[[nn.Module], object]:
    return lambda module: change(module.get_submodule(path))


# What may happen to any module.
TO_ANY: dict[str, Callable[[Module], object]] = {
    "hook": lambda module: module.register_forward_hook(lambda *_: None),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda module: module.register_full_backward_hook(lambda *_: None),
    "patched forward": lambda module: setattr(module, "forward", type(module).forward.__get__(module)),
    "subclass": lambda module: setattr(module, "__class__", type("Mine", (type(module),), {})),
}
BLOCK: dict[str, Callable[[Module], object]] = {
    "dropout": attribute("dropout.p", 0.5),
    "dropout left on in eval": lambda block: (block.eval(), block.dropout.train(), setattr(block.dropout, "p", 0.5)),
    "dropout of attention": attribute("attention.dropout", 0.5),
    "another dropout": attribute("dropout", nn.AlphaDropout(0.5)),
    "no dropout": attribute("dropout", nn.Identity()),
    "parametrization": lambda block: nn.utils.parametrizations.weight_norm(block.attention.key),
    "a layer of its own": attribute("attention.value", Doubled(12, 12)),
    "norm without parameters": attribute("norm1", tinyllm.nn.LayerNorm(12, elementwise_affine=False)),
    "another attention": attribute("attention", nn.Linear(12, 12)),
    "another activation": attribute("feed_forward.1", nn.ReLU()),
    "another gelu": attribute("feed_forward.1", nn.GELU("tanh")),
    "a layer more": lambda block: block.feed_forward.append(nn.Tanh()),
    "no layers": attribute("feed_forward", nn.Sequential()),
    "another network": attribute("feed_forward", nn.Linear(12, 12)),
    "one bias missing": attribute("attention.query", nn.Linear(12, 12, bias=False)),
    "narrow query and key": lambda block: [
        setattr(block.attention, name, nn.Linear(12, 5)) for name in ("query", "key")
    ],
    "projection of one head": attribute("attention.out_proj", nn.Linear(12, 12)),
    "frozen parameter": lambda block: block.norm2.bias.requires_grad_(False),
}
MODEL: dict[str, Callable[[Module], object]] = {
    "dropout": attribute("dropout.p", 0.5),
    "another dropout": attribute("dropout", nn.AlphaDropout(0.5)),
    "a head of its own": attribute("output", nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 11))),
    "another output": attribute("output", Doubled(12, 11)),
    "last norm without a bias": attribute("final_norm", tinyllm.nn.LayerNorm(12, bias=False)),
    "padding": attribute("embedding.embedding.padding_idx", 3),
    "sparse": attribute("embedding.embedding.sparse", True),
    "scaled gradient": attribute("embedding.embedding.scale_grad_by_freq", True),
    "largest norm": attribute("embedding.embedding.max_norm", 0.1),
    "another embedding": attribute("embedding", nn.Embedding(11, 12)),
    "another encoding": attribute("positional_encoding", nn.Identity()),
    "a block more": lambda model: model.transformer_blocks.append(nn.Tanh()),
    "no block": attribute("transformer_blocks", nn.Sequential()),
    "another block": attribute("transformer_blocks.0", nn.Linear(12, 12)),
    "another order": attribute("transformer_blocks.0.norm_first", False),
    "another epsilon": attribute("transformer_blocks.1.norm1.eps", 0.5),
    "another last epsilon": attribute("final_norm.eps", 0.5),
    "another mask": attribute("transformer_blocks.1.attention.causal", False),
    "no last norm": attribute("final_norm", None),
    "another last norm": attribute("final_norm", nn.LayerNorm(12)),
    "patched features": attribute("features", lambda ids: torch.ones(*ids.shape, 12)),
    "one frozen parameter": lambda model: model.output.bias.requires_grad_(False),
}
OPTIONS: dict[str, Any] = {"norm_first": True, "activation": "gelu", "causal": True}


def to_any(kind: str) -> dict[str, Callable[[Module], object]]:
    paths = [path for path, _ in small(kind, **OPTIONS).named_modules() if path and "blocks.0" not in path]
    return {f"{name} of {path}": within(path, change) for path in paths for name, change in TO_ANY.items()}


MODEL |= {f"{name} in a block": within("transformer_blocks.1", change) for name, change in BLOCK.items()}
MODEL |= to_any("model")
BLOCK |= to_any("block")


@pytest.mark.parametrize("change", BLOCK)
def test_the_modules_of_a_changed_block_are_called(change: str, taken: list[Tensor]) -> None:
    block = small("block", activation="gelu")
    BLOCK[change](block)
    assert block(input_of("block")).shape == (2, 7, 12)
    assert not taken


@needs_extension
@pytest.mark.parametrize("change", MODEL)
def test_the_modules_of_a_changed_model_are_called(change: str, taken: list[Tensor]) -> None:
    ids, targets = tokens()
    model = small("model", **OPTIONS)
    model.loss(ids, targets)
    model.loss(ids, targets)
    assert len(taken) == 2  # and remembers what it looked like
    del taken[:]
    MODEL[change](model)
    torch.manual_seed(1)
    out = model(ids)
    torch.manual_seed(1)
    torch.testing.assert_close(out, model.output(model.features(ids)))
    model.loss(ids, targets)
    assert not [x for x in taken if not x.is_floating_point()]  # at most an unchanged block is one operator


def test_the_tanh_of_gelu_is_told_from_the_exact_one(taken: list[Tensor]) -> None:
    block = small("block", activation="gelu_tanh")
    block.feed_forward[1].approximate = "none"
    exact = small("block", activation="gelu")
    torch.testing.assert_close(block(input_of("block")), by_modules(exact)(input_of("block")))
    assert not taken


@pytest.mark.parametrize("change", ["another activation", "another gelu", "hook of feed_forward.1", "a layer more"])
def test_a_large_network_that_was_changed_is_called(change: str) -> None:
    block, x = small("block", activation="gelu"), torch.randn(600, 7, 12)  # large enough for an operator of its own
    BLOCK[change](block)
    torch.testing.assert_close(block._network(x), block.feed_forward(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_all_modules_are_called(kind: str, taken: list[Tensor]) -> None:
    seen: list[nn.Module] = []
    module = small(kind)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        module(input_of(kind))
    finally:
        handle.remove()
    assert set(seen) == set(module.modules())
    assert not taken


@needs_extension
def test_hooks_on_the_model_itself_are_called(taken: list[Tensor]) -> None:
    model, seen = small("model"), []
    model.register_forward_hook(lambda *_: seen.append(1))
    model(tokens()[0])
    assert len(seen) == len(taken) == 1


@needs_extension
def test_a_change_taken_back_is_seen(taken: list[Tensor]) -> None:
    ids, _ = tokens()
    model = small("model", dropout=0.5)
    torch.manual_seed(1)
    first = model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)
    assert not torch.equal(model(ids), first)
    torch.testing.assert_close(model.eval()(ids), by_modules(model)(ids))
    assert not torch.equal(model.train()(ids), first)
    assert len(taken) == 5
    handle = model.eval().output.register_forward_hook(lambda *_: None)
    model(ids)
    assert {x.is_floating_point() for x in taken[5:]} == {True}  # its blocks
    handle.remove()
    del taken[:]
    model(ids)
    assert taken == [ids]
