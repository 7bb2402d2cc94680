import math

import pytest
import torch
import torch.nn.functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

import tinyllm.kernels.attention as launchers
from tests.gpu.device import DEVICE, ON_GPU, draw
from tests.ops.parity import check_parity
from tinyllm import ops, reference
from tinyllm.kernels.attention import configs
from tinyllm.kernels.launch import capability

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# B, H, T, S, D. Heads that are no power of two, wider than a tile, and rows that are no multiple of 16 bytes apart;
# few queries and many keys; more and fewer keys than queries.
SHAPES = [
    (1, 1, 1, 1, 1), (2, 3, 7, 7, 5), (1, 2, 64, 64, 32), (2, 1, 65, 131, 17), (1, 2, 129, 40, 64),
    (1, 1, 40, 257, 128), (1, 1, 33, 70, 160), (1, 1, 9, 11, 300), (3, 2, 1, 300, 16), (1, 1, 20, 35, 520),
]  # fmt: skip


def make(b, h, t, s, d, dtype=torch.float32, kv_heads=None, value_dim=None):
    kv_heads = h if kv_heads is None else kv_heads
    return (
        draw(b, h, t, d, dtype=dtype, seed=1),
        draw(b, kv_heads, s, d, dtype=dtype, seed=2),
        draw(b, kv_heads, s, value_dim or d, dtype=dtype, seed=3),
    )


def exact(q, k, v, mask=None, **arguments):
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    return reference.scaled_dot_product_attention(q, k, v, mask, **arguments)


def compare(inputs, mask=None, is_causal=False, largest_score=16, **arguments):
    """Ours against PyTorch's function and the reference, outputs and gradients.

    largest_score: about, in base 2: half its last bit is the error of the weights that follow from it.
    """
    torch_mask, torch_causal = mask, is_causal
    if is_causal and mask is not None:  # PyTorch's takes one or the other
        corner = torch.ones(inputs[0].size(-2), inputs[1].size(-2), dtype=torch.bool, device=DEVICE).tril()
        torch_mask = mask & corner if mask.dtype == torch.bool else mask.masked_fill(~corner, -math.inf)
        torch_causal = False
    float32 = inputs[0].dtype == torch.float32
    # float32 multiplies as three products of tf32 on a GPU, which keep 22 bits and not 24: a score's error may be two
    # steps of the largest one, and is in every weight.
    lost = math.ceil(2 * largest_score * math.log(2)) if ON_GPU and float32 else 0
    check_parity(
        lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, **arguments),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch_mask, is_causal=torch_causal, **arguments),
        lambda q, k, v: exact(q, k, v, mask, is_causal=is_causal, **arguments),
        inputs,
        # The saved log-sum-exp is a number of up to 16 in base 2: half its last bit, times ln 2, is 5 steps of the
        # weights that follow from it. PyTorch's own kernels for CPUs, the measure without a GPU, keep more.
        steps=lost + (math.ceil(6 * largest_score / 16) if float32 else 2),
        output_steps=lost + 2,
    )
    assert ops.last_backend() == "triton"


def assert_close_to_reference(inputs, mask=None, seed=8, **arguments):
    """Outputs and gradients against the reference in float64, for calls that PyTorch answers otherwise."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    ours = ops.scaled_dot_product_attention(*leaves, mask, **arguments)
    lengths = arguments.pop("key_lengths", None)
    if lengths is not None:
        visible = torch.arange(inputs[1].size(-2), device=DEVICE) < lengths[:, None, None, None]
        mask = visible if mask is None else mask & visible
    theirs = exact(*doubles, mask, **arguments)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)
    grad = draw(*ours.shape, seed=seed)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, doubles, grad.double()), strict=True
    ):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-5)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, is_causal, dtype):
    compare(make(*shape, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask_shape", [(2, 2, 40, 75), (40, 75), (2, 1, 1, 75)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(kind, mask_shape, is_causal, dtype):
    numbers = draw(*mask_shape, seed=4)
    # At least the first key stays visible to every query: rows with none are tested by themselves.
    mask = (numbers > -1) if kind == "bool" else numbers.to(dtype)
    if kind == "bool":
        mask[..., 0] = True
    compare(make(2, 2, 40, 75, 24, dtype=dtype), mask, is_causal)


EVERY_TILE = [
    pytest.param(
        kernel, element_size, width, chips, busy, tile,
        id=f"{kernel}-{width}-{chips}-{'busy' if busy else 'plain'}-{tile[:]}",
    )
    for (kernel, element_size, width, chips), lists in configs.TILES.items()
    for busy, tiles in enumerate(lists)
    for tile in dict.fromkeys(tiles)
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "element_size", "width", "chips", "busy", "tile"), EVERY_TILE)
def test_every_tile(kernel, element_size, width, chips, busy, tile, monkeypatch):
    # Also those that only tuning chooses. Rows of tensors that descriptors can stand for are multiples of 16 bytes.
    descriptors, chip = chips != configs.POINTERS, capability(torch.empty(0, device=DEVICE))
    if descriptors and chip < (9, 0):
        pytest.skip("tensor descriptors are for 9.0 and later")
    size = (width or 264) - (0 if descriptors else 3)
    widths = configs.widths(kernel, size, size, element_size)
    if not configs.fits(kernel, widths, element_size, tile, bool(busy), chip):
        pytest.skip("this chip has less shared memory")
    chosen, sources, used = configs.tiles, launchers._Call.sources, []
    monkeypatch.setattr(configs, "tiles", lambda name, *rest: [tile] if name == kernel else chosen(name, *rest))
    monkeypatch.setattr(launchers._Call, "sources", lambda *a: used.append(sources(*a)) or used[-1])
    dtype = torch.float32 if element_size == 4 else torch.bfloat16
    queries, keys = tile.rows + 5, tile.columns + 7
    mask = draw(queries, keys, seed=4) > -1 if busy else None
    if busy:
        mask[:, 0] = True
    compare(make(1, 1, max(queries, 17), keys, size, dtype=dtype), mask, is_causal=True)
    assert all(isinstance(source, TensorDescriptor) == descriptors for source in used[0])


def test_descriptors_and_pointers_both_serve(monkeypatch):
    used = []
    sources = launchers._Call.sources
    monkeypatch.setattr(launchers._Call, "sources", lambda *a: used.append(sources(*a)) or used[-1])
    inputs = make(1, 2, 40, 50, 32, dtype=torch.bfloat16)
    out = ops.scaled_dot_product_attention(*inputs)
    assert all(isinstance(source, TensorDescriptor) for source in used[-1])
    # Rows one element further apart: no multiple of 16 bytes.
    apart = [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in inputs]
    torch.testing.assert_close(ops.scaled_dot_product_attention(*apart), out)
    assert all(isinstance(source, torch.Tensor) for source in used[-1])


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("queries", [3, 66])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(kv_heads, queries, is_causal):
    compare(make(2, 4, queries, 66, 16, kv_heads=kv_heads), is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_of_grouped_heads(dtype, kind):
    mask = None if kind == "none" else draw(2, 6, 2, 300, seed=4)
    mask = mask > -1 if kind == "bool" else mask if mask is None else mask.to(dtype)
    compare(make(2, 6, 2, 300, 24, dtype=dtype, kv_heads=2, value_dim=40), mask, enable_gqa=True)


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
def test_key_lengths(queries, is_causal, with_mask):
    inputs = make(4, 1, queries, 160, 16)
    mask = draw(4, 1, queries, 160, seed=5) > -1 if with_mask else None
    lengths = torch.tensor([160, 1, 0, 90], device=DEVICE)
    out = assert_close_to_reference(inputs, mask, is_causal=is_causal, key_lengths=lengths)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    # Beyond the tensor is not beyond the memory.
    over = ops.scaled_dot_product_attention(*inputs, key_lengths=torch.full((4,), 1000, device=DEVICE))
    assert torch.equal(over, ops.scaled_dot_product_attention(*inputs))
    assert torch.equal(
        ops.scaled_dot_product_attention(*inputs, key_lengths=torch.full((4,), -5, device=DEVICE, dtype=torch.int32)),
        torch.zeros_like(over),
    )


@pytest.mark.parametrize("queries", [1, 50])
def test_key_lengths_with_gaps_between_them(queries):
    table = torch.tensor([[160, 3], [1, 5], [0, 7], [90, 9]], device=DEVICE)
    assert_close_to_reference(make(4, 1, queries, 160, 16), None, key_lengths=table[:, 0])


@pytest.mark.parametrize("scale", [0.25, 0.0, -0.5])
@pytest.mark.parametrize("queries", [2, 50])
def test_value_dim_differs_from_head_dim_and_scale(scale, queries):
    compare(make(2, 2, queries, 60, 24, value_dim=40), scale=scale)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 2, 3, 5, 8)], ids=str)
def test_any_number_of_leading_dimensions(shape):
    mask = draw(5, 5, seed=9)
    compare([draw(*shape, seed=i) for i in range(3)], mask, is_causal=True)


def test_leading_dimensions_broadcast():
    compare([draw(4, 3, 5, 8, seed=1), draw(1, 3, 6, 8, seed=2), draw(3, 6, 8, seed=3)])


@pytest.mark.parametrize("view", [
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: x[:, :, ::2], lambda x: x[:1].expand(3, -1, -1, -1), lambda x: x.flip(2),
])  # fmt: skip
def test_any_strides(view):
    compare([view(x) for x in make(3, 2, 48, 48, 16)], is_causal=True)


def test_an_expanded_gradient_and_one_tensor_in_three_roles():
    x = draw(2, 2, 19, 8).requires_grad_()
    (ours,) = torch.autograd.grad(ops.scaled_dot_product_attention(x, x, x).sum(), x)
    (theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4, 8), (2, 0, 4, 4, 8), (2, 2, 0, 4, 8), (2, 2, 4, 0, 8), (2, 2, 4, 4, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(shape, is_causal):
    inputs = [x.requires_grad_() for x in make(*shape)]
    out = ops.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    theirs = reference.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    torch.testing.assert_close(out, theirs)
    for a, b in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("queries", [4, 70])
def test_a_query_that_sees_no_key_gives_zero(kind, queries):
    mask = torch.ones(queries, 120, dtype=torch.bool, device=DEVICE)
    mask[2], mask[queries - 1], mask[1, 60:], mask[0, :100] = False, False, False, False
    if kind == "additive":
        mask = torch.zeros(queries, 120, device=DEVICE).masked_fill(~mask, -math.inf)
    out = assert_close_to_reference(make(1, 1, queries, 120, 16), mask)
    assert torch.equal(out[:, :, [2, queries - 1]], torch.zeros_like(out[:, :, :2]))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pattern", ["window", "documents", "padding", "holes", "few queries"])
def test_masks_that_hide_whole_blocks(pattern, is_causal):
    queries, keys = (4, 400) if pattern == "few queries" else (100, 170)
    i, j = torch.arange(queries, device=DEVICE)[:, None], torch.arange(keys, device=DEVICE)
    mask = {
        "window": (j - i).abs() < 40,
        "documents": i // 60 == j // 60,
        "padding": (j < 133).expand(queries, keys),
        "holes": (j // 64 % 3 == 0) & (i % 7 > 0),
        "few queries": (j > 350) & (i > 0),
    }[pattern]
    assert_close_to_reference(make(1, 2, queries, keys, 16), mask, is_causal=is_causal)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of 0 times infinity
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_and_nan_inputs(queries, value):
    q, k, v = make(1, 1, queries, 200, 8)
    k[0, 0, 150, 3] = value
    ours, torchs = ops.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores(size):
    # At 1e4 the softmax is one-hot: what counts is no NaN and no overflow.
    q, k, v = make(1, 2, 40, 150, 16)
    largest = float((q @ k.transpose(-1, -2)).abs().max()) * size / 4 * math.log2(math.e)
    compare((q * size, k, v), is_causal=True, largest_score=largest)


def test_causal_outputs_do_not_see_later_keys():
    q, k, v = make(1, 2, 100, 100, 16)
    before = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    k[:, :, 60:], v[:, :, 60:] = 3.0, -7.0
    after = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


@pytest.mark.parametrize("queries", [1, 150])
def test_the_same_bits_each_time(queries):
    inputs = [x.requires_grad_() for x in make(1, 4, queries, 200, 16, kv_heads=2, dtype=torch.bfloat16)]
    results = []
    for _ in range(2):
        out = ops.scaled_dot_product_attention(*inputs, enable_gqa=True)
        results.append([out, *torch.autograd.grad((out * out).sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_heads_come_out_ready_to_be_joined():
    q, k, v = make(2, 4, 20, 20, 8)
    assert ops.scaled_dot_product_attention(q, k, v).transpose(1, 2).is_contiguous()
    leaf = q.requires_grad_()
    (grad,) = torch.autograd.grad(ops.scaled_dot_product_attention(leaf, k, v).sum(), leaf)
    assert grad.transpose(1, 2).is_contiguous()


def test_double_backward_goes_through_the_reference():
    inputs = [x.requires_grad_() for x in make(1, 2, 3, 3, 4, kv_heads=1)]
    lengths = torch.tensor([2], device=DEVICE)

    def second(function, leaves, **arguments):
        out = function(*leaves, is_causal=True, enable_gqa=True, **arguments)
        first = torch.autograd.grad(out.pow(2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    mask = (torch.arange(3, device=DEVICE) < 2).expand(3, 3)
    ours = second(ops.scaled_dot_product_attention, inputs, key_lengths=lengths)
    theirs = second(reference.scaled_dot_product_attention, inputs, attn_mask=mask)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    q, k, v = make(2, 2, 25, 6, 4)
    mask = draw(2, 2, 25, 6) > -0.5
    lengths = torch.tensor([3, 6], device=DEVICE)
    raw = torch.ops.tinyllm_triton
    torch.library.opcheck(raw.attention_fwd, (q, k, v, mask, False, 0.5, 0.0, None, lengths))
    torch.library.opcheck(raw.attention_fwd, (q[:, :, :2].bfloat16(), k.bfloat16(), v.bfloat16(), None, True, 0.5))
    out, lse = raw.attention_fwd(q, k, v, mask, False, 0.5)
    torch.library.opcheck(raw.attention_bwd, (out, q, k, v, mask, out, lse, False, 0.5))


def test_compile_fullgraph():
    leaves = [x.requires_grad_() for x in make(2, 3, 19, 19, 8)]
    lengths = torch.tensor([19, 7], device=DEVICE)

    def f(q, k, v):
        out = ops.scaled_dot_product_attention(q * 2, k, v, is_causal=True, key_lengths=lengths)
        return out.transpose(1, 2).reshape(2, 19, 24)

    eager = f(*leaves)
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    q, k, v = make(1, 2, 6, 6, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, torchs = ops.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == torchs.dtype == torch.bfloat16


def test_double_precision_is_not_served():
    with pytest.raises(RuntimeError, match=r"triton: no kernel for torch.float64.*reference: can serve it"):
        ops.scaled_dot_product_attention(*make(1, 1, 4, 4, 8, dtype=torch.float64))


class TestDropout:
    """Which weights are dropped is read from an attention whose values are the identity matrix."""

    def factors(self, q, k, p, seed, **arguments):
        """The mask that a call after manual_seed(seed) uses: what its weights are multiplied by."""
        identity = torch.eye(k.size(-2), dtype=k.dtype, device=DEVICE).expand(*k.shape[:-1], k.size(-2))
        torch.manual_seed(seed)
        dropped = ops.scaled_dot_product_attention(q, k, identity, dropout_p=p, **arguments)
        weights = ops.scaled_dot_product_attention(q, k, identity, **arguments)
        return torch.where(weights > 0, dropped / weights, 0.0)

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_the_fraction_kept_and_the_expectation(self, p):
        q, k, _ = make(2, 2, 100, 150, 8)
        factors = self.factors(q, k, p, seed=0)
        kept = factors != 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)), atol=1e-5, rtol=1e-4)
        # 60,000 draws: five standard deviations.
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
        # Neither rows nor heads repeat each other.
        assert not torch.equal(kept[0, 0, 0], kept[0, 0, 1])
        assert not torch.equal(kept[0, 0], kept[0, 1])
        assert not torch.equal(kept[0], kept[1])

    def test_a_seed_repeats_it_and_another_does_not(self):
        q, k, _ = make(1, 2, 40, 50, 8)
        first, again, other = (self.factors(q, k, 0.5, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("p", [0.0, 1.0])
    def test_the_ends(self, p):
        inputs = make(1, 2, 20, 30, 8)
        out = ops.scaled_dot_product_attention(*inputs, dropout_p=p)
        plain = ops.scaled_dot_product_attention(*inputs)
        assert torch.equal(out, plain if p == 0.0 else torch.zeros_like(plain))

    @pytest.mark.parametrize("queries", [2, 70])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_backward_and_double_backward_use_forwards_mask(self, queries, is_causal):
        inputs = [x.requires_grad_() for x in make(2, 4, queries, 90, 8, kv_heads=2)]
        factors = self.factors(*(x.detach() for x in inputs[:2]), 0.3, 7, is_causal=is_causal, enable_gqa=True)
        torch.manual_seed(7)
        ours = ops.scaled_dot_product_attention(*inputs, dropout_p=0.3, is_causal=is_causal, enable_gqa=True)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        theirs = exact(
            *doubles, is_causal=is_causal, enable_gqa=True, weight_factors=torch.where(factors > 0, 1 / 0.7, 0.0)
        )
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)
        grad = draw(*ours.shape, seed=8)
        firsts = torch.autograd.grad(theirs, doubles, grad.double())
        for a, b in zip(torch.autograd.grad(ours, inputs, grad, retain_graph=True), firsts, strict=True):
            torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(ours, inputs, grad, create_graph=True), firsts, strict=True):
            torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("lengths", "error", "says"), [
    (torch.tensor([1.0, 2.0]), TypeError, "key_lengths has dtype torch.float32"),
    (torch.tensor([1, 2, 3]), ValueError, r"key_lengths has shape \[3\]"),
    (torch.tensor([1, 2], device="meta"), ValueError, "key_lengths is on meta"),
])  # fmt: skip
def test_bad_key_lengths(lengths, error, says):
    lengths = lengths if lengths.is_meta else lengths.to(DEVICE)
    with pytest.raises(error, match=says):
        ops.scaled_dot_product_attention(*make(2, 2, 4, 4, 8), key_lengths=lengths)
