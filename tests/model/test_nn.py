"""Modules equal those of torch.nn, or of the reference, that they stand in for."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinyllm.nn
from tinyllm import ops, reference

F64 = torch.float64
TIGHT: dict[str, Any] = {
    "rtol": 1e-10,
    "atol": 1e-10,
}  # float64 with a few thousand roundings: a wrong formula is far off


def randomise(module: nn.Module) -> None:
    """Every parameter random, also the norms' ones and zeros, so that leaving one out shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def grads(out: Tensor, *inputs: Tensor | nn.Parameter) -> tuple[Tensor, ...]:
    """Return the gradients of a fixed random weighting of `out`."""
    generator = torch.Generator().manual_seed(9)
    weighting = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return torch.autograd.grad(out, inputs, weighting)


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Assert that two modules agree in outputs and in gradients."""
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected, **TIGHT)
    pair = grads(found, x, *ours.parameters()), grads(expected, x, *theirs.parameters())
    torch.testing.assert_close(*pair, **TIGHT)


# ---- LayerNorm


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_layer_norm_is_torchs(shape: tuple[int, ...], affine: tuple[bool, bool]) -> None:
    kwargs: dict[str, Any] = {"eps": 1e-3, "elementwise_affine": affine[0], "bias": affine[1]}
    theirs = nn.LayerNorm(shape, dtype=F64, **kwargs)
    ours = tinyllm.nn.LayerNorm(shape, dtype=F64, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 4, *shape, dtype=F64, requires_grad=True)
    assert_same(ours, theirs, x)


def test_layer_norm_adds_the_residual() -> None:
    norm = tinyllm.nn.LayerNorm(7, dtype=F64)
    randomise(norm)
    x, y = (torch.randn(3, 7, dtype=F64, requires_grad=True) for _ in range(2))
    normed, total = norm(x, y)
    torch.testing.assert_close(total, x + y, **TIGHT)
    torch.testing.assert_close(normed, norm(x + y), **TIGHT)
    # Both outputs are used in a block, so gradients come in through both.
    for a, b in zip(grads(normed * total.cos(), x, y), grads(norm(x + y) * (x + y).cos(), x, y), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_layer_norm_constructor_is_torchs() -> None:
    norm = tinyllm.nn.LayerNorm(4, 1e-6, True, False, "meta", torch.bfloat16)
    assert isinstance(norm, nn.LayerNorm)
    assert (norm.normalized_shape, norm.eps, norm.bias) == ((4,), 1e-6, None)
    assert (norm.weight.device.type, norm.weight.dtype) == ("meta", torch.bfloat16)
    assert repr(norm) == "LayerNorm((4,), eps=1e-06, elementwise_affine=True, bias=False)"


# ---- RMSNorm


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_is_a_drop_in(eps, affine):
    theirs = nn.RMSNorm((3, 4), eps, affine, dtype=F64)
    ours = tinyllm.nn.RMSNorm((3, 4), eps, affine, dtype=F64)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)


# ---- Embedding and positions


def test_embedding_names_the_bad_id() -> None:
    embedding = tinyllm.nn.Embedding(6, 4)
    assert list(embedding.state_dict()) == ["embedding.weight"]
    for bad in (6, -1, 1000):
        with pytest.raises(IndexError, match=rf"token id {bad}; ids must be in 0 \.\. 5"):
            embedding(torch.tensor([[0, 5], [bad, 2]]))


@pytest.mark.parametrize("embedding_dim", [1, 7, 16])
def test_sinusoidal_positions(embedding_dim: int) -> None:
    ours = tinyllm.nn.PositionalEncoding(embedding_dim, 9)
    theirs = reference.PositionalEncoding(embedding_dim, 9)
    assert ours.pe.shape == (9, 1, embedding_dim)
    assert torch.equal(ours.pe, theirs.pe)
    assert list(ours.state_dict()) == ["pe"]
    x = torch.randn(2, 5, embedding_dim)
    assert torch.equal(ours(x), theirs(x.transpose(0, 1)).transpose(0, 1))
    assert ours(x).is_contiguous()


def test_learned_positions() -> None:
    module = tinyllm.nn.LearnedPositionalEncoding(6, 9)
    assert module.weight.shape == (9, 6)
    x = torch.randn(2, 5, 6)
    out = module(x)
    for t in range(5):
        torch.testing.assert_close(out[:, t], x[:, t] + module.weight[t])
    out.sum().backward()
    # Every position that was used learns, from each of the two sequences; the others do not.
    assert module.weight.grad is not None
    assert module.weight.grad[:, 0].tolist() == [2.0] * 5 + [0.0] * 4


@pytest.mark.parametrize("name", ["PositionalEncoding", "LearnedPositionalEncoding"])
def test_positions_end_at_max_seq_len(name: str) -> None:
    module = getattr(tinyllm.nn, name)(4, 8)
    assert module(torch.zeros(1, 8, 4)).shape == (1, 8, 4)
    with pytest.raises(ValueError, match="x has 9 tokens in a sequence; max_seq_len is 8"):
        module(torch.zeros(1, 9, 4))
    assert getattr(tinyllm.nn, name)(4).max_seq_len == 5000


# ---- SelfAttention


@pytest.mark.parametrize(("batch", "seq_len", "dim"), [(1, 1, 1), (2, 5, 7), (3, 33, 16), (2, 0, 4)])
def test_one_head_is_the_articles(batch: int, seq_len: int, dim: int) -> None:
    torch.manual_seed(0)
    theirs = reference.SelfAttention(dim).double()
    ours = tinyllm.nn.SelfAttention(dim).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(batch, seq_len, dim, dtype=F64, requires_grad=True)
    assert_same(ours, theirs, x)


def copy_to_torch_attention(ours: tinyllm.nn.SelfAttention, theirs: nn.MultiheadAttention) -> None:
    """Copy the other way round than a user would, so that every parameter of ours takes part."""
    state = {
        "in_proj_weight": torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]),
        # One head has no output projection: the identity stands for it.
        "out_proj.weight": torch.eye(ours.embedding_dim, dtype=ours.query.weight.dtype),
    }
    if ours.out_proj is not None:
        state["out_proj.weight"] = ours.out_proj.weight
    if ours.query.bias is not None:
        state["in_proj_bias"] = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias])
        state["out_proj.bias"] = torch.zeros_like(ours.query.bias)
        if ours.out_proj is not None:
            state["out_proj.bias"] = ours.out_proj.bias
    theirs.load_state_dict(state, strict=True)


def no_look_ahead(seq_len: int) -> Tensor:
    return torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)  # True: may not look, in torch.nn


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "num_heads"), [(12, 2), (24, 3), (5, 5), (6, 1)])
def test_heads_are_torchs(dim: int, num_heads: int, causal: bool, bias: bool) -> None:
    torch.manual_seed(0)
    ours = tinyllm.nn.SelfAttention(dim, num_heads=num_heads, causal=causal, bias=bias).double()
    randomise(ours)
    theirs = nn.MultiheadAttention(dim, num_heads, bias=bias, batch_first=True, dtype=F64)
    copy_to_torch_attention(ours, theirs)
    x = torch.randn(3, 11, dim, dtype=F64, requires_grad=True)
    mask = no_look_ahead(11) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    out = ours(x)
    torch.testing.assert_close(out, expected, **TIGHT)
    stacked = (ours.query.weight, ours.key.weight, ours.value.weight)
    dx, *dw = grads(out, x, *stacked)
    dx_theirs, dw_theirs = grads(expected, x, theirs.in_proj_weight)
    torch.testing.assert_close(dx, dx_theirs, **TIGHT)
    torch.testing.assert_close(torch.cat(dw), dw_theirs, **TIGHT)


def test_out_proj_only_with_several_heads() -> None:
    assert tinyllm.nn.SelfAttention(4).out_proj is None
    keys = list(tinyllm.nn.SelfAttention(4, num_heads=2, bias=False).state_dict())
    assert keys == ["query.weight", "key.weight", "value.weight", "out_proj.weight"]


def test_attention_dropout_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[float] = []
    original = ops.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        passed.append(kwargs["dropout_p"])
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "scaled_dot_product_attention", spy)
    x = torch.randn(2, 6, 8)
    for num_heads in (1, 2):
        module = tinyllm.nn.SelfAttention(8, num_heads=num_heads, dropout=0.25)
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))
    assert passed == [0.25, 0.25, 0.0, 0.0] * 2


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 7), (2, 3, 4, 8)])
def test_attention_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .*; it must be \(B, T, 8\)"):
        tinyllm.nn.SelfAttention(8, num_heads=2)(torch.zeros(shape))


# ---- TransformerBlock


@pytest.mark.parametrize(("batch", "seq_len", "dim", "hidden"), [(1, 1, 2, 3), (2, 9, 16, 31)])
def test_default_block_is_the_articles(batch: int, seq_len: int, dim: int, hidden: int) -> None:
    torch.manual_seed(0)
    theirs = reference.TransformerBlock(dim, hidden).double()
    ours = tinyllm.nn.TransformerBlock(dim, hidden).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(batch, seq_len, dim, dtype=F64, requires_grad=True)
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("num_heads", "causal"), [(1, False), (3, False), (3, True)])
def test_block_is_torchs_encoder_layer(
    num_heads: int, causal: bool, norm_first: bool, activation: str, bias: bool
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm_first": norm_first, "bias": bias}
    heads: dict[str, Any] = {"num_heads": num_heads, "causal": causal}
    ours = tinyllm.nn.TransformerBlock(12, 20, activation=activation, norm_eps=1e-3, **heads, **options).double()
    randomise(ours)
    options |= {"activation": reference.ACTIVATIONS[activation], "layer_norm_eps": 1e-3}
    theirs = nn.TransformerEncoderLayer(12, num_heads, 20, dropout=0.0, batch_first=True, dtype=F64, **options)
    copy_to_torch_attention(ours.attention, theirs.self_attn)
    names = [("feed_forward.0", "linear1"), ("feed_forward.2", "linear2")]
    for mine, its in [*names, ("norm1", "norm1"), ("norm2", "norm2")]:
        theirs.get_submodule(its).load_state_dict(ours.get_submodule(mine).state_dict())
    x = torch.randn(2, 7, 12, dtype=F64, requires_grad=True)
    out, expected = ours(x), theirs(x, src_mask=no_look_ahead(7) if causal else None)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(grads(out, x)[0], grads(expected, x)[0], **TIGHT)


def test_deferred_add_is_the_same_stack() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(tinyllm.nn.TransformerBlock(8, 12, norm_first=True).double() for _ in range(3)))
    deferred = nn.Sequential(
        *(tinyllm.nn.TransformerBlock(8, 12, norm_first=True, defer_add=True).double() for _ in range(3))
    )
    deferred.load_state_dict(plain.state_dict(), strict=True)
    for block in deferred:
        block.norm1.register_forward_pre_hook(lambda *_: None)  # keeps the modules from being fused into one operator
    x = torch.randn(2, 5, 8, dtype=F64)
    stream, branch = deferred(x)
    torch.testing.assert_close(stream + branch, plain(x), **TIGHT)


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_on_both_branches(norm_first: bool) -> None:
    """All but certain dropout leaves of a block what is not on a branch."""
    # Two heads: out_proj's bias gets past the dropped attention weights, but not past the branch.
    block = tinyllm.nn.TransformerBlock(64, 64, num_heads=2, norm_first=norm_first, dropout=1 - 1e-9)
    x = torch.randn(2, 5, 64)
    left = x if norm_first else block.norm2(block.norm1(x))
    torch.testing.assert_close(block(x), left)
    block.eval()
    assert not torch.allclose(block(x), left)


def test_block_survives_deepcopy_and_pickle() -> None:
    block = tinyllm.nn.TransformerBlock(8, 12, num_heads=2, causal=True, activation="gelu")
    x = torch.randn(2, 5, 8)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))


# ---- Errors


@pytest.mark.parametrize(
    ("module", "kwargs", "error", "message"),
    [
        ("SelfAttention", {"num_heads": 3}, ValueError, "embedding_dim is 8 and num_heads 3"),
        ("SelfAttention", {"num_heads": 0}, ValueError, "num_heads is 0; it must be at least 1"),
        ("SelfAttention", {"num_heads": 2.0}, TypeError, "num_heads is 2.0; it must be an integer"),
        ("SelfAttention", {"dropout": 1.0}, ValueError, "dropout is 1.0; it must be from 0"),
        ("SelfAttention", {"dropout": math.nan}, ValueError, "dropout is nan"),
        ("SelfAttention", {"dropout": "no"}, TypeError, "dropout is 'no'; it must be a number"),
        ("PositionalEncoding", {"max_seq_len": 0}, ValueError, "max_seq_len is 0"),
        ("LearnedPositionalEncoding", {"max_seq_len": -1}, ValueError, "max_seq_len is -1"),
        ("TransformerBlock", {"hidden_dim": 0}, ValueError, "hidden_dim is 0"),
        (
            "TransformerBlock",
            {"hidden_dim": 4, "activation": "tanh"},
            ValueError,
            """activation is 'tanh'; it must be "relu", "gelu" or "gelu_tanh\"""",
        ),
        ("TransformerBlock", {"hidden_dim": 4, "norm_eps": 0.0}, ValueError, "norm_eps is 0.0; it must be positive"),
        (
            "TransformerBlock",
            {"hidden_dim": 4, "defer_add": True},
            ValueError,
            "defer_add is True; it needs norm_first=True",
        ),
    ],
)
def test_bad_arguments(module: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(tinyllm.nn, module)(8, **kwargs)
