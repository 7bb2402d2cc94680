"""Keys and values behind key_lengths, above the causal diagonal or hidden by a mask touch no query and get no
gradients, even where they are NaN or infinite."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.attention import BF16, F16, F32, F64, attention, exact, make, on_cuda
from tests.helpers.backends import cases, each_dtype, on
from tests.ops.parity import DTYPES, assert_equal, outputs_and_gradients
from tinyllm import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of every 0 times infinity

NAN, INF = math.nan, math.inf
GARBAGE = (NAN, INF, -INF)
# For Triton: tiles by pointers; by descriptors; by pointers, with columns that are not there. And such as go in chunks.
KINDS = [(F32, 16), (BF16, 16), (F16, 17)]
CHUNKED = [(BF16, 264), (F32, 66)]


def on_cpu(values):
    """Return the cases of the C++ kernels, for the reference too."""
    return dict.fromkeys(("cpp", "reference"), tuple(values))


def spoil(x, hidden, garbage=None, backwards=False):
    """Return x with garbage in the hidden (batch, keys), by default of all kinds in parts of the rows."""
    if garbage is not None:
        return x.masked_fill(hidden[:, None, :, None], garbage)
    x = x.clone()
    for i, row in enumerate(hidden[0].nonzero().flatten().tolist()[:: -1 if backwards else 1]):
        x[..., row, i % 3 :] = GARBAGE[i % 3]
    return x


def call(inputs, grad=None, mask=None, **options):
    """Return the result and the gradients, with the same dropout each time."""

    def f(q, k, v):
        torch.manual_seed(5)
        return attention(q, k, v, mask, enable_gqa=True, **options)

    return outputs_and_gradients(f, *inputs, grads=None if grad is None else [grad])


def assert_same(backend, found, expected):
    """Assert equality but for rounding: what is made a second time is summed in tiles of another height."""
    if backend.name == "cuda":
        assert_equal(found, expected)
        return
    dtype = found[0].dtype
    step = 8 * torch.finfo(dtype).eps
    atol, rtol = (step, step) if backend.name == "triton" else (1e-2, 1e-2) if dtype.itemsize == 2 else (1e-5, 1e-4)
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def assert_untouched(backend, inputs, hidden, garbage=None, **options):
    """Assert that the hidden (batch, keys) may be anything, and have gradients of exactly 0."""
    q, k, v = inputs
    found = call((q, spoil(k, hidden, garbage), spoil(v, hidden, garbage, backwards=True)), **options)
    assert ops.last_backend() == backend.name
    assert_same(backend, found, call(inputs, **options))
    for grad in found[2:]:
        assert grad.masked_select(hidden[:, None, :, None]).eq(0.0).all()


@cases(
    "shape kv_heads lengths is_causal dtype garbage",
    reference=product([(3, 4, q, 150, 20) for q in (1, 5, 70)], [2], [(149, 1, 67)], [False], [F32], GARBAGE),
    cpp=[
        *product([(3, 4, q, 150, 20) for q in (1, 5, 70)], [2], [(149, 1, 67)], [False], [F32], GARBAGE),
        *product([(2, 2, q, 100, 24) for q in (1, 33)], [2], [(70, 3)], [False], DTYPES, [NAN]),
        ((2, 1, 70, 300, 136), 1, (280, 3), False, F32, NAN),
    ],
    triton=[
        *(
            ((1, 2, queries, 45, size), 1, (19,), is_causal, dtype, None)
            for queries, is_causal, (dtype, size) in product([1, 20], [False, True], KINDS)
        ),
        ((3, 2, 20, 70, 16), 1, (70, 33, 0), False, F32, NAN),
    ],
    **on_cuda(
        ((1, 1, queries, 100, head_dim), 1, (50,), is_causal, BF16, garbage)
        for (queries, is_causal), head_dim, garbage in product(
            [(1, False), (3, False), (70, False), (1, True), (70, True)], [64, 128], GARBAGE
        )
    ),
)
def test_behind_key_lengths(backend, shape, kv_heads, lengths, is_causal, dtype, garbage):
    lengths = backend.tensor(lengths)
    hidden = torch.arange(shape[3], device=backend.device) >= lengths[:, None]
    inputs = make(backend, *shape, dtype, kv_heads)
    assert_untouched(backend, inputs, hidden, garbage, is_causal=is_causal, key_lengths=lengths)


# Causal: nobody sees the keys from the number of queries, and of tokens before them, on.
@cases(
    "shape offset dtype additive garbage",
    cpp=[
        *product([(1, 2, q, 70, 16) for q in (5, 33)], [0, 9], [F32], [False, True], [NAN]),
        *product([(1, 2, q, 700, 16) for q in (3, 33)], [65, 600], [F32], [False], [NAN]),
    ],
    triton=[
        *(((1, 2, queries, 45, size), 0, dtype, False, None) for queries, (dtype, size) in product([3, 20], KINDS)),
        *(((1, 2, queries, 75, size), 35, dtype, False, None) for queries, (dtype, size) in product([3, 20], KINDS)),
        ((1, 2, 20, 45, 16), 0, F32, True, None),
    ],
    **on_cuda(product([(1, 2, q, 290, d) for q in (1, 50, 150) for d in (64, 128)], [0], [BF16], [False], GARBAGE)),
)
def test_behind_the_last_query(backend, shape, offset, dtype, additive, garbage):
    *_, queries, keys, _ = shape
    hidden = (torch.arange(keys, device=backend.device) >= offset + queries)[None]
    options = {"is_causal": True, "causal_offset": offset}
    options["mask"] = backend.draw(queries, keys, seed=4) if additive else None
    assert_untouched(backend, make(backend, *shape, dtype, kv_heads=1), hidden, garbage, **options)


@cases("garbage", **on_cpu(GARBAGE))
@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("kind", ["key_lengths and a mask", "bool mask", "window", "-inf"])
def test_what_is_hidden_from_all_queries(backend, kind, queries, garbage):
    lengths, key = torch.tensor([149, 1, 67]), torch.arange(150)
    hidden = key >= lengths[:, None]
    if kind == "bool mask":
        hidden = torch.rand(3, 150, generator=torch.Generator().manual_seed(2)) < 0.4
    elif kind == "window":
        hidden = ((key < 20) | (key > 90) | (key == 50)).expand(3, -1)
    arguments = {"mask": ~hidden[:, None, None, :]}
    if kind == "key_lengths and a mask":
        arguments = {"key_lengths": lengths.int(), "mask": backend.draw(queries, 150)}
    elif kind == "-inf":
        arguments = {"mask": torch.zeros(hidden.shape).masked_fill(hidden, -INF)[:, None, None, :]}
    assert_untouched(backend, make(backend, 3, 4, queries, 150, 20, F32, kv_heads=2), hidden, garbage, **arguments)


@cases(
    "options dtype size",
    **on_cpu(product(({}, {"is_causal": True}, {"scale": -0.5}), [F32], [16])),
    triton=[
        *(({}, dtype, size) for dtype, size in KINDS + CHUNKED),
        *((o, *kind) for o, kind in product(({"dropout_p": 0.3}, {"is_causal": True}, {"scale": -0.5}), KINDS[:2])),
    ],
)
@pytest.mark.parametrize("queries", [1, 20])
def test_hidden_by_a_bool_mask_and_more(backend, options, queries, dtype, size):
    hidden = torch.zeros(1, 45, dtype=torch.bool, device=backend.device)
    hidden[:, [3, 4, 5, 30, 44]] = True
    mask = backend.draw(1, 2, queries, 45, seed=4) > -1
    mask[..., 0] = True
    inputs = make(backend, 1, 2, queries, 45, size, dtype, kv_heads=1)
    assert_untouched(backend, inputs, hidden, mask=mask & ~hidden, **options)


@cases(
    "is_causal dtype size",
    **on_cpu([(False, F32, 16), (True, F32, 16)]),
    triton=[(False, dtype, size) for dtype, size in KINDS],
)
def test_documents_do_not_touch_each_other(backend, is_causal, dtype, size):
    """The second document's keys or values are NaN, in tiles that the first and third share with it."""
    q, k, v = make(backend, 1, 2, 70, 70, size, dtype, kv_heads=1)
    key = torch.arange(70, device=backend.device)
    document = torch.bucketize(key, backend.tensor([25, 45]), right=True)
    mask, others = document[:, None] == document, document != 1
    spoilt_rows = ~others if is_causal else (key == 27) | (key == 31) | (key == 40)
    grad = backend.draw(*q.shape, dtype=dtype, seed=6)
    clean = call((q, k, v), grad, mask, is_causal=is_causal)
    spoilt_k, spoilt_v = (spoil(x, spoilt_rows[None]) for x in (k, v))
    for k2, v2 in ((spoilt_k, v), (k, spoilt_v), (spoilt_k, spoilt_v)):
        found = call((q, k2, v2), grad, mask, is_causal=is_causal)
        assert_same(backend, [x[..., others, :] for x in found], [x[..., others, :] for x in clean])
        assert not found[0][..., ~others, :].isfinite().any()


@cases(
    "garbage length offset",
    **on_cpu(product([NAN, INF], [1, 8, 67, 300], [0, 130])),
    triton=[(NAN, 6, 130), (INF, 40, 5)],
)
def test_above_the_causal_diagonal(backend, garbage, length, offset):
    """Queries before the first bad key are untouched, to its very neighbour; those from it on see it and are not."""
    inputs, bad = make(backend, 1, 2, length, offset + length, 16, F32), length // 2
    hidden = (torch.arange(offset + length, device=backend.device) >= offset + bad)[None]
    grad = backend.draw(*inputs[0].shape, seed=6)
    grad[..., bad:, :] = 0.0
    spoilt = inputs[0], *(spoil(x, hidden, garbage) for x in inputs[1:])
    found, expected = (call(x, grad, is_causal=True, causal_offset=offset)[:2] for x in (spoilt, inputs))
    torch.testing.assert_close([x[..., :bad, :] for x in found], [x[..., :bad, :] for x in expected])
    assert not found[0][..., bad:, :].isfinite().any()


@cases("head_dim garbage", **on_cuda(product([64, 128], GARBAGE)))
@pytest.mark.parametrize("key", [1, 60, 79, 130, 199])
def test_garbage_above_the_diagonal_does_not_reach_earlier_queries(backend, key, head_dim, garbage):
    q, k, v = make(backend, 1, 1, 200, 200, head_dim)
    grad = backend.draw(*q.shape, dtype=BF16, seed=4)
    clean_out, clean_grad, *_ = call((q, k, v), grad, is_causal=True)

    def assert_earlier_untouched(out, grad_query):
        # On a GPU other instructions may compute a tile with such numbers in it.
        torch.testing.assert_close(out[:, :, :key], clean_out[:, :, :key], atol=0.01, rtol=0.016)
        torch.testing.assert_close(grad_query[:, :, :key], clean_grad[:, :, :key], atol=0.01, rtol=0.016)

    # A key: whoever sees it is NaN, or does without it.
    dirty_key = k.clone()
    dirty_key[:, :, key] = garbage
    out, grad_query, *_ = call((q, dirty_key, v), grad, is_causal=True)
    assert_earlier_untouched(out, grad_query)
    assert grad_query[:, :, key:].isnan().all()  # 0 times infinity, too
    # One number of a value: it reaches its own column alone, of those who see it.
    dirty_value = v.clone()
    dirty_value[:, :, key, 3] = garbage
    out, grad_query, _, grad_value = call((q, k, dirty_value), grad, is_causal=True)
    column = out[:, :, key:, 3]
    torch.testing.assert_close(column, torch.full_like(column, garbage), equal_nan=True)
    out[:, :, key:, 3] = clean_out[:, :, key:, 3]
    torch.testing.assert_close(out, clean_out, atol=0.01, rtol=0.016)
    assert_earlier_untouched(out, grad_query)
    assert grad_query[:, :, key:].isnan().all()
    assert grad_value.isfinite().all()  # no value has a part in its own gradient
    # Both, and whole rows from there on.
    k[:, :, key:], v[:, :, key:] = garbage, garbage
    assert_earlier_untouched(*call((q, k, v), grad, is_causal=True)[:2])


@cases("dtype size", triton=KINDS[:2])
@pytest.mark.parametrize("kind", ["diagonal", "bool"])
@pytest.mark.parametrize("queries", [5, 45])
def test_each_query_has_the_infinities_that_it_sees(backend, queries, dtype, size, kind):
    q, k, v = make(backend, 1, 2, queries, 45, size, dtype, kv_heads=1)
    visible = torch.ones(queries, 45, dtype=torch.bool, device=backend.device).tril()
    if kind == "bool":
        visible = backend.draw(queries, 45, seed=4) > 1
        visible[:, 0], visible[2, [1, 3]] = True, True
    v[..., 1, :5], v[..., 3, 3:8], v[..., 20, 9], v[..., 39, 5] = INF, -INF, NAN, -INF
    options = {"is_causal": True} if kind == "diagonal" else {"mask": visible}
    out, grad_q, *_ = call((q, k, v), **options)
    for row in range(queries):
        seen = visible[row]
        alone = F.scaled_dot_product_attention(
            q[:, :, row : row + 1].float(), k[:, :, seen].float(), v[:, :, seen].float(), enable_gqa=True
        )
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == F32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(out[:, :, row : row + 1].float(), alone, equal_nan=True, **tolerance)
        assert grad_q[:, :, row].isfinite().all() == v[:, :, seen].isfinite().all()
    assert out.isinf().any()
    assert out.isnan().any()


@on("cpp")
@pytest.mark.parametrize("queries", [1, 40])
def test_what_is_seen_still_counts(backend, queries):
    """A visible NaN reaches every query that sees it."""
    q, k, v = make(backend, 2, 2, queries, 100, 16, F32)
    v[0, :, 5] = NAN
    k[1, :, 7] = NAN
    assert attention(q, k, v, key_lengths=torch.tensor([90, 90])).isnan().all()
    assert attention(q, k, v, key_lengths=torch.tensor([5, 7])).isfinite().all()


@cases(
    "lowest shape kv_heads dtype",
    cpp=product(
        ["finfo.min", "finfo.min / 2", "finfo.max"], [(2, 2, 1, 70, 16), (2, 2, 19, 70, 16)], [2], DTYPES
    ),
    triton=[
        ("finfo.min", (2, 2, queries, 150, size), 1, dtype)
        for queries, (dtype, size) in product([1, 20], KINDS + CHUNKED)
    ],
)  # fmt: skip
def test_rows_of_the_largest_finite_numbers(backend, lowest, shape, kv_heads, dtype):
    """Hugging Face hides keys in this way. A row that is hidden whole gives what PyTorch gives, a mean of the values;
    and its gradients, for which such a number has swallowed the logarithm of how many keys there are."""
    *_, queries, keys, _ = shape
    inputs, numbers = make(backend, *shape, dtype, kv_heads), torch.finfo(dtype)
    number = {"finfo.min": numbers.min, "finfo.min / 2": numbers.min / 2, "finfo.max": numbers.max}[lowest]
    mask = torch.zeros(2, 1, queries, keys, dtype=dtype, device=backend.device)
    mask[0] = number
    mask[1, ..., 30:] = number
    grad = backend.draw(*inputs[0].shape, dtype=dtype, seed=6)
    found = call(inputs, grad, mask)
    # The largest numbers of float16 leave the scores some digits, those of float64 are exact's own.
    wide = backend.name == "cpp" and dtype in (F16, F64)
    doubles = inputs if wide else [x.double() for x in inputs]
    expected = outputs_and_gradients(
        lambda *x: exact(*x, mask, enable_gqa=True), *doubles, grads=[grad.to(doubles[0].dtype)]
    )
    tolerance = {F64: 1e-12, F32: 1e-5}.get(dtype, 2e-2 if backend.name == "cpp" else 5e-2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@each_dtype(triton=[], cuda=[])
def test_finite_masks_give_no_nan(backend, dtype):
    inputs, numbers = make(backend, 1, 2, 40, 40, 16, dtype), torch.finfo(dtype)
    mask = torch.tensor([numbers.min, numbers.max, 0.0, numbers.tiny, numbers.min / 3], dtype=dtype).repeat(8)
    for attn_mask in (mask, mask.roll(1) * 1.0, mask[:, None].expand(40, 40)):
        assert all(x.isfinite().all() for x in call(inputs, torch.ones_like(inputs[0]), attn_mask))


@on("cpp", "reference")
def test_bool_bytes_other_than_0_and_1_are_true(backend):
    inputs = make(backend, 1, 2, 40, 128, 16, F32)
    visible = torch.rand(40, 128, generator=torch.Generator().manual_seed(3)) < 0.5
    numbers = visible.to(torch.uint8) * torch.randint(1, 256, (40, 128), dtype=torch.uint8)
    expected = attention(*inputs, visible)
    for mask in (numbers, numbers.t().contiguous().t()):  # of columns, which no vector can read
        assert torch.equal(attention(*inputs, mask.view(torch.bool)), expected)
