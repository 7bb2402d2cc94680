import math

import pytest
import torch
import torch.nn.functional as F

from tests.cuda.device import DEVICE, ON_GPU, draw, raw
from tests.ops.parity import assert_accurate, check_parity
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


GARBAGE = [math.nan, math.inf, -math.inf]


def outputs_and_gradients(inputs, grad=None, **arguments):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = ops.scaled_dot_product_attention(*leaves, **arguments)
    assert ops.last_backend() == "cuda"
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach() if grad is None else grad)]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "is_causal"), [(1, False), (3, False), (70, False), (1, True), (70, True)])
def test_keys_beyond_their_length_are_not_read(queries, is_causal, head_dim, garbage, family):
    q, k, v = make(1, 1, queries, 100, head_dim)
    arguments = {"key_lengths": torch.tensor([50], device=DEVICE), "is_causal": is_causal}
    clean = outputs_and_gradients((q, k, v), **arguments)
    k[:, :, 50:], v[:, :, 50:] = garbage, garbage
    dirty = outputs_and_gradients((q, k, v), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for grad in dirty[2:]:
        assert torch.equal(grad[:, :, 50:], torch.zeros_like(grad[:, :, 50:]))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("queries", [1, 50, 150])
def test_keys_behind_the_last_query_are_not_read(queries, head_dim, garbage, family):
    # Causal: nobody sees the keys from the number of queries on.
    q, k, v = make(1, 2, queries, 290, head_dim, kv_heads=1)
    clean = outputs_and_gradients((q, k, v), is_causal=True, enable_gqa=True)
    k[:, :, queries:], v[:, :, queries:] = garbage, garbage
    dirty = outputs_and_gradients((q, k, v), is_causal=True, enable_gqa=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for grad in dirty[2:]:
        assert torch.equal(grad[:, :, queries:], torch.zeros_like(grad[:, :, queries:]))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("key", [1, 60, 79, 130, 199])
def test_garbage_above_the_diagonal_does_not_reach_earlier_queries(key, head_dim, garbage, family):
    q, k, v = make(1, 1, 200, 200, head_dim, kv_heads=1)
    grad = draw(*q.shape, dtype=BF16, seed=4)
    clean_out, clean_grad, *_ = outputs_and_gradients((q, k, v), grad, is_causal=True)
    close = {"atol": 0.01, "rtol": 0.016}  # on a GPU other instructions may compute a tile with such numbers in it
    # A key: whoever sees it is NaN, or does without it.
    dirty_key = k.clone()
    dirty_key[:, :, key] = garbage
    out, grad_query, *_ = outputs_and_gradients((q, dirty_key, v), grad, is_causal=True)
    torch.testing.assert_close(out[:, :, :key], clean_out[:, :, :key], **close)
    torch.testing.assert_close(grad_query[:, :, :key], clean_grad[:, :, :key], **close)
    assert grad_query[:, :, key:].isnan().all()  # 0 times infinity, too
    # One number of a value: it reaches its own column alone, of those who see it.
    dirty_value = v.clone()
    dirty_value[:, :, key, 3] = garbage
    out, grad_query, _, grad_value = outputs_and_gradients((q, k, dirty_value), grad, is_causal=True)
    column = out[..., 3].clone()
    assert torch.equal(column[:, :, key:].isnan(), torch.full_like(column[:, :, key:], math.isnan(garbage), dtype=bool))
    assert math.isnan(garbage) or (column[:, :, key:] == garbage).all()
    out[..., 3][:, :, key:] = clean_out[..., 3][:, :, key:]
    torch.testing.assert_close(out, clean_out, **close)
    torch.testing.assert_close(grad_query[:, :, :key], clean_grad[:, :, :key], **close)
    assert grad_query[:, :, key:].isnan().all()
    assert grad_value.isfinite().all()  # no value has a part in its own gradient
    # Both, and whole rows from there on.
    k[:, :, key:], v[:, :, key:] = garbage, garbage
    out, grad_query, *_ = outputs_and_gradients((q, k, v), grad, is_causal=True)
    torch.testing.assert_close(out[:, :, :key], clean_out[:, :, :key], **close)
    torch.testing.assert_close(grad_query[:, :, :key], clean_grad[:, :, :key], **close)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_lies_behind_the_rows_in_memory_is_not_read(head_dim, is_causal, family):
    tensors = [*make(1, 2, 50, 50, head_dim), draw(1, 2, 50, head_dim, dtype=BF16, seed=4)]
    clean = outputs_and_gradients(tensors[:3], tensors[3], is_causal=is_causal)
    wide = [torch.full((1, 2, 200, head_dim), math.nan, dtype=BF16, device=DEVICE) for _ in tensors]
    q, k, v, grad = (w[:, :, :50].copy_(x) for w, x in zip(wide, tensors, strict=True))
    out, lse = raw().attention_fwd(q, k, v, None, is_causal, head_dim**-0.5)
    grads = raw().attention_bwd(grad, q, k, v, None, out, lse, is_causal, head_dim**-0.5)
    assert all(torch.equal(a, b) for a, b in zip(clean, (out, *grads), strict=True))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_in_every_tensor_leaves_its_keys_without_gradients(is_causal, head_dim, garbage, family):
    # A padded sequence attends to itself: what its padding asks for is garbage, and so is its gradient.
    tensors = [*make(1, 1, 200, 200, head_dim), draw(1, 1, 200, head_dim, dtype=BF16, seed=4)]
    clean = outputs_and_gradients(
        tensors[:3], tensors[3], is_causal=is_causal, key_lengths=torch.tensor([70]).to(DEVICE)
    )
    for x in tensors:
        x[:, :, 70:] = garbage
    dirty = outputs_and_gradients(
        tensors[:3], tensors[3], is_causal=is_causal, key_lengths=torch.tensor([70]).to(DEVICE)
    )
    for a, b in zip(clean[:2], dirty[:2], strict=True):
        assert torch.equal(a[:, :, :70], b[:, :, :70])
    for grad in dirty[2:]:
        assert torch.equal(grad[:, :, 70:], torch.zeros_like(grad[:, :, 70:]))


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


@pytest.mark.skipif(ON_GPU, reason="how many blocks there are shows in the emulation's log alone")
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_few_queries_leave_no_block_without_keys(kv_heads, sm_80, tmp_path, monkeypatch):
    log, step = tmp_path / "log", 64  # keys that the block's four warps take at a time
    monkeypatch.setenv("TINYLLM_EMULATED_LOG", str(log))
    for keys in (0, 1, 500, 700, 1100, 1500, 2048):
        log.unlink(missing_ok=True)
        raw().attention_fwd(*make(1, kv_heads, 1, keys, 128), None, False, 0.1)
        _, splits, heads = map(int, log.read_text().splitlines()[0].split()[-3:])
        assert heads == kv_heads
        keys_of_one = math.ceil(keys / splits / step) * step
        assert splits == max(1, math.ceil(keys / max(1, keys_of_one)))
        assert splits > 1 or keys < 600


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
    found = [torch.autograd.grad(outs[0], viewed, view(grad)), torch.autograd.grad(outs[1], plain, view(grad).clone())]
    if view is not VIEWS["expanded"]:
        assert torch.equal(*outs)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        return
    # Hopper's own kernels do not take one row that stands for many, so that two kernels may serve.
    exact = [x.detach().double().requires_grad_() for x in plain]
    out = reference.scaled_dot_product_attention(*exact)
    assert_accurate("output", *outs, out)
    for a, b, c in zip(*found, torch.autograd.grad(out, exact, view(grad).double()), strict=True):
        assert_accurate("gradient", a, b, c)


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
