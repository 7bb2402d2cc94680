"""Causal attention of queries that come behind others, as where a text is read in chunks: query i sees the keys
0 ... causal_offset + i."""

from functools import partial
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.attention import BF16, F16, F32, F64, attention, compare, draw_mask, exact, make
from tests.helpers.backends import cases, on
from tests.ops.parity import assert_equal, assert_same_bits, outputs_and_gradients
from tinyllm import ops


def offset_of(backend, offset):
    """Return an offset as the operator takes it: of a tuple, a tensor."""
    return backend.tensor(offset) if isinstance(offset, tuple) else offset


def call(inputs, offset):
    """Return the result and the gradients."""
    return outputs_and_gradients(lambda *x: attention(*x, is_causal=True, causal_offset=offset), *inputs)


def offsets(shape):
    """Return offsets beside the borders of blocks, that with which the last query sees all keys, and different ones."""
    batch, _, queries, keys, _ = shape
    last = keys - queries
    return [*(n for n in (1, 63, 64, 65, 129) if n < last), last, (last, 5, 0)[:batch]]


# Chunks of parts of blocks of queries, and of the few that split the keys; backward with ranges of keys, and with none.
CPP = [
    (2, 2, 70, 300, 16), (1, 1, 130, 700, 64), (2, 2, 5, 700, 24), (3, 1, 1, 200, 16), (1, 1, 33, 150, 160),
    (1, 32, 70, 300, 8),
]  # fmt: skip
TRITON = [
    ((1, 2, 20, 70, 16), 3, F32), ((1, 2, 20, 70, 16), 50, BF16), ((2, 1, 40, 75, 17), (35, 4), F32),
    ((1, 1, 70, 150, 64), 65, BF16), ((1, 1, 20, 60, 300), 33, BF16), ((2, 2, 3, 300, 16), (297, 140), F32),
    ((2, 1, 1, 300, 16), (290, 31), BF16),
]  # fmt: skip


@cases(
    "shape offset dtype",
    cpp=[
        *((shape, offset, F64) for shape in CPP for offset in offsets(shape)),
        *product(CPP[:1], [65, (230, 7)], [F32, BF16, F16]),
        *product(CPP[2:3], [(695, 130)], [F32, BF16, F16]),
    ],
    triton=TRITON,
)
def test_parity(backend, shape, offset, dtype):
    compare(backend, make(backend, *shape, dtype), is_causal=True, causal_offset=offset_of(backend, offset))


@cases(
    "shape dtype",
    cpp=product([(2, 4, 70, 300, 16), (2, 4, 2, 300, 16)], [F64]),
    triton=product([(2, 2, 20, 70, 16), (2, 2, 2, 140, 16)], [F32]),
)
@pytest.mark.parametrize(("kind", "lengths"), [("bool", None), ("bool", (60, 9)), ("additive", None)])
def test_with_a_mask_key_lengths_and_grouped_heads(backend, shape, dtype, kind, lengths):
    *_, queries, keys, _ = shape
    mask = draw_mask(backend, kind, *shape[:4], dtype=dtype)
    options = {"key_lengths": None if lengths is None else backend.tensor(lengths), "enable_gqa": True}
    options["causal_offset"] = backend.tensor([keys - queries - 1, 11])
    compare(backend, make(backend, *shape, dtype, kv_heads=shape[1] // 2), mask, is_causal=True, **options)


@cases("shape chunk", cpp=product([(2, 2, 150, 150, 8)], [1, 7, 64]), triton=product([(1, 1, 40, 40, 8)], [12, 17]))
def test_chunks_behind_each_other_are_the_whole(backend, shape, chunk):
    q, k, v = make(backend, *shape)
    whole = attention(q, k, v, is_causal=True)
    for begin in range(0, shape[2], chunk):
        end = min(begin + chunk, shape[2])
        found = attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], is_causal=True, causal_offset=begin)
        torch.testing.assert_close(found, whole[:, :, begin:end])


@cases("shape", cpp=[(2, 2, 20, 90, 8), (2, 2, 1, 90, 8)], triton=[(1, 1, 20, 40, 8)])
def test_an_offset_that_hides_nothing(backend, shape):
    inputs, keys = make(backend, *shape), shape[3]
    full = outputs_and_gradients(attention, *inputs)
    for offset in (keys - 1, keys, 2**70):
        assert_equal(call(inputs, offset), full)
    torch.testing.assert_close(call(inputs, backend.tensor([keys - 1, 2**62][-shape[0] :])), full)


@on("cpp", "triton")
def test_a_tensor_is_bounded_and_may_have_either_dtype(backend):
    inputs = make(backend, 3, 1, 20, 30, 8)
    wanted = call(inputs, backend.tensor([0, 9, 30]))
    for offset in ([-5, 9, 99], [-(2**31), 9, 2**31 - 1]):
        assert_equal(call(inputs, backend.tensor(offset, torch.int32)), wanted)
    assert_equal([wanted[0][:1]], [attention(*(x[:1] for x in inputs), is_causal=True)])


@cases("shape", cpp=[(2, 1, 300, 700, 16), (2, 40, 70, 700, 16), (2, 1, 6, 700, 16)])
def test_the_same_bits_for_any_number_of_threads(backend, shape):
    inputs = make(backend, *shape, F32)
    assert_same_bits(backend.threads, lambda: call(inputs, torch.tensor([370, 64])))


@cases("shape", reference=[(2, 1, 3, 6, 2)], cpp=[(2, 1, 3, 6, 2)])
@pytest.mark.parametrize("offset", [3, (4, 1)])
def test_the_reference_and_double_backward(backend, shape, offset):
    inputs = [x.requires_grad_() for x in make(backend, *shape)]
    offset = offset_of(backend, offset)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, is_causal=True, causal_offset=offset), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, is_causal=True, causal_offset=offset), inputs)


@on("cpp")
@pytest.mark.parametrize("leading", [(), (2,), (1, 2, 2)], ids=str)
def test_any_number_of_leading_dimensions(backend, leading):
    inputs = [backend.draw(*leading, n, 2, dtype=F64, seed=n).requires_grad_() for n in (3, 5, 5)]
    for offset in (1, torch.tensor([[3, 1]])) if len(leading) > 2 else (1,):
        found = attention(*inputs, is_causal=True, causal_offset=offset)
        torch.testing.assert_close(found, exact(*inputs, is_causal=True, causal_offset=offset))
        assert torch.autograd.gradgradcheck(lambda *x: attention(*x, is_causal=True, causal_offset=offset), inputs)  # noqa: B023


@on("cpp")
def test_where_no_kernel_serves(backend, unforced):
    q, k, v = make(backend, 2, 1, 3, 7, 1500)
    for offset in (2, torch.tensor([2, 4])):
        torch.testing.assert_close(
            attention(q, k, v, is_causal=True, causal_offset=offset),
            exact(q, k, v, is_causal=True, causal_offset=offset),
        )
        assert ops.last_backend() == "reference"


@cases("shape", cpp=[(2, 2, 5, 9, 4)], triton=[(1, 1, 20, 25, 4)])
def test_opcheck(backend, shape):
    q, k, v = make(backend, *shape, F32)
    offset = backend.tensor([3, 1][: shape[0]])
    rest = (True, 0.5, 0.0, None, None, offset)
    torch.library.opcheck(backend.raw.attention_fwd, (q, k, v, None, *rest))
    out, lse = backend.raw.attention_fwd(q, k, v, None, *rest)
    torch.library.opcheck(backend.raw.attention_bwd, (out, q, k, v, None, out, lse, *rest))


@on("cpp")
def test_one_compilation_serves_all_offsets(backend):
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=graphs)
    for begin in range(1, 6):
        inputs, options = make(backend, 2, 2, 5, 5 + begin, 8, F32), {"is_causal": True, "causal_offset": begin}
        found, expected = (outputs_and_gradients(partial(f, **options), *inputs) for f in (compiled, attention))
        torch.testing.assert_close(found, expected)
    assert graphs.frame_count == 2  # one for the first numbers, and one for all others
