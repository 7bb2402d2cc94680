import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.attention import (
    BF16,
    CUDA_80,
    F16,
    F32,
    F64,
    WIDEST,
    assert_close_to_reference,
    attention,
    compare,
    draw_mask,
    exact,
    full_and_causal,
    make,
    on_cuda,
)  # fmt: skip
from tests.helpers.backends import BACKENDS, cases, on
from tests.ops.parity import (
    DTYPES,
    assert_accurate,
    assert_equal,
    assert_same_bits,
    outputs_and_gradients,
    second_gradients,
)  # fmt: skip
from tinyllm import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of 0 times infinity

# B, H, T, S, D
SHAPES = {
    "cpp": [
        (1, 1, 1, 1, 1), (2, 3, 7, 7, 5), (1, 2, 64, 64, 32), (2, 1, 65, 131, 17), (1, 2, 129, 40, 64),
        (1, 1, 200, 257, 128), (1, 1, 33, 70, 160), (1, 1, 9, 11, 1024), (3, 2, 1, 300, 16),
        (1, 1, 70, 1031, 7), (1, 2, 3, 1100, 24), (2, 1, 1, 1025, 67), (1, 1, 8, 70, 1024),
        (1, 1, 131, 600, 130),
    ],
    # Heads that are no power of two, wider than a tile, and rows that are no multiple of 16 bytes apart; few queries
    # and many keys; more and fewer keys than queries.
    "triton": [
        (1, 1, 1, 1, 1), (2, 3, 7, 7, 5), (1, 2, 64, 64, 32), (2, 1, 65, 131, 17), (1, 2, 129, 40, 64),
        (1, 1, 40, 257, 128), (1, 1, 33, 70, 160), (1, 1, 9, 11, 300), (3, 2, 1, 300, 16), (1, 1, 20, 35, 520),
    ],
    # A row; parts of tiles; whole ones; one more; several blocks of queries, of keys, of both; enough tiles to go
    # around the rings.
    "cuda": [
        (1, 1, 1, 1, 64), (2, 2, 15, 15, 128), (1, 1, 64, 64, 64), (1, 1, 65, 129, 128), (1, 2, 130, 40, 64),
        (1, 1, 129, 200, 128), (1, 1, 33, 400, 64), (1, 1, 257, 20, 128),
    ],
}  # fmt: skip


@full_and_causal
@cases(
    "shape dtype",
    cpp=product(SHAPES["cpp"], DTYPES),
    triton=product(SHAPES["triton"], DTYPES[1:]),
    **on_cuda([*product(SHAPES["cuda"], [BF16]), ((1, 1, 129, 131, 64), F16), ((1, 1, 129, 131, 128), F16)]),
)
def test_parity(backend, shape, is_causal, dtype):
    compare(backend, make(backend, *shape, dtype=dtype), is_causal=is_causal)


@pytest.mark.any_build
def test_the_reference_is_pytorchs_attention():
    cpp = BACKENDS["cpp"]
    q, k, v = make(cpp, 2, 4, 9, 13, 8)
    for arguments in ({}, {"is_causal": True}, {"attn_mask": cpp.draw(9, 13, dtype=F64)}, {"scale": 0.3}):
        torch.testing.assert_close(
            reference.scaled_dot_product_attention(q, k, v, **arguments),
            F.scaled_dot_product_attention(q, k, v, **arguments),
        )


@cases(
    "shape is_causal dtype",
    cpp=product([(2, 4, 66, 66, 16)], [False, True], [F32]),
    triton=product([(2, 4, 3, 66, 16), (2, 4, 66, 66, 16)], [False, True], [F32]),
    **on_cuda([((1, 4, 20, 66, 64), False, BF16), ((1, 4, 70, 66, 64), True, BF16)]),
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(backend, shape, kv_heads, is_causal, dtype):
    compare(backend, make(backend, *shape, dtype, kv_heads), is_causal=is_causal, enable_gqa=True)


@cases("queries scale", cpp=product([2, 50], [0.25]), triton=product([2, 50], [0.25, 0.0, -0.5]))
def test_value_dim_differs_from_head_dim_and_scale(backend, queries, scale):
    compare(backend, make(backend, 2, 2, queries, 60, 24, F32, value_dim=40), scale=scale)


@on("cpp", "triton")
@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)], ids=str)
def test_any_number_of_leading_dimensions(backend, shape):
    compare(backend, [backend.draw(*shape, seed=i) for i in range(3)], backend.draw(5, 5, seed=9), is_causal=True)


@on("cpp", "triton")
def test_leading_dimensions_broadcast(backend):
    shapes = (4, 3, 5, 8), (1, 3, 6, 8), (3, 6, 8)
    compare(backend, [backend.draw(*shape, dtype=WIDEST[backend.name], seed=i) for i, shape in enumerate(shapes)])


def within(x, columns_apart=0, offset=0):
    """Return x over memory where rows are further apart, or begin elsewhere."""
    wide = torch.zeros(*x.shape[:-1], x.size(-1) + columns_apart, dtype=x.dtype, device=x.device)
    flat = torch.zeros(wide.numel() + offset, dtype=x.dtype, device=x.device)[offset:]
    return flat.view(wide.shape)[..., : x.size(-1)].copy_(x)


VIEWS = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other row": lambda x: within(x.repeat_interleave(2, 2))[:, :, ::2],
    "columns apart": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(x.size(0), -1, -1, -1),
    "rows apart by 8": lambda x: within(x, 8),
    "rows apart by 1": lambda x: within(x, 1),
    "misaligned": lambda x: within(x, 0, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@cases(
    "shape is_causal",
    cpp=[((3, 2, 18, 18, 12), True)],
    triton=[((3, 2, 48, 48, 16), True)],
    **on_cuda([((2, 2, 4, 33, 64), False), ((2, 2, 18, 33, 64), False)]),
)
def test_any_strides(backend, view, shape, is_causal):
    """Memory between the elements, of the gradient too, is not read."""
    inputs = [view(x) for x in make(backend, *shape)]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
    grad = view(backend.draw(*shape[:3], shape[-1], dtype=inputs[0].dtype, seed=5))
    f = lambda q, k, v: attention(q, k, v, is_causal=is_causal)  # noqa: E731
    found = outputs_and_gradients(f, *inputs, grads=[grad])
    expected = outputs_and_gradients(f, *plain, grads=[grad.contiguous()])
    # Hopper's own kernels do not take one row that stands for many, so that two kernels may serve.
    if backend.name == "cuda" and view is not VIEWS["expanded"]:
        assert_equal(found, expected)
    doubles = outputs_and_gradients(
        lambda *x: exact(*x, is_causal=is_causal), *(x.double() for x in plain), grads=[grad.double()]
    )
    for i, (a, b, c) in enumerate(zip(found, expected, doubles, strict=True)):
        assert_accurate(f"{i}", a, b, c)


@cases("shape", cpp=[(2, 2, 9, 8)], triton=[(2, 2, 19, 8)], **on_cuda([(1, 2, 40, 64)]))
def test_an_expanded_gradient_and_one_tensor_in_three_roles(backend, shape):
    x = backend.draw(*shape, dtype=WIDEST[backend.name]).requires_grad_()
    (ours,) = torch.autograd.grad(attention(x, x, x).sum(), x)
    double = x.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(exact(double, double, double).sum(), double)
    tolerance = {F64: 1e-7, F32: 1e-5, BF16: 0.03}[x.dtype]
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


EMPTY = [(0, 2, 4, 4, 8), (2, 0, 4, 4, 8), (2, 2, 0, 4, 8), (2, 2, 4, 0, 8), (2, 2, 4, 4, 0)]


@cases("shape", cpp=EMPTY, triton=EMPTY, **on_cuda([*((*shape[:4], 64) for shape in EMPTY[:4]), (1, 1, 70, 0, 128)]))
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(backend, shape, is_causal):
    out = assert_close_to_reference(backend, make(backend, *shape), is_causal=is_causal)
    assert torch.equal(out, torch.zeros_like(out))


@cases("shape dtype", cpp=[((200, 8), F32)], triton=[((200, 8), F32)], **on_cuda([((100, 64), BF16)]))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("queries", [1, 4, 20])
def test_infinite_and_nan_inputs(backend, queries, value, shape, dtype):
    q, k, v = make(backend, 1, 1, queries, *shape, dtype)
    k[0, 0, 80, 3] = value
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == F32 else {"atol": 0.02, "rtol": 0.02}
    # Not in 16 bits: there PyTorch's own loses some.
    theirs = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attention(q, k, v).double(), theirs, equal_nan=True, **tolerance)


@on("cpp", "triton")
@pytest.mark.parametrize("queries", [4, 20])
def test_nan_stays_in_its_query(backend, queries):
    q, k, v = make(backend, 1, 1, queries, 200, 8, F32)
    q[0, 0, 3, 0] = math.nan
    assert torch.equal(attention(q, k, v).isnan(), F.scaled_dot_product_attention(q, k, v).isnan())


@cases("shape dtype", cpp=[((1, 2, 40, 150, 16), F32)], triton=[((1, 2, 40, 150, 16), F32)],
       **on_cuda([((1, 1, 40, 150, 64), BF16)]))  # fmt: skip
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores(backend, size, shape, dtype):
    # At 1e4 the softmax is one-hot: what counts is no NaN and no overflow.
    q, k, v = make(backend, *shape, dtype)
    largest = float((q @ k.mT).abs().max()) * size * shape[-1] ** -0.5 * math.log2(math.e)
    compare(backend, (q * size, k, v), is_causal=True, largest_score=largest)


@cases("shape", cpp=[(1, 2, 100, 100, 16)], triton=[(1, 2, 100, 100, 16)], **on_cuda([(1, 1, 100, 100, 128)]))
def test_causal_outputs_do_not_see_later_keys(backend, shape):
    q, k, v = make(backend, *shape)
    before = attention(q, k, v, is_causal=True)
    k[:, :, 60:], v[:, :, 60:] = 3.0, -7.0
    after = attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


@cases(
    "shape kv_heads is_causal dtype",
    cpp=[
        ((3, 2, 90, 90, 16), 2, True, F32), ((1, 1, 1100, 1100, 8), 1, True, F32), ((1, 2, 3, 2100, 8), 2, False, F32),
        *(
            ((1, heads, 700, 700, head_dim), kv_heads, is_causal, dtype)
            for heads, kv_heads, head_dim in ((1, 1, 64), (1, 1, 136), (4, 2, 20), (40, 40, 16))
            for is_causal in (False, True)
            for dtype in (F32, BF16)
        ),
    ],
    triton=[((1, 4, queries, 200, 16), 2, False, BF16) for queries in (1, 150)],
    **on_cuda(((1, 2, queries, 200, 64), 1, False, BF16) for queries in (1, 140)),
)  # fmt: skip
def test_the_same_bits_each_time(backend, shape, kv_heads, is_causal, dtype):
    inputs = make(backend, *shape, dtype, kv_heads)
    assert_same_bits(
        backend.threads,
        lambda: outputs_and_gradients(lambda *x: attention(*x, is_causal=is_causal, enable_gqa=True), *inputs),
    )


@on("cpp")
def test_the_same_bits_before_a_value_that_is_not_finite(backend):
    # With more threads, fewer queries are computed beside those that see it.
    query, key, value = make(backend, 1, 1, 4096, 4096, 16, F32)
    value[:, :, 3000, 3] = math.inf
    assert_same_bits(backend.threads, lambda: [attention(query, key, value, is_causal=True)[:, :, :3000]])


@on("cpp")
def test_memory_is_linear_in_the_sequence(backend):
    # 60,000 x 60,000 scores would take 14 GB. Few queries keep the time short.
    q, k, v = make(backend, 1, 1, 16, 60_000, 8, F32)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)


@cases("shape", cpp=[(2, 4, 20, 20, 8)], triton=[(2, 4, 20, 20, 8)], **on_cuda([(2, 4, 20, 20, 64)]))
def test_heads_come_out_ready_to_be_joined(backend, shape):
    found = outputs_and_gradients(lambda *x: attention(*x, enable_gqa=True), *make(backend, *shape, kv_heads=2))
    # The C++ kernels' gradients of grouped heads are made from those of each head.
    assert all(x.transpose(1, 2).is_contiguous() for x in found[: 1 if backend.name == "cpp" else None])


@on("cpp")
def test_gradcheck(backend):
    inputs = [x.requires_grad_() for x in make(backend, 1, 2, 4, 5, 3)]
    mask = backend.draw(4, 5, dtype=F64, seed=6)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask), inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, is_causal=True), inputs)
    inputs = [x.requires_grad_() for x in make(backend, 1, 2, 3, 3, 2, kv_heads=1)]
    assert torch.autograd.gradgradcheck(lambda q, k, v: attention(q, k, v, is_causal=True, enable_gqa=True), inputs)


@on("cpp", "triton")
def test_double_backward_goes_through_the_reference(backend):
    inputs, options = make(backend, 1, 2, 3, 3, 4, kv_heads=1), {"is_causal": True, "enable_gqa": True}
    lengths = backend.tensor([2])
    ours = second_gradients(lambda *x: attention(*x, key_lengths=lengths, **options), *inputs)
    torch.testing.assert_close(ours, second_gradients(lambda *x: exact(*x, key_lengths=lengths, **options), *inputs))


@cases("shape kind", cpp=[((2, 2, 5, 6, 4), "bool")], triton=[((2, 2, 25, 6, 4), "bool")],
       **{CUDA_80: [((2, 2, 25, 30, 64), "none")]})  # fmt: skip
def test_opcheck(backend, shape, kind):
    q, k, v = make(backend, *shape, BF16 if backend.name == "cuda" else F32)
    mask = draw_mask(backend, kind, *shape[:4])
    forward, backward = backend.raw.attention_fwd, backend.raw.attention_bwd
    torch.library.opcheck(forward, (q, k, v, mask, False, 0.5, 0.0, None, backend.tensor([3, shape[3]])))
    torch.library.opcheck(forward, (q[:, :, :2].bfloat16(), k.bfloat16(), v.bfloat16(), None, True, 0.5))
    out, lse = forward(q, k, v, mask, True, 0.5)
    torch.library.opcheck(backward, (out, q, k, v, mask, out, lse, True, 0.5))


@cases("shape dtype", cpp=[((2, 3, 19, 19, 8), F32)], triton=[((2, 3, 19, 19, 8), F32)],
       **on_cuda([((2, 2, 19, 19, 64), BF16)]))  # fmt: skip
def test_compile_fullgraph(backend, shape, dtype):
    lengths = backend.tensor([19, 7])

    def f(q, k, v):
        out = attention(q * 2, k, v, is_causal=True, key_lengths=lengths)
        return out.transpose(1, 2).reshape(2, 19, -1)

    inputs = make(backend, *shape, dtype)
    torch.testing.assert_close(outputs_and_gradients(backend.compile(f), *inputs), outputs_and_gradients(f, *inputs))


@on("cpp")
def test_export(backend):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, is_causal=True)

    q, k, v = make(backend, 2, 2, 9, 9, 8, F32)
    with torch.no_grad():
        program = torch.export.export(Attend(), (q, k, v))
    assert any("attention_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@cases("head_dim", cpp=[8], triton=[8], **{CUDA_80: [64]})
def test_autocast(backend, head_dim):
    q, k, v = make(backend, 1, 2, 6, 6, head_dim, F32)
    with torch.autocast(backend.device, torch.bfloat16):
        ours, torchs = attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == torchs.dtype == torch.bfloat16


@on("triton")
def test_double_precision_is_not_served(backend):
    with pytest.raises(RuntimeError, match=r"triton: no kernel for torch.float64.*reference: can serve it"):
        attention(*make(backend, 1, 1, 4, 4, 8, F64))


@on("cpp")
class TestWhereNoKernelServes:
    """The reference takes over; with the kernel forced, the call is refused with the reason."""

    @pytest.fixture(autouse=True)
    def _unforced(self, backend, unforced):
        """Let the dispatcher choose."""

    def test_a_mask_that_wants_a_gradient(self, backend):
        q, k, v = make(backend, 1, 2, 6, 6, 8)
        mask = backend.draw(6, 6, dtype=F64).requires_grad_()
        assert torch.autograd.gradcheck(lambda m: attention(q, k, v, m), (mask,))
        assert ops.last_backend() == "reference"

    def test_very_wide_heads(self, backend):
        q, k, v = make(backend, 1, 1, 3, 3, 1500)
        torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
        assert ops.last_backend() == "reference"

    def test_other_devices(self, backend):
        q = torch.ones(1, 2, 3, 4, device="meta")
        assert attention(q, q, q).shape == q.shape
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
    ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths has dtype torch.float32"),
    ({"key_lengths": torch.tensor([1, 2, 3])}, ValueError, r"key_lengths has shape \[3\]"),
    ({"key_lengths": torch.tensor([1, 2], device="meta")}, ValueError, "key_lengths is on meta"),
    ({"causal_offset": 1.0, "is_causal": True}, TypeError, r"causal_offset is 1.0; an int or a tensor"),
    ({"causal_offset": True, "is_causal": True}, TypeError, "causal_offset is True; an int or a tensor"),
    ({"causal_offset": -1, "is_causal": True}, ValueError, "causal_offset is -1; it must be at least 0"),
    ({"causal_offset": 3}, ValueError, "causal_offset is 3; without is_causal it must be 0"),
    ({"causal_offset": torch.tensor([1, 2])}, ValueError, "without is_causal it must be 0"),
    ({"causal_offset": torch.tensor([1.0, 2.0]), "is_causal": True}, TypeError, "causal_offset has dtype torch.fl"),
    ({"causal_offset": torch.tensor(1), "is_causal": True}, ValueError, r"causal_offset has shape \[\]"),
    ({"causal_offset": torch.tensor([1, 2], device="meta"), "is_causal": True}, ValueError, "causal_offset is on meta"),
])  # fmt: skip
@on("cpp")
def test_bad_input(backend, change, error, says):
    arguments = {"query": torch.ones(2, 3, 5, 8), "key": torch.ones(2, 3, 6, 8), "value": torch.ones(2, 3, 6, 8)}
    with pytest.raises(error, match=says):
        attention(**(arguments | change))


@on("cpp")
def test_a_raw_call_with_bad_shapes_is_refused(backend):
    q, k, v = make(backend, 1, 2, 3, 4, 8, F32)
    with pytest.raises((ValueError, RuntimeError), match="value has shape"):
        backend.raw.attention_fwd(q, k, v[:, :, :2], None, False, 1.0)
    out, lse = backend.raw.attention_fwd(q, k, v, None, False, 1.0)
    with pytest.raises((ValueError, RuntimeError), match="lse has shape"):
        backend.raw.attention_bwd(out, q, k, v, None, out, lse[:, :, :2], False, 1.0)
    with pytest.raises((ValueError, RuntimeError), match="causal_offset is given; it needs is_causal"):
        backend.raw.attention_fwd(q, k, v, None, False, 1.0, causal_offset=torch.tensor([1]))
