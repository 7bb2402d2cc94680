import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference

# B, H, T, S, D
SHAPES = [
    (1, 1, 1, 1, 1), (2, 3, 7, 7, 5), (1, 2, 64, 64, 32), (2, 1, 65, 131, 17), (1, 2, 129, 40, 64),
    (1, 1, 200, 257, 128), (1, 1, 33, 70, 160), (1, 1, 9, 11, 1024), (3, 2, 1, 300, 16),
    (1, 1, 70, 1031, 7), (1, 2, 3, 1100, 24), (2, 1, 1, 1025, 67), (1, 1, 8, 70, 1024),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_kernel():
    with ops.backend("cpp"):
        yield


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make(b, h, t, s, d, dtype=torch.float64, kv_heads=None, value_dim=None):
    kv_heads = h if kv_heads is None else kv_heads
    return (
        draw(b, h, t, d, dtype=dtype, seed=1),
        draw(b, kv_heads, s, d, dtype=dtype, seed=2),
        draw(b, kv_heads, s, value_dim or d, dtype=dtype, seed=3),
    )


def compare(inputs, mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Ours against PyTorch's function and the reference, outputs and gradients."""
    torch_mask, torch_causal = mask, is_causal
    if is_causal and mask is not None:  # PyTorch's takes one or the other
        corner = torch.ones(inputs[0].size(-2), inputs[1].size(-2), dtype=torch.bool).tril()
        torch_mask = mask & corner if mask.dtype == torch.bool else mask.masked_fill(~corner, -math.inf)
        torch_causal = False
    check_parity(
        lambda q, k, v: ops.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        ),
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, torch_mask, is_causal=torch_causal, scale=scale, enable_gqa=enable_gqa
        ),
        lambda q, k, v: reference.scaled_dot_product_attention(
            q, k, v, mask.double() if mask is not None and mask.is_floating_point() else mask,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        ),
        inputs,
    )  # fmt: skip
    assert ops.last_backend() == "cpp"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, is_causal, dtype):
    compare(make(*shape, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask_shape", [(2, 3, 70, 131), (70, 131), (2, 1, 1, 131), (3, 70, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(kind, mask_shape, is_causal, dtype):
    numbers = draw(*mask_shape, seed=4)
    # At least the first key stays visible to every query: rows with none are tested by themselves.
    mask = (numbers > -1) if kind == "bool" else numbers.to(dtype)
    if kind == "bool":
        mask[..., 0] = True
    compare(make(2, 3, 70, 131, 24, dtype=dtype), mask, is_causal)


def test_the_reference_is_pytorchs_attention():
    q, k, v = make(2, 4, 9, 13, 8)
    for arguments in ({}, {"is_causal": True}, {"attn_mask": draw(9, 13, seed=5)}, {"scale": 0.3}):
        torch.testing.assert_close(
            reference.scaled_dot_product_attention(q, k, v, **arguments),
            F.scaled_dot_product_attention(q, k, v, **arguments),
        )


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(kv_heads, is_causal):
    compare(make(2, 4, 66, 66, 16, dtype=torch.float32, kv_heads=kv_heads), is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_of_grouped_heads(dtype, kind):
    mask = None if kind == "none" else draw(2, 6, 2, 1100, seed=4)
    mask = mask > -1 if kind == "bool" else mask if mask is None else mask.to(dtype)
    inputs = make(2, 6, 2, 1100, 24, dtype=dtype, kv_heads=2, value_dim=40)
    compare(inputs, mask, enable_gqa=True)


def test_value_dim_differs_from_head_dim_and_scale():
    compare(make(2, 2, 50, 60, 24, dtype=torch.float32, value_dim=40), scale=0.25)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)], ids=str)
def test_any_number_of_leading_dimensions(shape):
    compare([draw(*shape, seed=i, dtype=torch.float32) for i in range(3)], draw(5, 5, seed=9).float(), is_causal=True)


def test_leading_dimensions_broadcast():
    compare([draw(4, 3, 5, 8, seed=1), draw(1, 3, 6, 8, seed=2), draw(3, 6, 8, seed=3)])


@pytest.mark.parametrize("view", [
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: x[:, :, ::2], lambda x: x[:1].expand(3, -1, -1, -1), lambda x: x.flip(2),
])  # fmt: skip
def test_any_strides(view):
    compare([view(x) for x in make(3, 2, 18, 18, 12)], is_causal=True)


def test_an_expanded_gradient_and_one_tensor_in_three_roles():
    x = draw(2, 2, 9, 8).requires_grad_()
    (ours,) = torch.autograd.grad(ops.scaled_dot_product_attention(x, x, x).sum(), x)
    (theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4, 8), (2, 0, 4, 4, 8), (2, 2, 0, 4, 8), (2, 2, 4, 0, 8), (2, 2, 4, 4, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(shape, is_causal):
    inputs = [x.requires_grad_() for x in make(*shape)]
    out = ops.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    exact = reference.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    torch.testing.assert_close(out, exact)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(exact.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_sees_no_key_gives_zero(kind):
    q, k, v = (x.requires_grad_() for x in make(1, 2, 70, 200, 16))
    mask = torch.ones(70, 200, dtype=torch.bool)
    mask[5], mask[69], mask[7, 60:] = False, False, False
    if kind == "additive":
        mask = torch.zeros(70, 200, dtype=torch.float64).masked_fill(~mask, -math.inf)
    out = ops.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(out[:, :, [5, 69]], torch.zeros(1, 2, 2, 16, dtype=torch.float64))
    exact = reference.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, exact)
    grad = draw(1, 2, 70, 16, seed=8)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(exact, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_keys_masked_in_the_first_block_only():
    # The running maximum stays -inf through a whole block of keys.
    mask = torch.zeros(40, 300, dtype=torch.bool)
    mask[:, 290:] = True
    compare(make(1, 1, 40, 300, 16, dtype=torch.float32), mask)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pattern", ["window", "documents", "padding", "holes", "few queries"])
def test_masks_that_hide_whole_blocks(pattern, is_causal):
    queries, keys = (4, 1300) if pattern == "few queries" else (300, 700)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    mask = {
        "window": (j - i).abs() < 40,
        "documents": i // 90 == j // 90,
        "padding": (j < 333).expand(queries, keys),
        "holes": (j // 64 % 3 == 0) & (i % 7 > 0),
        "few queries": (j > 1250) & (i > 0),
    }[pattern]
    inputs = make(1, 2, queries, keys, 16)
    leaves = [x.clone().requires_grad_() for x in inputs]
    doubles = [x.clone().requires_grad_() for x in inputs]
    ours = ops.scaled_dot_product_attention(*leaves, mask, is_causal=is_causal)
    exact = reference.scaled_dot_product_attention(*doubles, mask, is_causal=is_causal)
    torch.testing.assert_close(ours, exact)
    grad = draw(1, 2, queries, 16, seed=8)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(exact, doubles, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [1, 20])
def test_infinite_inputs(queries):
    for value in (math.inf, -math.inf):
        q, k, v = make(1, 1, queries, 200, 8, dtype=torch.float32)
        k[0, 0, 150, 3] = value
        ours, torchs = ops.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores(size):
    # At 1e4 the softmax is one-hot: what counts is no NaN and no overflow.
    q, k, v = make(1, 2, 40, 150, 16, dtype=torch.float32)
    compare((q * size, k, v), is_causal=True)


@pytest.mark.parametrize("queries", [4, 20])
def test_nan_in_nan_out(queries):
    q, k, v = make(1, 1, queries, 200, 8, dtype=torch.float32)
    k[0, 0, 150, 3] = math.nan
    ours, torchs = ops.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.isnan().all()
    assert torchs.isnan().all()
    q, k, v = make(1, 1, queries, 200, 8, dtype=torch.float32)
    q[0, 0, 3, 0] = math.nan
    ours = ops.scaled_dot_product_attention(q, k, v)
    assert torch.equal(ours.isnan(), F.scaled_dot_product_attention(q, k, v).isnan())


def test_causal_outputs_do_not_see_later_keys():
    q, k, v = make(1, 2, 100, 100, 16)
    before = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    k[:, :, 60:], v[:, :, 60:] = 3.0, -7.0
    after = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


@pytest.mark.parametrize("shape", [(3, 2, 90, 90, 16), (1, 1, 1100, 1100, 8), (1, 2, 3, 2100, 8)], ids=str)
def test_bits_do_not_depend_on_threads(shape):
    inputs = [x.float() for x in make(*shape)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = ops.scaled_dot_product_attention(*leaves, is_causal=shape[2] == shape[3])
            results.append([out, *torch.autograd.grad((out * out).sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_linear_in_the_sequence():
    # 60,000 x 60,000 scores would take 14 GB. Few queries keep the time short.
    q, k, v = draw(1, 1, 16, 8).float(), draw(1, 1, 60_000, 8).float(), draw(1, 1, 60_000, 8).float()
    ours = ops.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_heads_come_out_ready_to_be_joined():
    q, k, v = make(2, 4, 10, 10, 8)
    joined = ops.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert joined.is_contiguous()


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make(1, 2, 4, 5, 3)]
    mask = draw(4, 5, seed=6)
    assert torch.autograd.gradcheck(lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, mask), inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True), inputs)


def test_double_backward_goes_through_the_reference():
    inputs = [x.requires_grad_() for x in make(1, 2, 3, 3, 2, kv_heads=1)]
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), inputs
    )


def test_opcheck():
    q, k, v = make(2, 2, 5, 6, 4, dtype=torch.float32)
    mask = torch.rand(2, 2, 5, 6) > 0.3
    raw = torch.ops.tinyllm
    torch.library.opcheck(raw.attention_fwd, (q, k, v, mask, False, 0.5))
    torch.library.opcheck(raw.attention_fwd, (q.bfloat16(), k.bfloat16(), v.bfloat16(), None, True, 0.5))
    out, lse = raw.attention_fwd(q, k, v, mask, False, 0.5)
    torch.library.opcheck(raw.attention_bwd, (out, q, k, v, mask, out, lse, False, 0.5))


def test_compile_fullgraph():
    leaves = [x.requires_grad_() for x in make(2, 3, 9, 9, 8, dtype=torch.float32)]

    def f(q, k, v):
        return ops.scaled_dot_product_attention(q * 2, k, v, is_causal=True).transpose(1, 2).reshape(2, 9, 24)

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = make(2, 2, 9, 9, 8, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(Attend(), (q, k, v))
    assert any("attention_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_autocast():
    q, k, v = make(1, 2, 6, 6, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = ops.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == torchs.dtype == torch.bfloat16


class TestDropout:
    """Which weights are dropped is read from an attention whose values are the identity matrix."""

    def factors(self, q, k, p, seed, **arguments):
        """The mask that a call after manual_seed(seed) uses: what its weights are multiplied by."""
        identity = torch.eye(k.size(-2), dtype=k.dtype).expand(*k.shape[:-1], k.size(-2))
        torch.manual_seed(seed)
        dropped = ops.scaled_dot_product_attention(q, k, identity, dropout_p=p, **arguments)
        weights = ops.scaled_dot_product_attention(q, k, identity, **arguments)
        return torch.where(weights > 0, dropped / weights, 0.0)

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_the_fraction_kept_and_the_expectation(self, p):
        q, k, _ = make(2, 4, 130, 257, 8, kv_heads=4)
        factors = self.factors(q, k, p, seed=0)
        kept = factors != 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
        # 267,280 draws: five standard deviations.
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
        # Neither rows, columns nor heads repeat each other.
        assert abs(kept.double().mean((0, 1, 2)) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / 1040)
        assert abs(kept.double().mean(3) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / 257)
        assert not torch.equal(kept[0], kept[1])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"attn_mask": draw(70, 131, seed=4) > -1}], ids=str)
    @pytest.mark.parametrize("shape", [(2, 3, 70, 131, 24), (1, 2, 70, 131, 8)], ids=str)
    def test_parity_with_the_same_mask(self, shape, arguments, dtype):
        q, k, v = make(*shape)
        factors = self.factors(q, k, 0.3, seed=7, **arguments)

        def ours(q, k, v):
            torch.manual_seed(7)
            return ops.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **arguments)

        def exact(q, k, v):
            mask = factors.to(q.dtype)
            return reference.scaled_dot_product_attention(q, k, v, weight_factors=mask, **arguments)

        check_parity(ours, exact, exact, [x.to(dtype) for x in (q, k, v)])
        assert ops.last_backend() == "cpp"

    def test_long_rows_split_over_blocks_and_threads(self):
        q, k, v = make(1, 1, 900, 900, 8, dtype=torch.float32)
        factors = self.factors(q, k, 0.2, seed=3, is_causal=True)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                torch.manual_seed(3)
                out = ops.scaled_dot_product_attention(*leaves, dropout_p=0.2, is_causal=True)
                results.append([out, *torch.autograd.grad((out * out).sum(), leaves)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out = reference.scaled_dot_product_attention(*leaves, is_causal=True, weight_factors=factors)
        for a, b in zip(results[0], [out, *torch.autograd.grad((out * out).sum(), leaves)], strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)

    def test_the_seed_decides(self):
        q, k, v = make(1, 2, 30, 30, 8)
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
        assert not torch.equal(outs[2], ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5))

    def test_everything_dropped(self):
        leaves = [x.requires_grad_() for x in make(1, 2, 30, 40, 8)]
        out = ops.scaled_dot_product_attention(*leaves, dropout_p=1.0)
        for x in (out, *torch.autograd.grad(out.sum(), leaves)):
            assert torch.equal(x, torch.zeros_like(x))

    def test_gradients_of_gradients(self):
        leaves = [x.requires_grad_() for x in make(1, 2, 3, 4, 2, kv_heads=1)]

        def f(q, k, v):
            torch.manual_seed(5)
            return ops.scaled_dot_product_attention(q, k, v, dropout_p=0.4, enable_gqa=True)

        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)

    def test_the_bits_are_philox(self):
        # The known answer for a counter and a key of zeros (Random123's kat_vectors): words 6627e8d5 e169c58d ...
        # belong to the elements 0, 16, 32 and 48.
        rng = torch.zeros(2, dtype=torch.int64)
        for element, word in zip(range(0, 64, 16), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), strict=True):
            for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
                assert (torch.ops.tinyllm.dropout_factors(rng, 1, 64, p)[0, element] > 0) == kept

    def test_the_compiler_and_opcheck(self):
        q, k, v = make(2, 2, 5, 6, 4, dtype=torch.float32)
        rng = torch.tensor([1, 2])
        raw = torch.ops.tinyllm
        torch.library.opcheck(raw.dropout_factors, (rng, 3, 128, 0.5))
        torch.library.opcheck(raw.attention_fwd, (q, k, v, None, False, 0.5, 0.5, rng))
        out, lse = raw.attention_fwd(q, k, v, None, False, 0.5, 0.5, rng)
        torch.library.opcheck(raw.attention_bwd, (out, q, k, v, None, out, lse, False, 0.5, 0.5, rng))
        with pytest.raises((ValueError, RuntimeError), match="dropout needs rng"):
            raw.attention_fwd(q, k, v, None, False, 0.5, 0.5, None)
        compiled = torch.compile(
            lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5), fullgraph=True
        )
        leaves = [x.requires_grad_() for x in (q, k, torch.ones_like(v))]
        torch.manual_seed(0)
        first = compiled(*leaves)
        assert not torch.allclose(first, torch.ones_like(first))
        assert not torch.equal(first, compiled(*leaves))
        torch.manual_seed(0)
        assert torch.equal(first, compiled(*leaves))
        torch.autograd.grad(first.sum(), leaves)


class TestWhereNoKernelServes:
    """The reference takes over; with the kernel forced, the call is refused with the reason."""

    @pytest.fixture(autouse=True)
    def _free_choice(self, monkeypatch):
        monkeypatch.setattr("tinyllm.ops.dispatch._forced", None)

    def test_a_mask_that_wants_a_gradient(self):
        q, k, v = make(1, 2, 6, 6, 8)
        mask = draw(6, 6).requires_grad_()
        assert torch.autograd.gradcheck(lambda m: ops.scaled_dot_product_attention(q, k, v, m), (mask,))
        assert ops.last_backend() == "reference"

    def test_very_wide_heads(self):
        q, k, v = make(1, 1, 3, 3, 1500)
        torch.testing.assert_close(ops.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
        assert ops.last_backend() == "reference"

    def test_other_devices(self):
        q = torch.ones(1, 2, 3, 4, device="meta")
        assert ops.scaled_dot_product_attention(q, q, q).shape == q.shape
        assert ops.last_backend() == "reference"


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"query": torch.ones(2, 3, 5, 8, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
    ({"query": torch.ones(8)}, ValueError, r"query has shape \[8\]"),
    ({"key": torch.ones(2, 3, 6, 7)}, ValueError, "key has head_dim 7"),
    ({"key": torch.ones(2, 3, 6, 8, dtype=torch.float64)}, TypeError, "key has dtype torch.float64"),
    ({"value": torch.ones(2, 3, 7, 8)}, ValueError, "value has length 7"),
    ({"value": torch.ones(2, 3, 6, 8, device="meta")}, ValueError, "value is on meta"),
    ({"key": torch.ones(2, 2, 6, 8), "value": torch.ones(2, 2, 6, 8)}, ValueError, "leading dimensions"),
    ({"key": torch.ones(2, 2, 6, 8), "value": torch.ones(2, 2, 6, 8), "enable_gqa": True}, ValueError, "key has 2 "),
    ({"attn_mask": torch.ones(5, 5)}, ValueError, r"attn_mask has shape \[5, 5\]"),
    ({"attn_mask": torch.ones(5, 6, dtype=torch.int32)}, TypeError, "attn_mask has dtype torch.int32"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
])  # fmt: skip
def test_bad_input(change, error, says):
    arguments = {"query": torch.ones(2, 3, 5, 8), "key": torch.ones(2, 3, 6, 8), "value": torch.ones(2, 3, 6, 8)}
    with pytest.raises(error, match=says):
        ops.scaled_dot_product_attention(**(arguments | change))


def test_a_raw_call_with_bad_shapes_is_refused():
    q, k, v = make(1, 2, 3, 4, 8, dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="value has shape"):
        torch.ops.tinyllm.attention_fwd(q, k, v[:, :, :2], None, False, 1.0)
    out, lse = torch.ops.tinyllm.attention_fwd(q, k, v, None, False, 1.0)
    with pytest.raises((ValueError, RuntimeError), match="lse has shape"):
        torch.ops.tinyllm.attention_bwd(out, q, k, v, None, out, lse[:, :, :2], False, 1.0)
