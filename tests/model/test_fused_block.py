"""TransformerBlock as one operator: the same as its modules, and only where they are what it takes them for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyllm.nn
from tests.helpers.needs import needs_extension
from tests.model.test_nn import F64, TIGHT, grads, randomise
from tinyllm import ops


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that the whole-block operator was given."""
    found: list[Tensor] = []
    original = ops.transformer_block

    def spy(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(x)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(ops, "transformer_block", spy)
    return found


def small_block(**options: Any) -> tinyllm.nn.TransformerBlock:
    torch.manual_seed(0)
    block = tinyllm.nn.TransformerBlock(12, 20, **options)
    randomise(block)
    return block


def by_modules(block: tinyllm.nn.TransformerBlock) -> tinyllm.nn.TransformerBlock:
    """A copy whose modules are called one by one, because one of them has a hook."""
    other = copy.deepcopy(block)
    other.norm2.register_forward_hook(lambda *_: None)
    return other


def assert_same_block(ours: nn.Module, theirs: nn.Module, x: Tensor, **tolerance: Any) -> None:
    leaves = [x.detach().requires_grad_() for _ in range(2)]
    out, expected = ours(leaves[0]), theirs(leaves[1])
    torch.testing.assert_close(out, expected, **tolerance)
    for a, b in zip(
        grads(out, leaves[0], *ours.parameters()), grads(expected, leaves[1], *theirs.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b, **tolerance)


@needs_extension
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("norm_first", [False, True])
def test_fused_block_is_its_modules(
    norm_first: bool, num_heads: int, causal: bool, activation: str, bias: bool, taken: list[Tensor]
) -> None:
    block = small_block(norm_first=norm_first, num_heads=num_heads, causal=causal, activation=activation, bias=bias)
    block.double()
    block.norm1.eps, block.norm2.eps = 1e-3, 1e-2
    x = torch.randn(2, 7, 12, dtype=F64)
    assert_same_block(block, by_modules(block), x, **TIGHT)
    assert len(taken) == 1
    with torch.no_grad():
        torch.testing.assert_close(block(x), by_modules(block)(x), **TIGHT)
    assert len(taken) == 2


class Doubled(nn.Linear):
    """Stands for LoRA and its like."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def put(path: str, value: object) -> Callable[[nn.Module], object]:
    """A change of one attribute, or of one of a Sequential's modules."""
    owner, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(owner), name, value)


CHANGES: dict[str, Callable[[Any], object]] = {
    "dropout": put("dropout.p", 0.5),
    "dropout left on in eval": lambda block: (block.eval(), block.dropout.train(), put("dropout.p", 0.5)(block)),
    "dropout of attention": put("attention.dropout", 0.5),
    "another dropout": put("dropout", nn.AlphaDropout(0.5)),
    "no dropout": put("dropout", nn.Identity()),
    "hook": lambda block: block.norm1.register_forward_hook(lambda *_: None),
    "pre-hook": lambda block: block.feed_forward.register_forward_pre_hook(lambda *_: None),
    "hook on the activation": lambda block: block.feed_forward[1].register_forward_hook(lambda *_: None),
    "hook on dropout": lambda block: block.dropout.register_forward_hook(lambda *_: None),
    "hook on attention": lambda block: block.attention.register_full_backward_hook(lambda *_: None),
    "patched forward": put("feed_forward.0.forward", lambda x: torch.ones(*x.shape[:-1], 20)),
    "parametrization": lambda block: nn.utils.parametrizations.weight_norm(block.attention.key),
    "subclass of a layer": put("attention.value", Doubled(12, 12)),
    "subclass of a norm": put("norm2", type("Norm", (tinyllm.nn.LayerNorm,), {})(12)),
    "norm without parameters": put("norm1", tinyllm.nn.LayerNorm(12, elementwise_affine=False)),
    "another attention": put("attention", nn.Linear(12, 12)),
    "another activation": put("feed_forward.1", nn.ReLU()),
    "another gelu": put("feed_forward.1", nn.GELU("tanh")),
    "a layer more": lambda block: block.feed_forward.append(nn.Tanh()),
    "no layers": put("feed_forward", nn.Sequential()),
    "another network": put("feed_forward", nn.Linear(12, 12)),
    "one bias missing": put("attention.query", nn.Linear(12, 12, bias=False)),
    "narrow query and key": lambda block: [put(f"attention.{x}", nn.Linear(12, 5))(block) for x in ("query", "key")],
    "projection of one head": put("attention.out_proj", nn.Linear(12, 12)),
    "frozen parameter": lambda block: block.norm2.bias.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_were_changed_are_called(change: str, taken: list[Tensor]) -> None:
    block = small_block(activation="gelu")
    CHANGES[change](block)
    assert block(torch.randn(2, 7, 12)).shape == (2, 7, 12)
    assert not taken


@pytest.mark.parametrize("change", ["another activation", "another gelu", "hook on the activation", "patched forward"])
def test_a_large_network_that_was_changed_is_called(change: str) -> None:
    block, x = small_block(activation="gelu"), torch.randn(600, 7, 12)  # large enough for an operator of its own
    CHANGES[change](block)
    torch.testing.assert_close(block._network(x), block.feed_forward(x), rtol=0, atol=0)


def test_hooks_on_all_modules_are_called(taken: list[Tensor]) -> None:
    seen: list[nn.Module] = []
    block = small_block()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        block(torch.randn(2, 7, 12))
    finally:
        handle.remove()
    assert block.feed_forward[1] in seen
    assert not taken


def test_autocast_and_a_forced_reference_take_the_modules(taken: list[Tensor]) -> None:
    block, x = small_block(), torch.randn(2, 7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x), by_modules(block)(x))
    with ops.backend("reference"):
        block(x)
        assert ops.last_backend() == "reference"
    assert block.to("meta")(x.to("meta")).device.type == "meta"
    assert block.to_empty(device="cpu").bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert not taken


@needs_extension
def test_frozen_block_is_fused_where_no_gradient_is_recorded(taken: list[Tensor]) -> None:
    block = small_block().requires_grad_(False)
    with torch.no_grad():
        block(torch.randn(2, 7, 12))
    assert len(taken) == 1


class _Doubling(Tensor):
    """A weight that is not the numbers it holds, as a quantized one is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [x.as_subclass(Tensor) * 2 if isinstance(x, cls) else x for x in args]
        return (
            func(*plain, **(kwargs or {}))
            if func is F.linear
            else super().__torch_function__(func, types, args, kwargs)
        )


def test_weights_of_a_kind_of_their_own_are_left_to_it(taken: list[Tensor]) -> None:
    x = torch.randn(2, 300, 12)  # large enough for the operators
    for width in (20, 200):
        block = tinyllm.nn.TransformerBlock(12, width).requires_grad_(False)
        doubled = copy.deepcopy(block)
        for linear, other in (
            (block.feed_forward[0], doubled.feed_forward[0]),
            (block.attention.key, doubled.attention.key),
        ):
            other.weight.mul_(2)
            del linear._parameters["weight"]
            linear._parameters["weight"] = other.weight.div(2).as_subclass(_Doubling)
        torch.testing.assert_close(block(x), by_modules(doubled)(x))
    assert not taken


@needs_extension
def test_fused_block_runs_with_parameters_from_elsewhere(taken: list[Tensor]) -> None:
    block, other = small_block().double(), small_block().double()
    randomise(other)
    x = torch.randn(2, 7, 12, dtype=F64)
    parameters = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(block, parameters, x)
    torch.testing.assert_close(out, other(x), **TIGHT)
    assert len(taken) == 2
    for a, b in zip(grads(out, *parameters.values()), grads(other(x), *other.parameters()), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@needs_extension
def test_fused_block_compiles_whole() -> None:
    block, x = small_block(activation="gelu", num_heads=3, norm_first=True), torch.randn(2, 7, 12)
    assert_same_block(torch.compile(block, fullgraph=True), by_modules(block), x)
