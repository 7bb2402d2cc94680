import math

import pytest
import torch
import torch.nn.functional as F

from tests.cuda.device import DEVICE, ON_GPU, draw, raw
from tests.ops.parity import check_parity
from tinyllm import ops, reference

BF16, F16 = torch.bfloat16, torch.float16
# Emulated, the kernels of each family of GPUs; on a GPU, its own.
FAMILIES = [None] if ON_GPU else ["80", "90"]


@pytest.fixture(params=FAMILIES, ids=lambda family: f"sm_{family}" if family else "gpu")
def family(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setenv("TINYLLM_EMULATED_CAPABILITY", request.param)
        return request.param
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


@pytest.fixture
def sm_80(monkeypatch):
    """Where the kernels of compute capability 8.0 are meant, and a second family would show nothing."""
    if not ON_GPU:
        monkeypatch.setenv("TINYLLM_EMULATED_CAPABILITY", "80")


def make(b, h, t, s, d, dtype=BF16, kv_heads=None):
    kv_heads = h if kv_heads is None else kv_heads
    return (
        draw(b, h, t, d, dtype=dtype, seed=1),
        draw(b, kv_heads, s, d, dtype=dtype, seed=2),
        draw(b, kv_heads, s, d, dtype=dtype, seed=3),
    )


def compare(inputs, is_causal=False, key_lengths=None, **arguments):
    """Ours against PyTorch's function and the reference, outputs and gradients."""
    queries, keys = inputs[0].size(-2), inputs[1].size(-2)
    mask, seeing = None, 1
    if key_lengths is not None:
        mask = torch.arange(keys, device=DEVICE) < key_lengths[:, None, None, None]
        if is_causal:
            mask = mask & torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril()
        # A row that sees nothing is 0 by contract, NaN or 0 in PyTorch.
        seeing = mask.any(-1, keepdim=True)

    def torchs(q, k, v):
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **arguments)
        return F.scaled_dot_product_attention(q, k, v, mask | ~seeing, **arguments) * seeing

    check_parity(
        lambda q, k, v: ops.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, key_lengths=key_lengths, **arguments
        ),
        torchs,
        lambda q, k, v: reference.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal and mask is None, **arguments
        ),
        inputs,
    )
    assert ops.last_backend() == "cuda"


# B, H, T, S, D: a row; parts of tiles; whole ones; one more; several blocks of queries, of keys, of both; enough tiles
# to go around the rings.
SHAPES = [
    (1, 1, 1, 1, 64), (2, 2, 15, 15, 128), (1, 1, 64, 64, 64), (1, 1, 65, 129, 128), (1, 2, 130, 40, 64),
    (1, 1, 129, 200, 128), (1, 1, 33, 400, 64), (1, 1, 257, 20, 128),
]  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, is_causal, family):
    compare(make(*shape), is_causal)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_parity_in_float16(is_causal, head_dim, family):
    compare(make(1, 1, 129, 131, head_dim, F16), is_causal)


@pytest.mark.parametrize(("queries", "is_causal"), [(20, False), (70, True)])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads, queries, is_causal, family):
    compare(make(1, 4, queries, 66, 64, kv_heads=kv_heads), is_causal, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("queries", "is_causal"), [(1, False), (40, False), (140, True)])
def test_key_lengths(queries, is_causal, dtype, family):
    lengths = torch.tensor([0, 1, 77, 128], device=DEVICE, dtype=dtype)
    inputs = make(4, 1, queries, 130, 64 if dtype == torch.int32 else 128)
    compare(inputs, is_causal, lengths)


@pytest.mark.parametrize("queries", [2, 50])
def test_lengths_beyond_the_tensor_are_not_beyond_the_memory(queries, family):
    inputs = make(2, 1, queries, 70, 64)
    over = ops.scaled_dot_product_attention(*inputs, key_lengths=torch.tensor([71, 2**40], device=DEVICE))
    assert torch.equal(over, ops.scaled_dot_product_attention(*inputs))
    below = torch.tensor([-1, -(2**31)], device=DEVICE, dtype=torch.int32)
    assert torch.equal(ops.scaled_dot_product_attention(*inputs, key_lengths=below), torch.zeros_like(over))


@pytest.mark.parametrize("queries", [3, 70])
def test_keys_beyond_their_length_are_not_read(queries, family):
    inputs = [x.requires_grad_() for x in make(1, 1, queries, 100, 64)]
    lengths = torch.tensor([50], device=DEVICE)
    dirty = [x.detach().clone() for x in inputs]
    for x in dirty[1:]:
        x[:, :, 50:] = math.nan
    dirty = [x.requires_grad_() for x in dirty]
    outs = [ops.scaled_dot_product_attention(*x, key_lengths=lengths) for x in (inputs, dirty)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad((out * out).sum(), x) for out, x in zip(outs, (inputs, dirty), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(grads[0][1][:, :, 50:], torch.zeros_like(grads[0][1][:, :, 50:]))


# B, H, Hkv, T, S, D: one query; several, packed with their group's heads, also 16 rows of them; keys of several blocks.
DECODES = [
    (1, 1, 1, 1, 700, 64), (1, 2, 2, 1, 500, 128), (1, 6, 2, 1, 300, 128), (1, 4, 1, 4, 300, 64),
    (2, 3, 3, 5, 40, 128), (9, 1, 1, 1, 40, 64),
]  # fmt: skip


@pytest.mark.parametrize("shape", DECODES, ids=str)
def test_few_queries(shape, sm_80):
    b, h, kv_heads, t, s, d = shape
    compare(make(b, h, t, s, d, kv_heads=kv_heads), enable_gqa=True)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_few_queries_of_various_lengths(head_dim, sm_80):
    # Shorter than what a warp takes at a time, so that most splits are left empty; longer; none.
    lengths = torch.tensor([550, 5, 0, 130, 64], device=DEVICE)
    compare(make(5, 2, 3, 550, head_dim, F16, kv_heads=1), key_lengths=lengths, enable_gqa=True)


def test_few_queries_give_what_many_do(sm_80):
    # The same rows alone and among others: the statistics that backward is given are the same too.
    q, k, v = make(1, 2, 40, 500, 64)
    out, lse = raw().attention_fwd(q, k, v, None, False, 0.125)
    few_out, few_lse = raw().attention_fwd(q[:, :, :3], k, v, None, False, 0.125)
    torch.testing.assert_close(few_out, out[:, :, :3], atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(few_lse, lse[:, :, :3])


@pytest.mark.parametrize("queries", [2, 70])
def test_lse_is_in_base_2(queries, family):
    q, k, v = make(2, 1, queries, 90, 64)
    lengths = torch.tensor([90, 0], device=DEVICE)
    _, lse = raw().attention_fwd(q, k, v, None, False, 0.3, key_lengths=lengths)
    scores = q.double() @ k.double().mT * 0.3
    wanted = torch.logsumexp(scores, -1).float() / math.log(2)
    wanted[1] = -math.inf
    torch.testing.assert_close(lse, wanted)


def within(x, columns_apart=0, offset=0):
    """x over memory where rows are further apart, or begin elsewhere."""
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
@pytest.mark.parametrize("queries", [4, 18])
def test_any_strides(queries, view, family):
    inputs = make(2, 2, queries, 33, 64)
    viewed = [view(x).requires_grad_() for x in inputs]
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in viewed]
    grad = draw(*inputs[0].shape, dtype=BF16, seed=5)
    outs = [ops.scaled_dot_product_attention(*x) for x in (viewed, plain)]
    assert torch.equal(*outs)
    found = [torch.autograd.grad(outs[0], viewed, view(grad)), torch.autograd.grad(outs[1], plain, view(grad).clone())]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_expanded_gradient_and_one_tensor_in_three_roles(family):
    x = draw(1, 2, 40, 64, dtype=BF16).requires_grad_()
    (ours,) = torch.autograd.grad(ops.scaled_dot_product_attention(x, x, x).sum(), x)
    exact = x.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(reference.scaled_dot_product_attention(exact, exact, exact).sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, atol=0.03, rtol=0.03)


SIZES = [(0, 2, 4, 4, 64), (2, 0, 4, 4, 64), (2, 2, 0, 4, 64), (2, 2, 4, 0, 64), (1, 1, 70, 0, 128)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(shape, is_causal, family):
    inputs = [x.requires_grad_() for x in make(*shape)]
    out = ops.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    assert out.shape == inputs[0].shape
    assert torch.equal(out, torch.zeros_like(out))
    for grad, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("queries", [1, 20])
def test_infinite_and_nan_inputs(queries, value, family):
    q, k, v = make(1, 1, queries, 100, 64)
    k[0, 0, 80, 3] = value
    ours = ops.scaled_dot_product_attention(q, k, v)
    # Not in 16 bits: there PyTorch's own loses some.
    theirs = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(ours.double(), theirs, equal_nan=True, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores(size, family):
    # At 1e4 the softmax is one-hot: what counts is no NaN and no overflow.
    q, k, v = make(1, 1, 40, 150, 64)
    compare((q * size, k, v), is_causal=True)


def test_causal_outputs_do_not_see_later_keys(family):
    q, k, v = make(1, 1, 100, 100, 128)
    before = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    k[:, :, 60:], v[:, :, 60:] = 3.0, -7.0
    after = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, :60], after[:, :, :60])
    assert not torch.equal(before[:, :, 60:], after[:, :, 60:])


@pytest.mark.parametrize("queries", [1, 140])
def test_the_same_bits_each_time(queries, family):
    inputs = [x.requires_grad_() for x in make(1, 2, queries, 200, 64, kv_heads=1)]
    results = []
    for _ in range(2):
        out = ops.scaled_dot_product_attention(*inputs, enable_gqa=True)
        results.append([out, *torch.autograd.grad((out * out).sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_more_heads_than_are_worked_on_at_once(family):
    # Two of three, by the size of their keys, which causal queries hardly see.
    q, k, v = make(1, 3, 130, 30_000, 64)
    few = [k[:, :, :130], v[:, :, :130]]
    outs = [ops.scaled_dot_product_attention(q, *x, is_causal=True) for x in ((k, v), few)]
    assert torch.equal(*outs)


def test_heads_come_out_ready_to_be_joined(family):
    q, k, v = (x.requires_grad_() for x in make(2, 4, 20, 20, 64, kv_heads=2))
    out = ops.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert out.transpose(1, 2).is_contiguous()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.transpose(1, 2).is_contiguous()


def test_opcheck(sm_80):
    q, k, v = make(2, 2, 25, 30, 64, kv_heads=1)
    lengths = torch.tensor([3, 30], device=DEVICE)
    torch.library.opcheck(raw().attention_fwd, (q, k, v, None, False, 0.5, 0.0, None, lengths))
    torch.library.opcheck(raw().attention_fwd, (q[:, :, :2], k, v, None, False, 0.5))
    out, lse = raw().attention_fwd(q, k, v, None, True, 0.5)
    torch.library.opcheck(raw().attention_bwd, (out, q, k, v, None, out, lse, True, 0.5))


def test_compile_fullgraph(family):
    leaves = [x.requires_grad_() for x in make(2, 2, 19, 19, 64)]
    lengths = torch.tensor([19, 7], device=DEVICE)

    def f(q, k, v):
        out = ops.scaled_dot_product_attention(q * 2, k, v, is_causal=True, key_lengths=lengths)
        return out.transpose(1, 2).reshape(2, 19, 128)

    eager = f(*leaves)
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("queries", [1, 200])
def test_cuda_graph(queries):
    q, k, v = make(2, 2, queries, 700, 64)
    lengths = torch.tensor([700, 3], device=DEVICE)
    grad = draw(*q.shape, dtype=BF16, seed=4)

    def step():
        out, lse = raw().attention_fwd(q, k, v, None, False, 0.125, key_lengths=lengths)
        return out, *raw().attention_bwd(grad, q, k, v, None, out, lse, False, 0.125, key_lengths=lengths)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lengths.copy_(torch.tensor([40, 650]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize(("change", "message"), [
    ({"query": draw(1, 1, 4, 64)}, "query has dtype Float; the CUDA C.. kernels take BFloat16 and Half"),
    ({"query": draw(1, 1, 4, 32, dtype=BF16)}, "head_dim is 32; the CUDA C.. kernels take 64 and 128"),
    ({"key": draw(1, 1, 5, 64, dtype=BF16)}, r"value has shape \[1, 1, 4, 64\]; \[1, 1, 5, 64\] is needed"),
    ({"key": draw(1, 1, 4, 64, dtype=F16)}, "key has dtype Half; BFloat16 is needed"),
    ({"key": draw(1, 2, 4, 64, dtype=BF16), "value": draw(1, 2, 4, 64, dtype=BF16)},
     "key has 2 heads; they must divide query's, 1"),
    ({"query": draw(1, 4, 64, dtype=BF16)}, "must have 4 dimensions, not 3, 4 and 4"),
    ({"attn_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool, device=DEVICE)}, "attn_mask is given; .* take None"),
    ({"dropout_p": 0.5}, "dropout_p is 0.5; .* take 0"),
    ({"scale": 0.0}, "scale is 0; .* take positive ones"),
    ({"scale": -1.0}, "scale is -1; .* take positive ones"),
    ({"scale": math.nan}, "scale is nan; .* take positive ones"),
    ({"key_lengths": torch.ones(2, dtype=torch.int64, device=DEVICE)}, r"key_lengths has shape \[2\]; \[1\] is needed"),
    ({"key_lengths": torch.ones(1, dtype=torch.int16, device=DEVICE)}, "key_lengths has dtype Short; Int or Long"),
])  # fmt: skip
def test_what_the_kernels_do_not_take_is_named(change, message):
    x = draw(1, 1, 4, 64, dtype=BF16)
    arguments = {"query": x, "key": x, "value": x, "attn_mask": None, "is_causal": False, "scale": 1.0, **change}
    with pytest.raises((ValueError, RuntimeError), match=message):
        raw().attention_fwd(**arguments)
    out = {"grad": x, "out": x, "lse": draw(1, 1, 4)}
    with pytest.raises((ValueError, RuntimeError), match=message):
        raw().attention_bwd(**arguments, **out)
