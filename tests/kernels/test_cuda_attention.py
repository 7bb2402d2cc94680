"""Attention's CUDA C++ kernels: what they read, how few queries share the keys, and what the raw operators take."""

import math

import pytest
import torch

from tests.helpers.attention import BF16, CUDA, CUDA_80, F16, attention, compare, make
from tests.helpers.backends import BACKENDS, ON_GPU, on
from tests.ops.parity import assert_equal, outputs_and_gradients

draw, raw, DEVICE = BACKENDS["cuda"].draw, BACKENDS["cuda"].raw, BACKENDS["cuda"].device


@on(*CUDA)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_lies_behind_the_rows_in_memory_is_not_read(backend, head_dim, is_causal):
    tensors = [*make(backend, 1, 2, 50, 50, head_dim), draw(1, 2, 50, head_dim, dtype=BF16, seed=4)]
    clean = outputs_and_gradients(lambda *x: attention(*x, is_causal=is_causal), *tensors[:3], grads=tensors[3:])
    wide = [torch.full((1, 2, 200, head_dim), math.nan, dtype=BF16, device=DEVICE) for _ in tensors]
    q, k, v, grad = (w[:, :, :50].copy_(x) for w, x in zip(wide, tensors, strict=True))
    out, lse = raw.attention_fwd(q, k, v, None, is_causal, head_dim**-0.5)
    grads = raw.attention_bwd(grad, q, k, v, None, out, lse, is_causal, head_dim**-0.5)
    assert_equal((out, *grads), clean)


@on(*CUDA)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_in_every_tensor_leaves_its_keys_without_gradients(backend, is_causal, head_dim, garbage):
    # A padded sequence attends to itself: what its padding asks for is garbage, and so is its gradient.
    tensors = [*make(backend, 1, 1, 200, 200, head_dim), draw(1, 1, 200, head_dim, dtype=BF16, seed=4)]
    f = lambda *x: attention(*x, is_causal=is_causal, key_lengths=backend.tensor([70]))  # noqa: E731
    clean = outputs_and_gradients(f, *tensors[:3], grads=tensors[3:])
    for x in tensors:
        x[:, :, 70:] = garbage
    dirty = outputs_and_gradients(f, *tensors[:3], grads=tensors[3:])
    assert_equal([x[:, :, :70] for x in dirty[:2]], [x[:, :, :70] for x in clean[:2]])
    for grad in dirty[2:]:
        assert torch.equal(grad[:, :, 70:], torch.zeros_like(grad[:, :, 70:]))


# B, H, Hkv, T, S, D: one query; several, packed with their group's heads, also 16 rows of them; keys of several blocks.
DECODES = [
    (1, 1, 1, 1, 700, 64), (1, 2, 2, 1, 500, 128), (1, 6, 2, 1, 300, 128), (1, 4, 1, 4, 300, 64),
    (2, 3, 3, 5, 40, 128), (9, 1, 1, 1, 40, 64),
]  # fmt: skip


@on(CUDA_80)
@pytest.mark.parametrize("shape", DECODES, ids=str)
def test_few_queries(backend, shape):
    b, h, kv_heads, t, s, d = shape
    compare(backend, make(backend, b, h, t, s, d, kv_heads=kv_heads), enable_gqa=True)


@on(CUDA_80)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_few_queries_of_various_lengths(backend, head_dim):
    # Shorter than what a warp takes at a time, so that most splits are left empty; longer; none.
    lengths = torch.tensor([550, 5, 0, 130, 64], device=DEVICE)
    compare(backend, make(backend, 5, 2, 3, 550, head_dim, F16, kv_heads=1), key_lengths=lengths, enable_gqa=True)


@on(CUDA_80)
@pytest.mark.skipif(ON_GPU, reason="how many blocks there are shows in the emulation's log alone")
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_few_queries_leave_no_block_without_keys(backend, kv_heads, tmp_path, monkeypatch):
    log, step = tmp_path / "log", 64  # keys that the block's four warps take at a time
    monkeypatch.setenv("TINYLLM_EMULATED_LOG", str(log))
    for keys in (0, 1, 500, 700, 1100, 1500, 2048):
        log.unlink(missing_ok=True)
        raw.attention_fwd(*make(backend, 1, kv_heads, 1, keys, 128), None, False, 0.1)
        _, splits, heads = map(int, log.read_text().splitlines()[0].split()[-3:])
        assert heads == kv_heads
        keys_of_one = math.ceil(keys / splits / step) * step
        assert splits == max(1, math.ceil(keys / max(1, keys_of_one)))
        assert splits > 1 or keys < 600


@on(CUDA_80)
def test_few_queries_give_what_many_do(backend):
    # The same rows alone and among others: the statistics that backward is given are the same too.
    q, k, v = make(backend, 1, 2, 40, 500, 64)
    out, lse = raw.attention_fwd(q, k, v, None, False, 0.125)
    few_out, few_lse = raw.attention_fwd(q[:, :, :3], k, v, None, False, 0.125)
    torch.testing.assert_close(few_out, out[:, :, :3], atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(few_lse, lse[:, :, :3])


@on(*CUDA)
@pytest.mark.parametrize("queries", [2, 70])
def test_lse_is_in_base_2(backend, queries):
    q, k, v = make(backend, 2, 1, queries, 90, 64)
    lengths = torch.tensor([90, 0], device=DEVICE)
    _, lse = raw.attention_fwd(q, k, v, None, False, 0.3, key_lengths=lengths)
    scores = q.double() @ k.double().mT * 0.3
    wanted = torch.logsumexp(scores, -1).float() / math.log(2)
    wanted[1] = -math.inf
    torch.testing.assert_close(lse, wanted)


@on(*CUDA)
def test_more_heads_than_are_worked_on_at_once(backend):
    # Two of three, by the size of their keys, which causal queries hardly see.
    q, k, v = make(backend, 1, 3, 130, 30_000, 64)
    few = [k[:, :, :130], v[:, :, :130]]
    outs = [attention(q, *x, is_causal=True) for x in ((k, v), few)]
    assert torch.equal(*outs)


@on(CUDA_80)
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("queries", [1, 200])
def test_cuda_graph(backend, queries):
    q, k, v = make(backend, 2, 2, queries, 700, 64)
    lengths = torch.tensor([700, 3], device=DEVICE)
    grad = draw(*q.shape, dtype=BF16, seed=4)

    def step():
        out, lse = raw.attention_fwd(q, k, v, None, False, 0.125, key_lengths=lengths)
        return out, *raw.attention_bwd(grad, q, k, v, None, out, lse, False, 0.125, key_lengths=lengths)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lengths.copy_(torch.tensor([40, 650]))
    graph.replay()
    assert_equal(captured, step())


@on(CUDA_80)
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
    ({"is_causal": True, "causal_offset": torch.ones(1, dtype=torch.int64, device=DEVICE)},
     "causal_offset is given; .* take None"),
    ({"key_lengths": torch.ones(2, dtype=torch.int64, device=DEVICE)}, r"key_lengths has shape \[2\]; \[1\] is needed"),
    ({"key_lengths": torch.ones(1, dtype=torch.int16, device=DEVICE)}, "key_lengths has dtype Short; Int or Long"),
])  # fmt: skip
def test_what_the_kernels_do_not_take_is_named(backend, change, message):
    x = draw(1, 1, 4, 64, dtype=BF16)
    arguments = {"query": x, "key": x, "value": x, "attn_mask": None, "is_causal": False, "scale": 1.0, **change}
    with pytest.raises((ValueError, RuntimeError), match=message):
        raw.attention_fwd(**arguments)
    out = {"grad": x, "out": x, "lse": draw(1, 1, 4)}
    with pytest.raises((ValueError, RuntimeError), match=message):
        raw.attention_bwd(**arguments, **out)
