"""Tests of the formulas that count work."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import work
from benchmarks.row import BACKWARD, FORWARD, STEP
from tinyllm import reference


def test_layer_norm_bytes() -> None:
    size = 768 * 128 * 4
    assert work.layer_norm_bytes(FORWARD, 768, 128) == 2 * size + 2 * 128 * 4
    assert work.layer_norm_bytes(BACKWARD, 768, 128) == 3 * size + 3 * 128 * 4
    assert work.layer_norm_bytes(STEP, 768, 128) == 5 * size + 5 * 128 * 4
    assert work.layer_norm_bytes(FORWARD, 768, 128, itemsize=2) == size + 128 * 4
    assert work.add_layer_norm_bytes(FORWARD, 768, 128) == 4 * size + 2 * 128 * 4
    assert work.add_layer_norm_bytes(BACKWARD, 768, 128) == 4 * size + 3 * 128 * 4


def test_linear_flops_are_those_of_the_formula() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = torch.nn.functional.linear(x, weight)
        assert work.linear_flops(FORWARD, 6, 4, 9) == counter.get_total_flops()
        out.sum().backward()
    assert work.linear_flops(STEP, 6, 4, 9) == counter.get_total_flops()


def test_linear_bytes() -> None:
    assert work.linear_bytes(FORWARD, 1, 768, 3072) == (768 + 3072 * 768 + 3072 + 3072) * 4


def test_cross_entropy_bytes() -> None:
    assert work.cross_entropy_bytes(FORWARD, 1024, 50257) == 1024 * 50257 * 4
    assert work.cross_entropy_bytes(STEP, 1024, 50257) == 2 * 1024 * 50257 * 4


def test_linear_cross_entropy_flops_are_those_of_the_formula() -> None:
    input, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = reference.linear_cross_entropy(input, weight, torch.arange(6))
        assert work.linear_cross_entropy_flops(FORWARD, 6, 4, 9) == counter.get_total_flops()
        loss.backward()
    assert work.linear_cross_entropy_flops(STEP, 6, 4, 9) == counter.get_total_flops()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (5, 3), (3, 5)])
def test_visible_pairs(queries: int, keys: int) -> None:
    mask = torch.ones(queries, keys, dtype=torch.bool)
    assert work.visible_pairs(queries, keys, causal=False) == mask.sum()
    assert work.visible_pairs(queries, keys, causal=True) == mask.tril().sum()


def test_attention_flops_are_those_of_the_formula() -> None:
    query, key, value = (torch.randn(2, 3, 8, 4) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        reference.scaled_dot_product_attention(query, key, value)
    pairs = 2 * 3 * work.visible_pairs(8, 8, causal=False)
    assert work.attention_flops(FORWARD, pairs, 4) == counter.get_total_flops()
    # Backward: two products for each of forward's, and Q K^T again.
    assert work.attention_flops(BACKWARD, pairs, 4) == 2.5 * work.attention_flops(FORWARD, pairs, 4)
    assert work.attention_flops(STEP, pairs, 4) == 3.5 * work.attention_flops(FORWARD, pairs, 4)


def test_model_flops_are_those_of_the_model() -> None:
    sizes = {"vocab_size": 11, "embedding_dim": 8, "hidden_dim": 20, "num_layers": 2}
    model, ids = reference.SimpleLLM(**sizes), torch.randint(11, (3, 5))
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        forward = counter.get_total_flops()
        loss.backward()
        step = counter.get_total_flops()
    assert work.model_flops(FORWARD, batch=3, seq_len=5, **sizes) == forward
    assert work.model_flops(STEP, batch=3, seq_len=5, **sizes) == step
