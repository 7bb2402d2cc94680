"""The reference model against the article's formulas, worked out by hand without torch's modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tinyllm import reference

VOCAB = {"hello": 0, "world": 1, "how": 2, "are": 3, "you": 4, "<UNK>": 5}

# Written down from the article's code: what a state_dict saved by it holds, in its order.
ARTICLE_KEYS = [
    "embedding.embedding.weight",
    "positional_encoding.pe",
    *(
        f"transformer_blocks.{layer}.{name}"
        for layer in range(2)
        for name in (
            "attention.query.weight",
            "attention.query.bias",
            "attention.key.weight",
            "attention.key.bias",
            "attention.value.weight",
            "attention.value.bias",
            "feed_forward.0.weight",
            "feed_forward.0.bias",
            "feed_forward.2.weight",
            "feed_forward.2.bias",
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
        )
    ),
    "output.weight",
    "output.bias",
]


def by_hand_linear(x: list[list[float]], layer: nn.Linear) -> list[list[float]]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        [sum(a * b for a, b in zip(row, w, strict=True)) + c for w, c in zip(weight, bias, strict=True)] for row in x
    ]


def by_hand_attention(x: list[list[float]], module: reference.SelfAttention) -> list[list[float]]:
    """One sequence (T, D), number by number."""
    query, key, value = (by_hand_linear(x, m) for m in (module.query, module.key, module.value))
    out = []
    for q in query:
        scores = [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)) for k in key]
        weights = [math.exp(s) for s in scores]
        total = sum(weights)
        out.append([sum(w / total * v[d] for w, v in zip(weights, value, strict=True)) for d in range(len(q))])
    return out


def by_hand_norm(x: list[list[float]], norm: nn.LayerNorm) -> list[list[float]]:
    out = []
    for row in x:
        mean = sum(row) / len(row)
        variance = sum((a - mean) ** 2 for a in row) / len(row)
        scale = 1 / math.sqrt(variance + 1e-5)
        affine = zip(row, norm.weight.tolist(), norm.bias.tolist(), strict=True)
        out.append([(a - mean) * scale * w + b for a, w, b in affine])
    return out


def add(x: list[list[float]], y: list[list[float]]) -> list[list[float]]:
    return [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(x, y, strict=True)]


def by_hand_block(x: list[list[float]], block: reference.TransformerBlock) -> list[list[float]]:
    x = by_hand_norm(add(x, by_hand_attention(x, block.attention)), block.norm1)
    first, last = block.feed_forward[0], block.feed_forward[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    hidden = [[max(a, 0.0) for a in row] for row in by_hand_linear(x, first)]
    return by_hand_norm(add(x, by_hand_linear(hidden, last)), block.norm2)


def randomise_norms(module: nn.Module) -> None:
    """Draw weights and biases, since leaving out ones and zeros would not show."""
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello world how", [0, 1, 2]),
        ("hello there world", [0, 5, 1]),
        ("  hello\tworld\n", [0, 1]),
        ("Hello hello,", [5, 5]),
        ("", []),
    ],
)
def test_tokenize(text: str, ids: list[int]) -> None:
    assert reference.tokenize(text, VOCAB) == ids


def test_tokenize_needs_an_unknown_word() -> None:
    with pytest.raises(KeyError, match="<UNK>"):
        reference.tokenize("hello", {"hello": 0})


@pytest.mark.parametrize("embedding_dim", [1, 2, 7, 16])
def test_sinusoidal_table(embedding_dim: int) -> None:
    table = reference.sinusoidal_table(50, embedding_dim)
    assert table.shape == (50, embedding_dim)
    assert table.dtype == torch.float32
    for t in range(50):
        for column in range(embedding_dim):
            angle = t / 10000 ** (column // 2 * 2 / embedding_dim)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            # The angle is rounded three times in float32, and sin' and cos' are at most 1.
            assert abs(table[t, column].item() - expected) <= 4 * (angle + 1) * 2**-24


def test_positional_encoding_is_time_first() -> None:
    module = reference.PositionalEncoding(6)
    assert module.pe.shape == (5000, 1, 6)
    assert list(module.state_dict()) == ["pe"]
    assert not list(module.parameters())
    x = torch.randn(4, 3, 6)
    out = module(x)
    table = reference.sinusoidal_table(4, 6)
    for t in range(4):
        for b in range(3):
            assert torch.equal(out[t, b], x[t, b] + table[t])


def test_self_attention_by_hand() -> None:
    torch.manual_seed(0)
    module = reference.SelfAttention(5).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = torch.tensor([by_hand_attention(row.tolist(), module) for row in x], dtype=x.dtype)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_transformer_block_by_hand() -> None:
    torch.manual_seed(0)
    block = reference.TransformerBlock(6, 9).double()
    randomise_norms(block)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = torch.tensor([by_hand_block(row.tolist(), block) for row in x], dtype=x.dtype)
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-11)


def test_simple_llm_by_hand() -> None:
    torch.manual_seed(0)
    model = reference.SimpleLLM(7, 6, 9, 2).double()
    randomise_norms(model)
    ids = torch.tensor([[3, 0, 6, 3], [1, 1, 2, 5]])
    expected = []
    for sequence in ids.tolist():
        vectors = model.embedding.embedding.weight[sequence].tolist()
        x = add(vectors, reference.sinusoidal_table(len(sequence), 6).double().tolist())
        for block in model.transformer_blocks:
            assert isinstance(block, reference.TransformerBlock)
            x = by_hand_block(x, block)
        expected.append(by_hand_linear(x, model.output))
    torch.testing.assert_close(model(ids), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_state_dict_is_the_articles() -> None:
    state = reference.SimpleLLM(6, 16, 32, 2).state_dict()
    assert list(state) == ARTICLE_KEYS
    assert state["embedding.embedding.weight"].shape == (6, 16)
    assert state["positional_encoding.pe"].shape == (5000, 1, 16)
    assert state["transformer_blocks.1.feed_forward.0.weight"].shape == (32, 16)
    assert state["transformer_blocks.1.feed_forward.2.weight"].shape == (16, 32)
    assert state["output.weight"].shape == (6, 16)


def test_parameters_are_drawn_in_the_articles_order() -> None:
    torch.manual_seed(3)
    state = reference.SimpleLLM(6, 8, 12, 2).state_dict()
    torch.manual_seed(3)
    assert torch.equal(state["embedding.embedding.weight"], nn.Embedding(6, 8).weight)
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        layers = [("attention.query", 8, 8), ("attention.key", 8, 8), ("attention.value", 8, 8)]
        for name, fan_in, fan_out in [
            *layers,
            ("feed_forward.0", 8, 12),
            ("feed_forward.2", 12, 8),
        ]:
            layer = nn.Linear(fan_in, fan_out)
            assert torch.equal(state[f"{block}.{name}.weight"], layer.weight)
            assert torch.equal(state[f"{block}.{name}.bias"], layer.bias)
    output = nn.Linear(8, 6)
    assert torch.equal(state["output.weight"], output.weight)
    assert torch.equal(state["output.bias"], output.bias)


def test_a_sequence_may_be_5000_long_and_no_longer() -> None:
    model = reference.SimpleLLM(6, 2, 2, 0)
    assert model(torch.zeros(1, 5000, dtype=torch.int64)).shape == (1, 5000, 6)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5001, dtype=torch.int64))


def test_every_operator_has_its_reference() -> None:
    for name in ("layer_norm", "add_layer_norm", "scaled_dot_product_attention"):
        assert callable(getattr(reference, name))
