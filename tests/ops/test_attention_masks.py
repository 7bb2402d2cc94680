"""Masks of bools and of numbers, and key lengths, in attention."""

import math
from itertools import product

import pytest
import torch

from tests.helpers.attention import (
    BF16,
    F32,
    WIDEST,
    assert_close_to_reference,
    attention,
    compare,
    draw_mask,
    full_and_causal,
    make,
    on_cuda,
)  # fmt: skip
from tests.helpers.backends import cases, on
from tests.ops.parity import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of 0 times infinity


@full_and_causal
@cases(
    "shape mask_shape dtype",
    cpp=product([(2, 3, 70, 131, 24)], [(2, 3, 70, 131), (70, 131), (2, 1, 1, 131), (3, 70, 1)], DTYPES),
    triton=product([(2, 2, 40, 75, 24)], [(2, 2, 40, 75), (40, 75), (2, 1, 1, 75)], [F32, BF16]),
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(backend, kind, shape, mask_shape, is_causal, dtype):
    mask = draw_mask(backend, kind, *mask_shape, dtype=dtype)
    compare(backend, make(backend, *shape, dtype=dtype), mask, is_causal)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@cases("keys dtype", cpp=product([1100], DTYPES), triton=product([300], [F32, BF16]))
def test_few_queries_of_grouped_heads(backend, keys, dtype, kind):
    inputs = make(backend, 2, 6, 2, keys, 24, dtype, kv_heads=2, value_dim=40)
    compare(backend, inputs, draw_mask(backend, kind, 2, 6, 2, keys, dtype=dtype), enable_gqa=True)


# Of 0 and beyond the keys too.
@cases(
    "kind shape is_causal lengths",
    **dict.fromkeys(
        ("cpp", "reference"),
        tuple(product(["none", "bool", "additive"], [(4, 2, 20, 90, 16)], [False, True], [(90, 1, 0, 200)])),
    ),
    triton=product(["none", "bool"], [(4, 1, 1, 160, 16), (4, 1, 50, 160, 16)], [False, True], [(160, 1, 0, 90)]),
    **on_cuda(
        ("none", (4, 1, queries, 130, head_dim), is_causal, (0, 1, 77, 128))
        for queries, is_causal in ((1, False), (40, False), (140, True))
        for head_dim in (64, 128)
    ),
)
def test_key_lengths(backend, kind, shape, is_causal, lengths):
    inputs = make(backend, *shape)
    mask = draw_mask(backend, kind, shape[0], 1, *shape[2:4], dtype=inputs[0].dtype)
    lengths = backend.tensor(lengths, torch.int32 if shape[-1] == 64 else torch.int64)
    if backend.name == "cuda":
        compare(backend, inputs, mask, is_causal, lengths)
    out = assert_close_to_reference(backend, inputs, mask, is_causal=is_causal, key_lengths=lengths)
    assert torch.equal(out[lengths == 0], torch.zeros_like(out[lengths == 0]))


@full_and_causal
@cases("heads dtype head_dim", cpp=product([(1, 1), (2, 1), (3, 3)], [F32, BF16], [24, 128]))
def test_queries_of_a_head_that_threads_share(backend, heads, dtype, head_dim, is_causal):
    query_heads, kv_heads = heads
    inputs = make(backend, 2, query_heads, 300, 290, head_dim, dtype, kv_heads)
    compare(backend, inputs, is_causal=is_causal, key_lengths=backend.tensor([131, 290]), enable_gqa=True)


@cases(
    "shape",
    cpp=[(2, 1, 2, 70, 16), (2, 1, 50, 70, 16)],
    triton=[(2, 1, 1, 160, 16), (2, 1, 50, 160, 16)],
    **on_cuda([(2, 1, 2, 70, 64), (2, 1, 50, 70, 64)]),
)
def test_lengths_beyond_the_tensor_are_not_beyond_the_memory(backend, shape):
    inputs = make(backend, *shape)
    over = attention(*inputs, key_lengths=backend.tensor([shape[3] + 1, 2**40]))
    assert torch.equal(over, attention(*inputs))
    below = attention(*inputs, key_lengths=backend.tensor([-1, -(2**31)], torch.int32))
    assert torch.equal(below, torch.zeros_like(over))


@on("cpp", "triton")
@pytest.mark.parametrize("queries", [1, 50])
def test_key_lengths_with_gaps_between_them(backend, queries):
    table = backend.tensor([[160, 3], [1, 5], [0, 7], [90, 9]])
    assert_close_to_reference(backend, make(backend, 4, 1, queries, 160, 16), key_lengths=table[:, 0])


@pytest.mark.parametrize("kind", ["bool", "additive"])
@cases("shape", cpp=[(1, 2, 70, 200, 16)], triton=[(1, 1, 4, 120, 16), (1, 1, 70, 120, 16)])
def test_a_query_that_sees_no_key_gives_zero(backend, kind, shape):
    *_, queries, keys, _ = shape
    mask = torch.ones(queries, keys, dtype=torch.bool, device=backend.device)
    mask[2], mask[queries - 1], mask[1, 60:], mask[0, :100] = False, False, False, False
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=WIDEST[backend.name], device=backend.device).masked_fill(~mask, -math.inf)
    out = assert_close_to_reference(backend, make(backend, *shape), mask)
    assert torch.equal(out[:, :, [2, queries - 1]], torch.zeros_like(out[:, :, :2]))


@on("cpp", "triton")
def test_keys_masked_in_the_first_block_only(backend):
    # The running maximum stays -inf through a whole block of keys.
    mask = torch.zeros(40, 300, dtype=torch.bool, device=backend.device)
    mask[:, 290:] = True
    compare(backend, make(backend, 1, 1, 40, 300, 16, F32), mask)


@full_and_causal
@cases("queries keys few document padding", cpp=[(300, 700, 1300, 90, 333)], triton=[(100, 170, 400, 60, 133)])
@pytest.mark.parametrize("pattern", ["window", "documents", "padding", "holes", "few queries"])
def test_masks_that_hide_whole_blocks(backend, pattern, is_causal, queries, keys, few, document, padding):
    queries, keys = (4, few) if pattern == "few queries" else (queries, keys)
    i, j = torch.arange(queries, device=backend.device)[:, None], torch.arange(keys, device=backend.device)
    mask = {
        "window": (j - i).abs() < 40,
        "documents": i // document == j // document,
        "padding": (j < padding).expand(queries, keys),
        "holes": (j // 64 % 3 == 0) & (i % 7 > 0),
        "few queries": (j > few - 50) & (i > 0),
    }[pattern]
    assert_close_to_reference(backend, make(backend, 1, 2, queries, keys, 16), mask, is_causal=is_causal)
