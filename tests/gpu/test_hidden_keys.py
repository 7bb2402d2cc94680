"""Tests that hidden keys and values, NaN or infinite here, do not change outputs or gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.device import DEVICE, draw
from tinyllm import ops, reference

# numpy tells of every 0 times infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Tiles by pointers; by descriptors; by pointers, with columns that are not there. And such that go in chunks.
KINDS = [(torch.float32, 16), (torch.bfloat16, 16), (torch.float16, 17)]
CHUNKED = [(torch.bfloat16, 264), (torch.float32, 66)]


def make(batch, queries, keys, size, dtype=torch.float32, heads=2):
    """Two heads of queries and one of keys and values."""
    return [
        draw(batch, heads, queries, size, dtype=dtype, seed=1),
        *(draw(batch, 1, keys, size, dtype=dtype, seed=seed) for seed in (2, 3)),
    ]


def spoil(x, rows):
    """x with NaN and both infinities in some of its rows."""
    x = x.clone()
    for i, row in enumerate(rows):
        x[..., row, i % 3 :] = (math.nan, math.inf, -math.inf)[i % 3]
    return x


def call(q, k, v, mask=None, dropout_p=0.0, **options):
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(5)
    out = ops.scaled_dot_product_attention(*leaves, mask, dropout_p, enable_gqa=True, **options)
    assert ops.last_backend() == "triton"
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, dtype=out.dtype, seed=6))]


def assert_same(a, b):
    """But for rounding: what is made a second time is summed in tiles of another height."""
    step = torch.finfo(a.dtype).eps
    torch.testing.assert_close(a, b, atol=8 * step, rtol=8 * step)


def assert_untouched(q, k, v, hidden, mask=None, **options):
    """Keys and values that no query sees may be anything, and have gradients of exactly 0."""
    clean, spoilt = call(q, k, v, mask, **options), call(q, spoil(k, hidden), spoil(v, hidden[::-1]), mask, **options)
    for a, b in zip(spoilt, clean, strict=True):
        assert_same(a, b)
    for grad in spoilt[2:]:
        assert torch.equal(grad[..., hidden, :], torch.zeros_like(grad[..., hidden, :]))


@pytest.mark.parametrize(("dtype", "size"), KINDS, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_behind_key_lengths(is_causal, queries, dtype, size):
    lengths = torch.tensor([19], device=DEVICE)
    inputs = make(1, queries, 45, size, dtype)
    assert_untouched(*inputs, list(range(19, 45)), is_causal=is_causal, key_lengths=lengths)


def test_behind_key_lengths_of_several_sequences():
    q, k, v = make(3, 20, 70, 16)
    lengths = torch.tensor([70, 33, 0], device=DEVICE)
    behind = (torch.arange(70, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    garbage = [x.masked_fill(behind, math.nan) for x in (k, v)]
    for a, b in zip(call(q, *garbage, key_lengths=lengths), call(q, k, v, key_lengths=lengths), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "size"), KINDS, ids=str)
@pytest.mark.parametrize("queries", [3, 20])
def test_above_the_diagonal(queries, dtype, size):
    assert_untouched(*make(1, queries, 45, size, dtype), list(range(queries, 45)), is_causal=True)


def assert_untouched_by_what_a_mask_hides(queries, dtype, size, **options):
    hidden = [3, 4, 5, 30, 44]
    mask = draw(1, 2, queries, 45, seed=4) > -1
    mask[..., 0] = True
    mask[..., hidden] = False
    assert_untouched(*make(1, queries, 45, size, dtype), hidden, mask, **options)


@pytest.mark.parametrize(("dtype", "size"), KINDS + CHUNKED, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_hidden_by_a_bool_mask(queries, dtype, size):
    assert_untouched_by_what_a_mask_hides(queries, dtype, size)


@pytest.mark.parametrize(("dtype", "size"), KINDS[:2], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"is_causal": True}, {"scale": -0.5}], ids=str)
def test_hidden_by_a_bool_mask_and_more(options, queries, dtype, size):
    assert_untouched_by_what_a_mask_hides(queries, dtype, size, **options)


def test_above_the_diagonal_under_an_additive_mask():
    assert_untouched(*make(1, 20, 45, 16), list(range(20, 45)), draw(20, 45, seed=4), is_causal=True)


@pytest.mark.parametrize(("dtype", "size"), KINDS, ids=str)
def test_documents_do_not_touch_each_other(dtype, size):
    """The second document's keys or values are NaN, in tiles that the first and third share with it."""
    q, k, v = make(1, 70, 70, size, dtype)
    document = torch.bucketize(torch.arange(70, device=DEVICE), torch.tensor([25, 45], device=DEVICE), right=True)
    mask = document[:, None] == document
    others, spoilt_rows = document != 1, [27, 31, 40]
    clean = call(q, k, v, mask)
    for k2, v2 in ((spoil(k, spoilt_rows), v), (k, spoil(v, spoilt_rows))):
        spoilt = call(q, k2, v2, mask)
        for a, b in zip(spoilt, clean, strict=True):
            assert_same(a[..., others, :], b[..., others, :])
        assert not spoilt[0][..., ~others, :].isfinite().any()


@pytest.mark.parametrize("kind", ["diagonal", "bool"])
@pytest.mark.parametrize(("dtype", "size"), KINDS[:2], ids=str)
@pytest.mark.parametrize("queries", [5, 45])
def test_each_query_has_the_infinities_that_it_sees(queries, dtype, size, kind):
    q, k, v = make(1, queries, 45, size, dtype)
    visible = torch.ones(queries, 45, dtype=torch.bool, device=DEVICE).tril()
    if kind == "bool":
        visible = draw(queries, 45, seed=4) > 1
        visible[:, 0], visible[2, [1, 3]] = True, True
    v[..., 1, :5], v[..., 3, 3:8], v[..., 20, 9], v[..., 39, 5] = math.inf, -math.inf, math.nan, -math.inf
    options = {"is_causal": True} if kind == "diagonal" else {"mask": visible}
    out, grad_q, *_ = call(q, k, v, **options)
    for row in range(queries):
        seen = visible[row]
        alone = F.scaled_dot_product_attention(
            q[:, :, row : row + 1].float(), k[:, :, seen].float(), v[:, :, seen].float(), enable_gqa=True
        )
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(out[:, :, row : row + 1].float(), alone, equal_nan=True, **tolerance)
        assert grad_q[:, :, row].isfinite().all() == v[:, :, seen].isfinite().all()
    assert out.isinf().any()
    assert out.isnan().any()


@pytest.mark.parametrize(("dtype", "size"), [*KINDS, *CHUNKED], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_rows_hidden_by_the_most_negative_number(queries, dtype, size):
    """It swallows the logarithm of how many keys have it, which the gradients and the parts of a split row need."""
    inputs = make(2, queries, 150, size, dtype)
    mask = torch.zeros(2, 1, queries, 150, dtype=dtype, device=DEVICE)
    mask[0] = torch.finfo(dtype).min
    mask[1, ..., 30:] = torch.finfo(dtype).min
    leaves = [x.double().requires_grad_() for x in inputs]
    # The mask as it is: only float16's leaves the scores some digits, and there few.
    out = reference.scaled_dot_product_attention(*leaves, mask.double(), enable_gqa=True)
    grads = torch.autograd.grad(out, leaves, draw(*out.shape, dtype=dtype, seed=6).double())
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for a, b in zip(call(*inputs, mask), [out, *grads], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
