import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import cases, each_dtype, on, with_dtypes
from tests.ops.parity import (
    DTYPES,
    assert_equal,
    assert_same_bits,
    check_parity,
    outputs_and_gradients,
    second_gradients,
)  # fmt: skip
from tinyllm import ops, reference

F64, F32, BF16, F16 = DTYPES
# ids' shape, V, D
SHAPES = {
    "cpp": [
        ((), 3, 4), ((1,), 1, 1), ((7,), 5, 3), ((2, 3), 4, 16), ((3, 129), 65, 31), ((2, 2, 5), 7, 64),
        ((4, 50), 5000, 37), ((12, 64), 65, 128),
    ],
    # Backward takes 32 tokens at a time, and up to 256 columns.
    "triton": [
        ((), 3, 4), ((1,), 1, 1), ((7,), 5, 3), ((2, 3), 4, 16), ((2, 33), 65, 31), ((2, 2, 2), 7, 300),
        ((34, 1), 3, 4),
    ],
    # Rows that are whole vectors and rows that are not, several loads a thread, several blocks of columns (300:
    # backward of single elements has 256 of them, and 32 where rows are joined).
    "cuda": [
        ((), 3, 4), ((1,), 1, 1), ((7,), 5, 3), ((2, 3), 4, 16), ((2, 33), 65, 31), ((2, 2, 2), 7, 300),
        ((34, 1), 3, 8), ((3, 5), 9, 1000), ((2, 2), 3, 4160),
    ],
}  # fmt: skip
# With the type of the ids, and whether there are positions, which a single id has not.
PARITY = {
    "cpp": [
        (*sizes, id_dtype, positions)
        for sizes in SHAPES["cpp"]
        for id_dtype in (torch.int64, torch.int32)
        for positions in {False, sizes[0] != ()}
    ],
    **{
        name: [*((*sizes, torch.int64, sizes[0] != ()) for sizes in SHAPES[name]), ((2, 17), 5, 24, torch.int32, False)]
        for name in ("triton", "cuda")
    },
}
DROPPED = {
    "cpp": [(*sizes, positions) for sizes in SHAPES["cpp"] for positions in {False, sizes[0] != ()}],
    "triton": [((5,), 3, 1, True), ((2, 9), 65, 31, True), ((1, 2), 7, 300, True)],
}


def make(backend, shape, rows, size, dtype=None, id_dtype=torch.int64):
    dtype = dtype or backend.dtypes[0]
    ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(rows)).to(id_dtype)
    positions = backend.draw(shape[-1] if shape else 1, size, dtype=dtype, seed=1)
    return ids.to(backend.device), backend.draw(rows, size, dtype=dtype), positions


def reseeded(function):
    """Make a function draw the same dropout at each call."""

    def call(*arguments, **options):
        torch.manual_seed(7)
        return function(*arguments, **options)

    return call


def embed(ids, **options):
    """Return a function of the weight and the positions, where there are some."""
    return lambda w, *p: ops.embedding(ids, w, positions=p[0] if p else None, **options)


def factors_of(backend, ids, size, p):
    """Return what a reseeded call with dropout multiplies the sum by, read from a table of ones."""
    ones = torch.ones(int(ids.max()) + 1, size, dtype=F64, device=backend.device)
    return reseeded(ops.embedding)(ids, ones, dropout_p=p)


def compare(backend, ids, *tensors):
    check_parity(
        embed(ids),
        lambda w, *p: F.embedding(ids, w) + (p[0] if p else 0),
        lambda w, *p: reference.embedding(ids, w, positions=p[0] if p else None),
        tensors,
    )
    assert ops.last_backend() == backend.name


@cases("shape rows size id_dtype with_positions dtype", **with_dtypes(PARITY))
def test_parity(backend, shape, rows, size, id_dtype, with_positions, dtype):
    ids, weight, positions = make(backend, shape, rows, size, dtype, id_dtype)
    compare(backend, ids, weight, *([positions] if with_positions else []))


@each_dtype(cpp=[F32], triton=[F32, F16])  # Triton's interpreter cuts bfloat16 off
@pytest.mark.parametrize("size", [33, 48])
def test_the_values_are_exactly_pytorchs(backend, size, dtype):
    ids, weight, positions = make(backend, (3, 20), 65, size, dtype)
    assert torch.equal(ops.embedding(ids, weight), F.embedding(ids, weight))
    assert torch.equal(ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions)


# Of equal ids: within a block of 32, across a border, over whole blocks, one for each token, and more blocks than are
# joined at once.
RUNS = {
    "triton": [
        *(([3, 29, 32], 4, dtype) for dtype in DTYPES), ([31, 2, 31], 4, F64), ([10, 100, 20], 4, F16),
        ([32, 32, 6], 4, F64), ([1] * 70, 4, F64), ([33] * 4, 4, F32), ([64], 4, F64), ([95, 1, 1], 4, F64),
    ],
    "cuda": [
        (lengths, size, dtype)
        for lengths, dtype in (
            *(([3, 29, 32], dtype) for dtype in DTYPES[1:]), ([31, 2, 31], F32), ([10, 100, 20], F16),
            ([32, 32, 6], F32), ([1] * 70, BF16), ([33] * 4, F32), ([64], F32), ([95, 1, 1], F32), ([1, 63, 1], F32),
            ([1100, 2], F32), ([5, 1200], BF16),
        )
        for size in (3, 8)
    ],
}  # fmt: skip


@cases("lengths size dtype", **RUNS)
def test_runs_of_equal_ids(backend, lengths, size, dtype):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to(backend.device)
    grad, rows = backend.draw(len(ids), size, dtype=dtype), len(lengths) + 1

    def backward(ids, padding_idx=None):
        return backend.raw.embedding_bwd(grad, ids, rows, padding_idx, True, False)[0]

    ours = backward(ids)
    exact = torch.zeros(rows, size, dtype=F64, device=backend.device).index_add_(0, ids, grad.double())
    torch.testing.assert_close(ours, exact.to(dtype), **({"atol": 3e-5, "rtol": 1e-5} if dtype == F32 else {}))
    assert torch.equal(ours, backward(ids))
    if backend.name == "cuda":
        assert torch.equal(ours, backward(ids.int()))
    padded = backward(ids, len(lengths) // 2)
    ours[len(lengths) // 2] = 0
    assert torch.equal(padded, ours)


@on("triton")
def test_a_run_over_more_blocks_than_are_joined_at_once(backend):
    ids, grad = torch.ones(1050, dtype=torch.int64, device=backend.device), backend.draw(1050, 4, dtype=F64)
    ours, _ = backend.raw.embedding_bwd(grad, ids, 2, None, True, False)
    torch.testing.assert_close(ours, torch.stack([torch.zeros_like(grad[0]), grad.sum(0)]))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_gets_no_gradient(backend, padding_idx):
    ids, *tensors = make(backend, (2, 30), 6, 8)
    found = outputs_and_gradients(embed(ids, padding_idx=padding_idx), *tensors)
    theirs = outputs_and_gradients(lambda w, p: F.embedding(ids, w, padding_idx) + p, *tensors)
    torch.testing.assert_close(found, theirs)


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
@pytest.mark.parametrize("grad", [True, False])
def test_an_id_out_of_range_is_named(name, bad, grad):
    ids = torch.tensor([[0, 3], [bad, 1]], dtype=torch.int32)
    with ops.backend(name), pytest.raises(IndexError, match=rf"the token id {bad}; ids must be in 0 \.\. 3"):
        ops.embedding(ids, torch.ones(4, 2, requires_grad=grad))


@cases("dropout_p size", triton=[(0.0, 5), (0.5, 5)], cuda=[(0.0, 5), (0.0, 8)])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
def test_an_id_out_of_range_gives_nan_and_no_gradient(backend, dropout_p, id_dtype, size):
    far = 2**32 + 1 if id_dtype == torch.int64 else 2**31 - 1
    ids = backend.tensor([[0, -1, 3], [4, 1, far]], id_dtype)
    weight, positions = (backend.draw(n, size, dtype=backend.dtypes[0]).requires_grad_() for n in (4, 3))
    f = reseeded(ops.embedding)
    y = f(ids, weight, positions=positions, dropout_p=dropout_p)
    known = backend.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(y.isnan(), ~known[..., None].expand(2, 3, size))
    assert torch.equal(ops.embedding(ids, weight).isnan(), y.isnan())
    grad_weight, grad_positions = torch.autograd.grad(y.nan_to_num().sum(), (weight, positions))
    theirs = f(ids.clamp(0, 3), weight, positions=positions, dropout_p=dropout_p)
    assert torch.equal(y[known], theirs[known])
    torch.testing.assert_close(grad_weight, *torch.autograd.grad(theirs[known].sum(), weight))
    assert not grad_positions.isnan().any()


# Of weight (20, 24) and positions (20, 24): rows apart, a misaligned begin, columns apart, one row or column for all.
@pytest.mark.parametrize("make_view", [
    lambda x: x[::2, :16], lambda x: x[:, 1:17], lambda x: x[:, ::3], lambda x: x.t(), lambda x: x[:1].expand(20, 24),
    lambda x: x[:, :1].expand(20, 24), lambda x: x.view(-1)[1:449].view(28, 16), lambda x: x[:, :21],
], ids=lambda f: "")  # fmt: skip
@each_dtype(cpp=[F64], triton=[F64])
def test_any_strides(backend, make_view, dtype):
    weight = make_view(backend.draw(20, 24, dtype=dtype))
    positions = make_view(backend.draw(20, 24, dtype=dtype, seed=1))[:5]
    # The rows of these ids together are one evenly spaced row.
    ids = torch.arange(60, device=backend.device).view(6, 10)[:, ::2] % weight.size(0)
    compare(backend, ids, weight, positions)
    compare(backend, ids.t()[:, :5], weight.contiguous(), positions)


@pytest.mark.parametrize("make_grad", [
    lambda x: x[:1, :1, :8].expand(2, 30, 8), lambda x: x[:1, :1, :1].expand(2, 30, 8),
    lambda x: x.view(-1)[1 : 2 * 30 * 8 + 1].view(2, 30, 8), lambda x: x[:, :8].transpose(1, 2),
], ids=["one row", "one number", "misaligned", "transposed"])  # fmt: skip
def test_gradients_of_any_strides(backend, make_grad):
    ids, *tensors = make(backend, (2, 30), 6, 8)
    grads = [make_grad(backend.draw(2, 30, 30, dtype=tensors[0].dtype))]
    ours = outputs_and_gradients(embed(ids), *tensors, grads=grads)
    theirs = outputs_and_gradients(lambda w, p: F.embedding(ids, w) + p, *tensors, grads=grads)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@cases("dropout_p", cpp=[0.0, 0.5], triton=[0.0, 0.5], cuda=[0.0])
@pytest.mark.parametrize(
    ("shape", "rows", "size"), [((0,), 4, 3), ((2, 0), 4, 3), ((0, 2), 4, 3), ((2, 3), 4, 0), ((0,), 0, 3)]
)
def test_empty(backend, shape, rows, size, dropout_p):
    ids = torch.zeros(shape, dtype=torch.int64, device=backend.device)
    tensors = backend.draw(rows, size), backend.draw(shape[-1], size)
    y, *grads = outputs_and_gradients(embed(ids, dropout_p=dropout_p), *tensors)
    assert y.shape == (*shape, size)
    assert_equal(grads, [torch.zeros_like(x) for x in tensors])


def test_only_what_is_wanted_is_computed(backend):
    ids, weight, positions = make(backend, (2, 3), 4, 5)
    (grad,) = torch.autograd.grad(ops.embedding(ids, weight, positions=positions.requires_grad_()).sum(), positions)
    assert torch.equal(grad, torch.full_like(positions, 2.0))
    y = ops.embedding(ids, weight.requires_grad_(), positions=positions.detach())
    assert torch.autograd.grad(y.sum(), weight)[0].sum().item() == 30.0


@cases("dropout_p", cpp=[0.0, 0.2], triton=[0.2], cuda=[0.0])
def test_the_same_bits_each_time(backend, dropout_p):
    ids, *tensors = make(backend, *(((16, 700), 300, 72) if backend.name == "cpp" else ((2, 17), 9, 31)), F32)
    f = reseeded(embed(ids, dropout_p=dropout_p))
    assert_same_bits(backend.threads, lambda: outputs_and_gradients(f, *tensors))


@on("cpp", "triton")
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_and_double_backward(backend, dropout_p):
    ids, *tensors = make(backend, (2, 3), 4, 3)
    leaves = [x.requires_grad_() for x in tensors]
    f, fast = reseeded(embed(ids, dropout_p=dropout_p)), backend.name != "cpp"
    assert torch.autograd.gradcheck(f, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda w, p: f(w, p).pow(2), leaves, fast_mode=fast)


@on("cuda")
def test_double_backward(backend):
    ids, *tensors = make(backend, (2, 3), 4, 3)
    theirs = second_gradients(lambda w, p: (F.embedding(ids, w) + p).pow(2), *tensors)
    torch.testing.assert_close(second_gradients(lambda w, p: embed(ids)(w, p).pow(2), *tensors), theirs)


def test_opcheck(backend):
    ids, weight, positions = make(backend, (2, 3), 4, 5, F32)
    forward, backward, grad = backend.raw.embedding_fwd, backend.raw.embedding_bwd, backend.draw(2, 3, 5)
    torch.library.opcheck(forward, (ids, weight, positions))
    torch.library.opcheck(forward, (ids.int(), weight.bfloat16(), None))
    torch.library.opcheck(backward, (grad, ids, 4, 1, True, True))
    torch.library.opcheck(backward, (grad, ids, 4, None, False, True))


def test_compile_fullgraph(backend):
    ids, *tensors = make(backend, (2, 3), 4, 5, F32)
    f = lambda w, p: embed(ids)(w, p) * 2  # noqa: E731
    assert_equal(outputs_and_gradients(backend.compile(f), *tensors), outputs_and_gradients(f, *tensors))


@on("cpp")
def test_export(backend):
    ids, weight, _ = make(backend, (2, 3), 4, 5, F32)

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

        def forward(self, ids):
            return ops.embedding(ids, self.weight)

    with torch.no_grad():
        program = torch.export.export(Table(), (ids,))
    assert any("embedding_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(ids), F.embedding(ids, weight))


@on("cpp", "triton")
class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_the_fraction_kept_and_the_expectation(self, backend, p):
        batch, tokens, size = (8, 130, 257) if backend.name == "cpp" else (3, 40, 65)
        factors = factors_of(backend, torch.zeros(batch, tokens, dtype=torch.int64, device=backend.device), size, p)
        kept = factors != 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
        # Five standard deviations.
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
        # Neither columns nor tokens repeat each other.
        assert abs(kept.double().mean((0, 1)) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / (batch * tokens))
        assert abs(kept.double().mean(2) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / size)
        assert not torch.equal(kept[0], kept[1])

    def test_the_seed_decides(self, backend):
        ids, weight, _ = make(backend, (3, 20), 65, 33)
        first, again = (reseeded(ops.embedding)(ids, weight, dropout_p=0.5) for _ in range(2))
        assert torch.equal(first, again)
        second = ops.embedding(ids, weight, dropout_p=0.5)
        assert not torch.equal(first, second)
        torch.manual_seed(8)
        assert not torch.equal(first, ops.embedding(ids, weight, dropout_p=0.5))

    def test_everything_dropped(self, backend):
        ids, *tensors = make(backend, (3, 20), 65, 33)
        out = outputs_and_gradients(embed(ids, dropout_p=1.0), *tensors)
        assert_equal(out, [torch.zeros_like(x) for x in out])

    def test_padding_gets_no_gradient(self, backend):
        ids, weight, _ = make(backend, (1, 30), 6, 8)
        _, grad = outputs_and_gradients(embed(ids, padding_idx=3, dropout_p=0.5), weight)
        assert grad.eq(0).all(1).tolist() == [row == 3 for row in range(6)]

    def test_the_compiler_and_opcheck(self, backend):
        ids, weight, positions = make(backend, (2, 3), 4, 5, F32)
        rng, grad, raw = backend.tensor([1, 2]), backend.draw(2, 3, 5), backend.raw
        torch.library.opcheck(raw.embedding_fwd, (ids, weight, positions, 0.5, rng))
        torch.library.opcheck(raw.embedding_bwd, (grad, ids, 4, 1, True, True, 0.5, rng))
        torch.library.opcheck(raw.embedding_bwd, (grad, ids, 4, None, False, True, 0.5, rng))
        with pytest.raises((ValueError, RuntimeError), match="dropout needs rng"):
            raw.embedding_fwd(ids, weight, positions, 0.5, None)
        with pytest.raises((ValueError, RuntimeError), match="dropout needs rng"):
            raw.embedding_bwd(grad, ids, 4, None, True, True, 0.5, None)
        compiled = backend.compile(embed(ids, dropout_p=0.5))
        leaves = [torch.ones_like(x).requires_grad_() for x in (weight, positions)]
        first, again = (reseeded(compiled)(*leaves) for _ in range(2))
        assert set(first.unique().tolist()) == {0.0, 4.0}
        assert torch.equal(first, again)
        assert not torch.equal(first, compiled(*leaves))
        (grad,) = torch.autograd.grad(first.sum(), leaves[1])
        assert torch.equal(grad, first.detach().sum(0) / 2)


@cases("shape rows size with_positions dtype", **with_dtypes(DROPPED))
def test_dropout_parity_with_the_same_mask(backend, shape, rows, size, with_positions, dtype):
    ids, weight, positions = make(backend, shape, rows, size, dtype)
    factors = factors_of(backend, ids, size, 0.3)

    def exact(w, *p):
        return reference.embedding(ids, w, positions=p[0] if p else None, factors=factors.to(w.dtype))

    check_parity(
        reseeded(embed(ids, dropout_p=0.3)), exact, exact, (weight, positions) if with_positions else (weight,)
    )
    assert ops.last_backend() == backend.name


@pytest.mark.parametrize(("arguments", "reason"), [
    ({"max_norm": 1.0}, "max_norm changes the weight"),
    ({"sparse": True}, "gradient is dense"),
    ({"scale_grad_by_freq": True}, "not scaled"),
    ({"positions": torch.ones(2, 2, dtype=torch.float64)}, "positions is torch.float64"),
])  # fmt: skip
@on("cpp")
def test_what_the_kernel_has_not_goes_to_pytorch(backend, arguments, reason):
    ids, weight = torch.tensor([0, 3]), torch.full((4, 2), 3.0)
    with pytest.raises(RuntimeError, match=reason):
        ops.embedding(ids, weight, **arguments)
    with ops.backend("reference"):
        torch.manual_seed(0)
        theirs = reference.embedding(ids, weight.clone(), **arguments)
        torch.manual_seed(0)
        torch.testing.assert_close(ops.embedding(ids, weight, **arguments), theirs)


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"input": torch.ones(2, 3)}, TypeError, "input has dtype torch.float32"),
    ({"weight": torch.ones(4, 2, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64"),
    ({"weight": torch.ones(4)}, ValueError, r"weight has shape \[4\]"),
    ({"weight": torch.ones(4, 2, device="meta")}, ValueError, "input is on cpu"),
    ({"padding_idx": 4}, ValueError, r"padding_idx is 4; it must be in -4 \.\. 3"),
    ({"positions": torch.ones(2, 2)}, ValueError, r"positions has shape \[2, 2\]"),
    ({"positions": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "positions has dtype torch.int64"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
])  # fmt: skip
@on("cpp")
def test_bad_input(backend, change, error, says):
    arguments = {"input": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.ones(4, 2)} | change
    with pytest.raises(error, match=says):
        ops.embedding(**arguments)


@on("cpp")
def test_a_raw_call_with_bad_arguments_is_refused(backend):
    ids, weight = torch.tensor([[0, 5]]), torch.ones(4, 2)
    with pytest.raises((ValueError, RuntimeError), match=r"input has the id 5; ids must be in 0 \.\. 3"):
        backend.raw.embedding_fwd(ids, weight, None)
    with pytest.raises((ValueError, RuntimeError), match="positions has shape"):
        backend.raw.embedding_fwd(ids.clamp(max=3), weight, torch.ones(3, 2))
    with pytest.raises((ValueError, RuntimeError), match="grad has shape"):
        backend.raw.embedding_bwd(torch.ones(2, 2, 2), ids.clamp(max=3), 4, None, True, True)
