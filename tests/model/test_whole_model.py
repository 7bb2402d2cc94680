"""SimpleLLM as one operator: the same as its modules, and only where they are what it takes them for."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyllm.model
from tests.helpers.needs import needs_extension
from tests.model.test_fused_block import CHANGES as BLOCK_CHANGES
from tests.model.test_fused_block import Doubled, put
from tests.model.test_nn import F64, TIGHT, grads, randomise
from tinyllm import SimpleLLM, ops

pytestmark = needs_extension


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The ids that the whole-model operator was given."""
    found: list[Tensor] = []
    original = ops.run_transformer

    def spy(ids: Tensor, *args: Any) -> Tensor:
        found.append(ids)
        return original(ids, *args)

    monkeypatch.setattr(ops, "run_transformer", spy)
    return found


def small_model(**options: Any) -> SimpleLLM:
    torch.manual_seed(0)
    model = SimpleLLM(11, 12, 20, options.pop("num_layers", 2), max_seq_len=9, **options)
    randomise(model)
    return model


def by_modules(model: SimpleLLM) -> SimpleLLM:
    """A copy whose modules are called one by one, because one of them has a hook."""
    other = copy.deepcopy(model)
    other.transformer_blocks.register_forward_hook(lambda *_: None)
    return other


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(11, (3, 8), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def assert_same_model(ours: SimpleLLM, theirs: SimpleLLM, **tolerance: Any) -> None:
    ids, targets = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids), **tolerance)
    for call in (
        lambda model: model(ids).sin().sum(),
        lambda model: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()),
        lambda model: model.loss(ids, targets),
    ):
        out, expected = call(ours), call(theirs)
        torch.testing.assert_close(out, expected, **tolerance)
        for a, b in zip(grads(out, *ours.parameters()), grads(expected, *theirs.parameters()), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


OPTIONS: dict[str, dict[str, Any]] = {
    "article": {},
    "scaled": {"num_heads": 3, "causal": True, "norm_first": True, "activation": "gelu", "position": "learned"},
    "tied": {"num_heads": 2, "tie_embeddings": True, "bias": False},
    "tied pre-norm": {"tie_embeddings": True, "norm_first": True, "bias": False, "position": "learned"},
    "one layer": {"num_layers": 1, "causal": True, "norm_first": True},
    "gelu": {"activation": "gelu"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_operator_is_the_modules(options: dict[str, Any], taken: list[Tensor]) -> None:
    model = small_model(**options).double()
    assert_same_model(model, by_modules(model), **TIGHT)
    assert len(taken) == 4


CHANGES: dict[str, Callable[[Any], object]] = {
    "dropout": put("dropout.p", 0.5),
    "another dropout": put("dropout", nn.AlphaDropout(0.5)),
    "hook on the embedding": lambda model: model.embedding.register_forward_hook(lambda *_: None),
    "hook on the table": lambda model: model.embedding.embedding.register_forward_hook(lambda *_: None),
    "hook on a block": lambda model: model.transformer_blocks[1].register_forward_pre_hook(lambda *_: None),
    "hook on the blocks": lambda model: model.transformer_blocks.register_full_backward_hook(lambda *_: None),
    "hook on the output": lambda model: model.output.register_forward_hook(lambda *_: None),
    "hook on the last norm": lambda model: model.final_norm.register_forward_hook(lambda *_: None),
    "subclass of the output": put("output", Doubled(12, 11)),
    "a head of its own": put("output", nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 11))),
    "output without a bias": put("output", nn.Linear(12, 11, bias=False)),
    "padding": put("embedding.embedding.padding_idx", 3),
    "sparse": put("embedding.embedding.sparse", True),
    "largest norm": put("embedding.embedding.max_norm", 0.1),
    "another embedding": put("embedding", nn.Embedding(11, 12)),
    "another encoding": put("positional_encoding", nn.Identity()),
    "a block more": lambda model: model.transformer_blocks.append(nn.Tanh()),
    "no block": put("transformer_blocks", nn.Sequential()),
    "another block": put("transformer_blocks.0", nn.Linear(12, 12)),
    "another order": put("transformer_blocks.0.norm_first", False),
    "another epsilon": put("transformer_blocks.1.norm1.eps", 0.5),
    "another last epsilon": put("final_norm.eps", 0.5),
    "another mask": put("transformer_blocks.1.attention.causal", False),
    "no last norm": put("final_norm", None),
    "another last norm": put("final_norm", nn.LayerNorm(12)),
    "patched forward of a block": put("transformer_blocks.1.forward", lambda x: x[0] if isinstance(x, tuple) else x),
    "patched features": put("features", lambda ids: torch.ones(*ids.shape, 12)),
    "one frozen parameter": lambda model: model.output.bias.requires_grad_(False),
    **{f"block: {name}": lambda model, f=f: f(model.transformer_blocks[1]) for name, f in BLOCK_CHANGES.items()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_run_by_its_modules(change: str, taken: list[Tensor]) -> None:
    ids, targets = tokens()
    model = small_model(norm_first=True, activation="gelu", causal=True)
    model.loss(ids, targets)
    model.loss(ids, targets)
    assert len(taken) == 2  # and remembers what it looked like
    CHANGES[change](model)
    torch.manual_seed(1)
    out = model(ids)
    assert len(taken) == 2
    torch.manual_seed(1)
    torch.testing.assert_close(out, model.output(model.features(ids)))
    model.loss(ids, targets)
    assert len(taken) == 2


def test_a_change_taken_back_is_seen(taken: list[Tensor]) -> None:
    ids, _ = tokens()
    model = small_model(dropout=0.5)
    model(ids)
    assert not taken
    model.eval()(ids)
    assert len(taken) == 1
    model.train()(ids)
    assert len(taken) == 1
    handle = model.eval().output.register_forward_hook(lambda *_: None)
    model(ids)
    assert len(taken) == 1
    handle.remove()
    model(ids)
    assert len(taken) == 2


def test_other_parameters_are_used_at_once(taken: list[Tensor]) -> None:
    ids, _ = tokens()
    model = small_model()
    before = model(ids)
    model.transformer_blocks[1].norm2.weight = nn.Parameter(torch.full((12,), 3.0))
    assert not torch.equal(model(ids), before)
    with torch.no_grad():
        model.embedding.embedding.weight.mul_(2)
    torch.testing.assert_close(model(ids), by_modules(model)(ids))
    model.double()
    torch.testing.assert_close(model(ids), by_modules(model)(ids))
    loaded = small_model()
    loaded(ids)
    loaded.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(loaded(ids), model(ids))
    assert len(taken) == 7


def test_layers_of_different_width(taken: list[Tensor]) -> None:
    model = small_model().double()
    model(tokens()[0])
    model.transformer_blocks[1].feed_forward[0] = nn.Linear(12, 7, dtype=F64)
    model.transformer_blocks[1].feed_forward[2] = nn.Linear(7, 12, dtype=F64)
    assert_same_model(model, by_modules(model), **TIGHT)
    assert len(taken) == 5


def test_parameters_that_stop_fitting_raise_as_their_modules_do() -> None:
    ids, _ = tokens()
    model = small_model()
    model(ids)
    model.transformer_blocks[1].feed_forward[0].weight = nn.Parameter(torch.ones(20, 7))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(ids)


def test_copies_and_files_are_models_of_their_own(taken: list[Tensor]) -> None:
    ids, _ = tokens()
    model = small_model()
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
    model = small_model()
    model(tokens()[0])
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_large_call_is_not_one_operator(monkeypatch: pytest.MonkeyPatch, taken: list[Tensor]) -> None:
    model, (ids, targets) = small_model(), tokens()
    model.loss(ids, targets)
    work = ids.numel() * model._whole.work  # type: ignore[union-attr]
    monkeypatch.setattr(tinyllm.model, "_SMALL_MODEL", work - 1)
    model.loss(ids, targets)
    assert len(taken) == 1
    monkeypatch.setattr(tinyllm.model, "_SMALL_MODEL", work)
    model.loss(ids, targets)
    assert len(taken) == 2


def test_the_loss_of_many_logits_does_not_hold_them(monkeypatch: pytest.MonkeyPatch, taken: list[Tensor]) -> None:
    model, (ids, targets) = small_model(), tokens()
    expected = model.loss(ids, targets)
    monkeypatch.setattr(tinyllm.model, "_MANY_LOGITS", ids.numel() * 11)
    torch.testing.assert_close(model.loss(ids, targets), expected)
    assert ops.last_backend() == "cpp"
    assert len(taken) == 1


def test_a_frozen_model_is_one_operator(taken: list[Tensor]) -> None:
    small_model().requires_grad_(False)(tokens()[0])
    assert len(taken) == 1


def test_what_stands_against_one_operator(taken: list[Tensor]) -> None:
    model, (ids, _) = small_model(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    with ops.backend("reference"):
        model(ids)
        assert ops.last_backend() == "reference"
    assert model(ids[:0]).shape == (0, 7, 11)
    assert model(ids[:, :0]).shape == (3, 0, 11)
    assert copy.deepcopy(model).bfloat16()(ids).dtype == torch.bfloat16
    assert copy.deepcopy(model).to("meta")(ids.to("meta")).device.type == "meta"
    assert not taken


@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
def test_positions_of_another_dtype_are_promoted_as_by_the_modules(position: str, taken: list[Tensor]) -> None:
    model, (ids, targets) = small_model(position=position), tokens()
    model(ids)
    assert len(taken) == 1
    for name, parameter in model.named_parameters():
        if not name.startswith("positional_encoding"):
            parameter.data = parameter.data.double()
    out = model(ids)
    assert out.dtype == F64
    torch.testing.assert_close(out, by_modules(model)(ids), **TIGHT)
    assert model.loss(ids, targets).dtype == F64
    assert len(taken) == 1


def test_errors_are_those_of_the_modules() -> None:
    for model in (small_model(), by_modules(small_model())):
        ids, targets = tokens()
        with pytest.raises(IndexError, match=r"x has the token id 99; ids must be in 0 .. 10"):
            model(torch.full((2, 3), 99))
        with pytest.raises(ValueError, match="x has 10 tokens in a sequence; max_seq_len is 9"):
            model(torch.zeros(1, 10, dtype=torch.int64))
        with pytest.raises(IndexError, match="99 is out of bounds"):
            model.loss(ids, torch.full_like(targets, 99))


def test_hooks_on_the_model_itself_are_called(taken: list[Tensor]) -> None:
    model, seen = small_model(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    model(tokens()[0])
    assert len(seen) == len(taken) == 1


def test_functional_call(taken: list[Tensor]) -> None:
    model, other = small_model().double(), small_model().double()
    randomise(other)
    ids, _ = tokens()
    model(ids)
    parameters = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(model, parameters, ids)
    torch.testing.assert_close(out, other(ids), **TIGHT)
    assert len(taken) == 3
    for a, b in zip(grads(out, *parameters.values()), grads(other(ids), *other.parameters()), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_compiles_whole() -> None:
    model = small_model(num_heads=3, norm_first=True, activation="gelu")
    ids, targets = tokens()
    eager = model.loss(ids, targets)
    compiled = torch.compile(model.loss, fullgraph=True)(ids, targets)
    torch.testing.assert_close(compiled, eager)
    ours, theirs = (grads(loss, *model.parameters()) for loss in (compiled, eager))
    torch.testing.assert_close(ours, theirs)
