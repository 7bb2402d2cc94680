"""Modules as one operator, a whole SimpleLLM or one block: the same as the modules, and only while those are what
their classes say."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyllm.model
import tinyllm.nn
from tests.helpers.needs import needs_extension
from tests.model.modules import KINDS, assert_same, by_modules, input_of, small, tokens
from tests.model.test_nn import F64, TIGHT, grads, randomise
from tinyllm import _fused, ops

MODELS: dict[str, dict[str, Any]] = {
    "article": {},
    "scaled": {"num_heads": 3, "causal": True, "norm_first": True, "activation": "gelu", "position": "learned"},
    "tied": {"num_heads": 2, "tie_embeddings": True, "bias": False},
    "tied pre-norm": {"tie_embeddings": True, "norm_first": True, "bias": False, "position": "learned"},
    "one layer": {"num_layers": 1, "causal": True, "norm_first": True},
    "gelu": {"activation": "gelu"},
    "as GPT-2's": {
        **{"num_heads": 3, "causal": True, "norm_first": True, "activation": "gelu_tanh", "position": "learned"},
        **{"tie_embeddings": True, "output_bias": False, "norm_eps": 1e-3},
    },
    "one head, post-norm, output without bias": {"activation": "gelu_tanh", "output_bias": False},
}


@needs_extension
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_model_as_one_operator_is_its_modules(options: dict[str, Any], taken: list[Tensor]) -> None:
    model = small("model", **options).double()
    assert_same(model, by_modules(model), **TIGHT)
    assert len(taken) == 4


@needs_extension
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_block_as_one_operator_is_its_modules(
    norm_first: bool, num_heads: int, causal: bool, activation: str, bias: bool, taken: list[Tensor]
) -> None:
    options = {"norm_first": norm_first, "num_heads": num_heads, "causal": causal, "activation": activation}
    block = small("block", bias=bias, **options).double()
    block.norm1.eps, block.norm2.eps = 1e-3, 1e-2
    assert_same(block, by_modules(block), **TIGHT)
    assert len(taken) == 2


# ---- Parameters


@needs_extension
def test_other_parameters_are_used_at_once(taken: list[Tensor]) -> None:
    ids, _ = tokens()
    model = small("model")
    before = model(ids)
    model.transformer_blocks[1].norm2.weight = nn.Parameter(torch.full((12,), 3.0))
    assert not torch.equal(model(ids), before)
    with torch.no_grad():
        model.embedding.embedding.weight.mul_(2)
    torch.testing.assert_close(model(ids), by_modules(model)(ids))
    model.double()
    torch.testing.assert_close(model(ids), by_modules(model)(ids))
    loaded = small("model")
    loaded(ids)
    loaded.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(loaded(ids), model(ids))
    assert len(taken) == 7


@needs_extension
def test_layers_of_different_width(taken: list[Tensor]) -> None:
    model = small("model").double()
    model(tokens()[0])
    model.transformer_blocks[1].feed_forward[0] = nn.Linear(12, 7, dtype=F64)
    model.transformer_blocks[1].feed_forward[2] = nn.Linear(7, 12, dtype=F64)
    assert_same(model, by_modules(model), **TIGHT)
    assert len(taken) == 5


def test_parameters_that_stop_fitting_raise_as_their_modules_do() -> None:
    ids, _ = tokens()
    model = small("model")
    model(ids)
    model.transformer_blocks[1].feed_forward[0].weight = nn.Parameter(torch.ones(20, 7))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(ids)


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
        for path in ("feed_forward.0", "attention.key"):
            linear, other = block.get_submodule(path), doubled.get_submodule(path)
            other.weight.mul_(2)
            del linear._parameters["weight"]
            linear._parameters["weight"] = other.weight.div(2).as_subclass(_Doubling)
        torch.testing.assert_close(block(x), by_modules(doubled)(x))
    assert not taken


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str, taken: list[Tensor]) -> None:
    module, other = small(kind).double(), small(kind).double()
    randomise(other)
    x = input_of(kind, F64)
    module(x)
    parameters = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(module, parameters, x)
    torch.testing.assert_close(out, other(x), **TIGHT)
    assert len(taken) == 3
    for a, b in zip(grads(out, *parameters.values()), grads(other(x), *other.parameters()), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_fused_where_no_gradient_is_recorded(kind: str, taken: list[Tensor]) -> None:
    module, x = small(kind).requires_grad_(False), input_of(kind)
    module(x)
    assert len(taken) == 1
    if kind == "block":  # backward would compute the gradients of all parameters for that of x
        module(x.requires_grad_())
        assert len(taken) == 1
    next(module.parameters()).requires_grad_(True)
    module(x)
    assert len([y for y in taken if y.dtype == x.dtype]) == 1
    with torch.no_grad():
        module(x)
    assert len([y for y in taken if y.dtype == x.dtype]) == 2


# ---- Calls that are not for one operator


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_against_one_operator(kind: str, taken: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = small(kind), input_of(kind)
    monkeypatch.setattr(_fused._products, "by_torch", lambda *_: "bfloat16 is faster")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x), by_modules(module)(x))
    with ops.backend("reference"):
        module(x)
        assert ops.last_backend() == "reference"
    low = x.bfloat16() if x.is_floating_point() else x
    assert copy.deepcopy(module).bfloat16()(low).dtype == torch.bfloat16
    assert copy.deepcopy(module).to("meta")(x.to("meta")).device.type == "meta"
    if kind == "model":
        assert module(x[:0]).shape == (0, 7, 11)
        assert module(x[:, :0]).shape == (3, 0, 11)
    assert not [y for y in taken if y.dtype == x.dtype and y.numel()]


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_that_would_save_nothing(kind: str, taken: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = small(kind), input_of(kind)
    monkeypatch.setattr(_fused._products, "by_torch", lambda *_: None)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
        assert found.dtype == by_modules(module)(x).dtype
    assert torch.equal(found, expected.to(found.dtype))
    assert len(taken) == 2
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@needs_extension
def test_a_large_call_is_not_one_operator(monkeypatch: pytest.MonkeyPatch, taken: list[Tensor]) -> None:
    model, (ids, targets) = small("model"), tokens()
    model.loss(ids, targets)
    work = ids.numel() * model._whole.work
    for limit, whole in ((work - 1, False), (work, True)):
        del taken[:]
        monkeypatch.setattr(_fused, "_SMALL_MODEL", limit)
        model.loss(ids, targets)
        assert [not x.is_floating_point() for x in taken] == ([True] if whole else [False, False])


@needs_extension
def test_the_loss_of_many_logits_does_not_hold_them(monkeypatch: pytest.MonkeyPatch, taken: list[Tensor]) -> None:
    model, (ids, targets) = small("model"), tokens()
    expected = model.loss(ids, targets)
    monkeypatch.setattr(tinyllm.model, "_MANY_LOGITS", ids.numel() * 11)
    torch.testing.assert_close(model.loss(ids, targets), expected)
    assert ops.last_backend() == "cpp"
    assert len([x for x in taken if not x.is_floating_point()]) == 1


@needs_extension
@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
def test_positions_of_another_dtype_are_promoted_as_by_the_modules(position: str, taken: list[Tensor]) -> None:
    model, (ids, targets) = small("model", position=position), tokens()
    model(ids)
    assert len(taken) == 1
    for name, parameter in model.named_parameters():
        if not name.startswith("positional_encoding"):
            parameter.data = parameter.data.double()
    out = model(ids)
    assert out.dtype == F64
    torch.testing.assert_close(out, by_modules(model)(ids), **TIGHT)
    assert model.loss(ids, targets).dtype == F64
    assert len([x for x in taken if not x.is_floating_point()]) == 1


def test_errors_are_those_of_the_modules() -> None:
    for model in (small("model"), by_modules(small("model"))):
        ids, targets = tokens()
        with pytest.raises(IndexError, match=r"the token id 99; ids must be in 0 .. 10"):
            model(torch.full((2, 3), 99))
        with pytest.raises(ValueError, match="x has 10 tokens in a sequence; max_seq_len is 9"):
            model(torch.zeros(1, 10, dtype=torch.int64))
        with pytest.raises(IndexError, match="99 is out of bounds"):
            model.loss(ids, torch.full_like(targets, 99))


# ---- Life of a model


@needs_extension
def test_copies_and_files_are_models_of_their_own(taken: list[Tensor]) -> None:
    ids, _ = tokens()
    model = small("model")
    expected = model(ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other._whole is None
        torch.testing.assert_close(other(ids), expected, rtol=0, atol=0)
        with torch.no_grad():
            other.output.weight.zero_()
        assert not torch.equal(other(ids), expected)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    assert len(taken) == 6


def test_a_model_is_freed_when_nobody_holds_it() -> None:
    model = small("model")
    model(tokens()[0])
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


@needs_extension
def test_blocks_and_models_compile_whole() -> None:
    options: dict[str, Any] = {"num_heads": 3, "norm_first": True, "activation": "gelu"}
    block = small("block", **options)
    assert_same(torch.compile(block, fullgraph=True), by_modules(block))
    model, (ids, targets) = small("model", **options), tokens()
    eager = model.loss(ids, targets)
    compiled = torch.compile(model.loss, fullgraph=True)(ids, targets)
    torch.testing.assert_close(compiled, eager)
    ours, theirs = (grads(loss, *model.parameters()) for loss in (compiled, eager))
    torch.testing.assert_close(ours, theirs)
