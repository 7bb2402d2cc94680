"""Dropout of attention's weights. Which are dropped is read from an attention whose values are the identity matrix."""

import math
from itertools import product

import pytest
import torch

from tests.helpers.attention import F32, F64, WIDEST, allowed_steps, attention, draw_mask, exact, make
from tests.helpers.backends import cases, on
from tests.ops.parity import assert_equal, assert_same_bits, check_parity, outputs_and_gradients
from tinyllm import ops

FULL, CAUSAL, BEHIND_40 = {}, {"is_causal": True}, {"is_causal": True, "causal_offset": 40}


def dropping(seed, p, **arguments):
    """Return attention that drops the same weights at each call."""

    def call(q, k, v):
        torch.manual_seed(seed)
        return attention(q, k, v, dropout_p=p, **arguments)

    return call


def factors_of(q, k, seed, p, **arguments):
    """Return what such a call multiplies its weights by."""
    identity = torch.eye(k.size(-2), dtype=k.dtype, device=k.device).expand(*k.shape[:-1], k.size(-2))
    dropped, weights = dropping(seed, p, **arguments)(q, k, identity), attention(q, k, identity, **arguments)
    return torch.where(weights > 0, dropped / weights, 0.0)


@cases("shape", cpp=[(2, 4, 130, 257, 8)], triton=[(2, 2, 50, 75, 8)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_fraction_kept_and_the_expectation(backend, shape, p):
    q, k, _ = make(backend, *shape)
    factors = factors_of(q, k, 0, p)
    kept, (batch, heads, queries, keys, _) = factors != 0, shape
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)), atol=1e-5, rtol=1e-4)
    # Five standard deviations.
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    # Neither rows, columns nor heads repeat each other.
    assert abs(kept.double().mean((0, 1, 2)) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / (batch * heads * queries))
    assert abs(kept.double().mean(3) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / keys)
    assert not torch.equal(kept[0, 0, 0], kept[0, 0, 1])
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert not torch.equal(kept[0], kept[1])


@cases(
    "shape kv_heads kind causal dtype",
    cpp=[
        (shape, shape[1], kind, causal, dtype)
        for shape in [(2, 3, 70, 131, 24), (1, 2, 70, 131, 8), (1, 2, 3, 700, 8)]
        for kind, causal in (("none", FULL), ("none", CAUSAL), ("bool", FULL), ("none", BEHIND_40))
        for dtype in (F64, F32)
    ],
    triton=product([(2, 4, 2, 90, 8), (1, 4, 70, 90, 8)], [2], ["none"], [FULL, CAUSAL, BEHIND_40], [F32]),
)
def test_forward_backward_and_double_backward_with_the_same_mask(backend, shape, kv_heads, kind, causal, dtype):
    inputs = make(backend, *shape, dtype, kv_heads)
    options = {"attn_mask": draw_mask(backend, kind, *shape[2:4]), "enable_gqa": True, **causal}
    factors = factors_of(*(x.to(WIDEST[backend.name]) for x in inputs[:2]), 7, 0.3, **options)
    if backend.name == "triton":  # read in float32
        factors = torch.where(factors > 0, 1 / 0.7, 0.0)

    def theirs(q, k, v):
        mask = options["attn_mask"]
        return exact(q, k, v, mask, enable_gqa=True, weight_factors=factors.to(q.dtype), **causal)

    ours = dropping(7, 0.3, **options)
    check_parity(ours, theirs, theirs, inputs, **allowed_steps(backend, dtype))
    assert ops.last_backend() == backend.name
    leaves = [x.requires_grad_() for x in inputs]
    out = ours(*leaves)
    once = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    twice = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-5)


@on("cpp")
def test_long_rows_split_over_blocks_and_threads(backend):
    inputs = make(backend, 1, 1, 900, 900, 8, F32)
    factors = factors_of(*inputs[:2], 3, 0.2, is_causal=True)
    assert_same_bits(backend.threads, lambda: outputs_and_gradients(dropping(3, 0.2, is_causal=True), *inputs))
    found = outputs_and_gradients(dropping(3, 0.2, is_causal=True), *inputs)
    theirs = outputs_and_gradients(
        lambda *x: exact(*x, is_causal=True, weight_factors=factors), *(x.double() for x in inputs)
    )
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@on("cpp", "triton")
def test_the_seed_decides(backend):
    inputs = make(backend, 1, 2, 30, 30, 8)
    first, again, other = (dropping(seed, 0.5)(*inputs) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(other, attention(*inputs, dropout_p=0.5))


@on("cpp", "triton")
def test_everything_or_nothing_dropped(backend):
    inputs = make(backend, 1, 2, 30, 40, 8)
    assert torch.equal(attention(*inputs, dropout_p=0.0), attention(*inputs))
    found = outputs_and_gradients(lambda *x: attention(*x, dropout_p=1.0), *inputs)
    assert_equal(found, [torch.zeros_like(x) for x in found])


@on("cpp")
def test_gradients_of_gradients(backend):
    leaves = [x.requires_grad_() for x in make(backend, 1, 2, 3, 4, 2, kv_heads=1)]
    assert torch.autograd.gradcheck(dropping(5, 0.4, enable_gqa=True), leaves)
    assert torch.autograd.gradgradcheck(dropping(5, 0.4, enable_gqa=True), leaves)


@on("cpp", "triton")
def test_the_bits_are_philox(backend):
    # The known answer for a counter and a key of zeros (Random123's kat_vectors): words 6627e8d5 e169c58d ... belong to
    # the elements 0, 16, 32 and 48 in C++, and to the first four in Triton.
    rng, apart = backend.tensor([0, 0]), 16 if backend.name == "cpp" else 1
    for i, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            assert (backend.raw.dropout_factors(rng, 1, 64, p)[0, i * apart] > 0) == kept


@on("cpp")
def test_the_compiler_and_opcheck(backend):
    q, k, v = make(backend, 2, 2, 5, 6, 4, F32)
    rng, raw = backend.tensor([1, 2]), backend.raw
    torch.library.opcheck(raw.dropout_factors, (rng, 3, 128, 0.5))
    torch.library.opcheck(raw.attention_fwd, (q, k, v, None, False, 0.5, 0.5, rng))
    out, lse = raw.attention_fwd(q, k, v, None, False, 0.5, 0.5, rng)
    torch.library.opcheck(raw.attention_bwd, (out, q, k, v, None, out, lse, False, 0.5, 0.5, rng))
    with pytest.raises((ValueError, RuntimeError), match="dropout needs rng"):
        raw.attention_fwd(q, k, v, None, False, 0.5, 0.5, None)
    compiled = backend.compile(lambda q, k, v: attention(q, k, v, dropout_p=0.5))
    leaves = [x.requires_grad_() for x in (q, k, torch.ones_like(v))]
    torch.manual_seed(0)
    first = compiled(*leaves)
    assert not torch.allclose(first, torch.ones_like(first))
    assert not torch.equal(first, compiled(*leaves))
    torch.manual_seed(0)
    assert torch.equal(first, compiled(*leaves))
    torch.autograd.grad(first.sum(), leaves)
