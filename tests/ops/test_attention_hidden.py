"""Test that keys and values behind key_lengths, above the causal diagonal or hidden by a bool mask touch no query, even
where they are NaN or infinite."""

import math

import pytest
import torch

from tests.ops.parity import DTYPES
from tinyllm import ops, reference

NAN, INF = math.nan, math.inf
BACKENDS = ("cpp", "reference")


def tensors(batch, heads, kv_heads, queries, keys, head_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, head_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(backend, inputs, grad, **arguments):
    leaves = [x.clone().requires_grad_() for x in inputs]
    with ops.backend(backend):
        out = ops.scaled_dot_product_attention(*leaves, enable_gqa=True, **arguments)
        return out, *torch.autograd.grad(out, leaves, grad)


def assert_untouched(backend, inputs, hidden, garbage, **arguments):
    """Garbage in the hidden (batch, keys) changes what zeros there give by roundings only, and its gradients are 0.

    hidden: (batch, keys), from every query.
    """
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    where = hidden[:, None, :, None]
    clean = [inputs[0], *(x.masked_fill(where, 0.0) for x in inputs[1:])]
    dirty = [inputs[0], *(x.masked_fill(where, garbage) for x in inputs[1:])]
    expected, found = (results(backend, x, grad, **arguments) for x in (clean, dirty))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-2 if a.dtype.itemsize == 2 else 1e-4, atol=1e-2 if a.dtype.itemsize == 2 else 1e-5
        )
    for grad_hidden in found[2:]:
        assert grad_hidden.masked_select(where).eq(0.0).all()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("kind", ["key_lengths", "key_lengths and a mask", "bool mask", "window", "-inf"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_hidden_from_all_queries(backend, kind, queries, garbage):
    inputs = tensors(3, 4, 2, queries, 150, 20)
    lengths = torch.tensor([149, 1, 67])
    hidden = torch.arange(150) >= lengths[:, None]
    if kind == "bool mask":
        hidden = torch.rand(3, 150, generator=torch.Generator().manual_seed(2)) < 0.4
    elif kind == "window":
        hidden = (torch.arange(150) < 20) | (torch.arange(150) > 90) | (torch.arange(150) == 50)
        hidden = hidden.expand(3, -1)
    visible = ~hidden[:, None, None, :]
    arguments = {"attn_mask": visible}
    if kind == "key_lengths":
        arguments = {"key_lengths": lengths}
    elif kind == "key_lengths and a mask":
        arguments = {"key_lengths": lengths.int(), "attn_mask": torch.randn(queries, 150)}
    elif kind == "-inf":
        arguments = {"attn_mask": torch.zeros(hidden.shape).masked_fill(hidden, -INF)[:, None, None, :]}
    assert_untouched(backend, inputs, hidden, garbage, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 33])
def test_every_dtype(queries, dtype):
    inputs = tensors(2, 2, 2, queries, 100, 24, dtype)
    lengths = torch.tensor([70, 3])
    assert_untouched("cpp", inputs, torch.arange(100) >= lengths[:, None], NAN, key_lengths=lengths)


@pytest.mark.parametrize("garbage", [NAN, INF])
@pytest.mark.parametrize("length", [1, 8, 67, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_above_the_causal_diagonal(backend, length, garbage):
    """Queries before the first bad key are untouched, to its very neighbour; those from it on see it and are not."""
    query, key, value = tensors(1, 2, 2, length, length, 16)
    bad = length // 2
    dirty = [x.clone() for x in (query, key, value)]
    for x in dirty[1:]:
        x[..., bad:, :] = garbage
    grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    grad[..., bad:, :] = 0.0
    found, expected = (results(backend, x, grad, is_causal=True) for x in (dirty, (query, key, value)))
    torch.testing.assert_close(found[0][..., :bad, :], expected[0][..., :bad, :])
    torch.testing.assert_close(found[1][..., :bad, :], expected[1][..., :bad, :])
    assert not found[0][..., bad:, :].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_in_one_sequence(backend):
    """One document full of NaN, between two others that a mask keeps apart from it: neither their outputs nor any of
    their gradients change."""
    inputs = tensors(1, 2, 2, 90, 90, 16)
    document = torch.tensor([0] * 37 + [1] * 20 + [2] * 33)
    mask, others = document[:, None] == document, (document != 1)[:, None]
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    dirty = [inputs[0], *(x.masked_fill(~others, NAN) for x in inputs[1:])]
    found, expected = (results(backend, x, grad, attn_mask=mask, is_causal=True) for x in (dirty, inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.where(others, 0.0), b.where(others, 0.0))
    assert found[0][..., 37:57, :].isnan().all()


@pytest.mark.parametrize("queries", [1, 40])
def test_what_is_seen_still_counts(queries):
    """A visible NaN reaches every query that sees it."""
    query, key, value = tensors(2, 2, 2, queries, 100, 16)
    value[0, :, 5] = NAN
    key[1, :, 7] = NAN
    with ops.backend("cpp"):
        out = ops.scaled_dot_product_attention(query, key, value, key_lengths=torch.tensor([90, 90]))
        assert out.isnan().all()
        out = ops.scaled_dot_product_attention(query, key, value, key_lengths=torch.tensor([5, 7]))
        assert out.isfinite().all()


@pytest.mark.parametrize("queries", [1, 19])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lowest", ["finfo.min", "finfo.min / 2", "finfo.max"])
def test_rows_of_the_largest_finite_numbers(lowest, dtype, queries):
    """As Hugging Face hides keys. A row that is hidden whole gives what PyTorch gives, a mean of the values; and its
    gradients, for which such a number has swallowed the logarithm of how many keys there are."""
    inputs = tensors(2, 2, 2, queries, 70, 16, dtype)
    numbers = torch.finfo(dtype)
    number = {"finfo.min": numbers.min, "finfo.min / 2": numbers.min / 2, "finfo.max": numbers.max}[lowest]
    mask = torch.zeros(2, 1, queries, 70, dtype=dtype)
    mask[0] = number
    mask[1, ..., 30:] = number
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def with_gradients(function, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = function(*leaves, tensors[3])
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    with ops.backend("cpp"):
        found = with_gradients(ops.scaled_dot_product_attention, *inputs, mask)
    # The largest numbers of float16 leave the scores some digits, those of float64 are exact's own.
    wide = dtype in (torch.float16, torch.float64)
    exact = with_gradients(
        reference.scaled_dot_product_attention, *(x if wide else x.double() for x in (*inputs, mask))
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_masks_give_no_nan(dtype):
    inputs = [x.requires_grad_() for x in tensors(1, 2, 2, 40, 40, 16, dtype)]
    numbers = torch.finfo(dtype)
    mask = torch.tensor([numbers.min, numbers.max, 0.0, numbers.tiny, numbers.min / 3], dtype=dtype).repeat(8)
    for attn_mask in (mask, mask.roll(1) * 1.0, mask[:, None].expand(40, 40)):
        with ops.backend("cpp"):
            out = ops.scaled_dot_product_attention(*inputs, attn_mask)
            grads = torch.autograd.grad(out.sum(), inputs)
        assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bool_bytes_other_than_0_and_1_are_true(backend):
    inputs = tensors(1, 2, 2, 40, 128, 16)
    visible = torch.rand(40, 128, generator=torch.Generator().manual_seed(3)) < 0.5
    numbers = visible.to(torch.uint8) * torch.randint(1, 256, (40, 128), dtype=torch.uint8)
    columns = numbers.t().contiguous().t()  # which no vector can read
    with ops.backend(backend):
        expected = ops.scaled_dot_product_attention(*inputs, visible)
        for mask in (numbers, columns):
            assert torch.equal(ops.scaled_dot_product_attention(*inputs, mask.view(torch.bool)), expected)


def test_key_lengths_stay_with_the_kernel():
    """Not by a mask of (B, 1, 1, S), which the kernels would have to read for every query."""
    inputs = tensors(2, 2, 2, 30, 64, 16)
    lengths = torch.tensor([64, 10])
    with ops.backend("cpp"):
        ours = ops.scaled_dot_product_attention(*inputs, key_lengths=lengths, is_causal=True)
    mask = torch.arange(64) < lengths[:, None, None, None]
    exact = reference.scaled_dot_product_attention(*(x.double() for x in inputs), mask, is_causal=True)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("name", BACKENDS)
def test_key_lengths_hide_the_padding(name, kind, is_causal):
    inputs = tensors(4, 2, 2, 20, 90, 16, torch.float64)
    lengths = torch.tensor([90, 1, 0, 200], dtype=torch.int32)
    numbers = torch.randn(20, 90, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = {"none": None, "bool": numbers > -1, "additive": numbers}[kind]
    visible = (torch.arange(90) < lengths[:, None])[:, None, None]
    together = visible.expand(4, 1, 20, 90)
    if mask is not None:
        together = mask & visible if kind == "bool" else mask.masked_fill(~visible, -INF)
    results = []
    for backend, arguments in (
        (name, {"attn_mask": mask, "key_lengths": lengths}),
        ("reference", {"attn_mask": together}),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with ops.backend(backend):
            out = ops.scaled_dot_product_attention(*leaves, is_causal=is_causal, **arguments)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(results[0][0][2], torch.zeros_like(results[0][0][2]))
