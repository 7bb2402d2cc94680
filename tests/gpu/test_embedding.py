import pytest
import torch
import torch.nn.functional as F

from tests.gpu.device import DEVICE, draw
from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference

# ids' shape, V, D; backward takes 32 tokens at a time, and up to 256 columns.
SHAPES = [
    ((), 3, 4), ((1,), 1, 1), ((7,), 5, 3), ((2, 3), 4, 16), ((2, 33), 65, 31), ((2, 2, 2), 7, 300), ((34, 1), 3, 4),
]  # fmt: skip


def make(shape, rows, size, dtype, id_dtype=torch.int64):
    ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(rows)).to(id_dtype)
    positions = draw(shape[-1] if shape else 1, size, dtype=dtype, seed=1)
    return ids.to(DEVICE), draw(rows, size, dtype=dtype), positions


def reseeded(function):
    """Draws the same dropout at each call."""

    def call(*arguments, **options):
        torch.manual_seed(7)
        return function(*arguments, **options)

    return call


def factors_of(ids, size, p):
    """What such a call multiplies the sum by, read from a table of ones."""
    ones = torch.ones(int(ids.max()) + 1, size, dtype=torch.float64, device=DEVICE)
    return reseeded(ops.embedding)(ids, ones, dropout_p=p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rows", "size"), SHAPES, ids=str)
def test_parity(shape, rows, size, dtype):
    ids, weight, positions = make(shape, rows, size, dtype)
    with_positions = shape != ()
    check_parity(
        lambda w, *p: ops.embedding(ids, w, positions=p[0] if p else None),
        lambda w, *p: F.embedding(ids, w) + (p[0] if p else 0),
        lambda w, *p: reference.embedding(ids, w, positions=p[0] if p else None),
        (weight, positions) if with_positions else (weight,),
    )
    assert ops.last_backend() == "triton"


def test_ids_with_gaps_between_them():
    """As every third token of a longer text has, whose rows together still are one evenly spaced row."""
    ids, weight, _ = make((2, 9), 65, 5, torch.float32)
    assert not ids[:, ::3].is_contiguous()
    assert torch.equal(ops.embedding(ids[:, ::3], weight), F.embedding(ids[:, ::3], weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rows", "size"), [((5,), 3, 1), ((2, 9), 65, 31), ((1, 2), 7, 300)], ids=str)
def test_dropout_parity_with_the_same_mask(shape, rows, size, dtype):
    ids, weight, positions = make(shape, rows, size, dtype)
    factors = factors_of(ids, size, 0.3)
    exact = lambda w, p: reference.embedding(ids, w, positions=p, factors=factors.to(w.dtype))  # noqa: E731
    check_parity(
        reseeded(lambda w, p: ops.embedding(ids, w, positions=p, dropout_p=0.3)), exact, exact, (weight, positions)
    )
    assert ops.last_backend() == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_int32_and_without_positions(dtype):
    ids, weight, _ = make((2, 17), 5, 12, dtype, torch.int32)
    check_parity(
        lambda w: ops.embedding(ids, w), lambda w: F.embedding(ids, w), lambda w: reference.embedding(ids, w), (weight,)
    )


def test_the_values_are_exactly_pytorchs():
    for dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off
        ids, weight, positions = make((3, 20), 65, 33, dtype)
        assert torch.equal(ops.embedding(ids, weight), F.embedding(ids, weight))
        assert torch.equal(ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions)


# Of equal ids: within a block, across a border, over whole blocks, one for each token, and more than 32 blocks of one.
@pytest.mark.parametrize(("lengths", "dtype"), [
    *(([3, 29, 32], dtype) for dtype in DTYPES), ([31, 2, 31], torch.float64), ([10, 100, 20], torch.float16),
    ([32, 32, 6], torch.float64), ([1] * 70, torch.float64), ([33] * 4, torch.float32),
    ([64], torch.float64), ([95, 1, 1], torch.float64),
], ids=str)  # fmt: skip
def test_runs_of_equal_ids(lengths, dtype):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    raw = torch.ops.tinyllm_triton.embedding_bwd
    grad = draw(len(ids), 4, dtype=dtype)
    ours, _ = raw(grad, ids, len(lengths) + 1, None, True, False)
    exact = torch.zeros(len(lengths) + 1, 4, dtype=torch.float64, device=DEVICE).index_add_(0, ids, grad.double())
    torch.testing.assert_close(ours, exact.to(dtype))
    assert torch.equal(ours, raw(grad, ids, len(lengths) + 1, None, True, False)[0])
    padded, _ = raw(grad, ids, len(lengths) + 1, len(lengths) // 2, True, False)
    ours[len(lengths) // 2] = 0
    assert torch.equal(padded, ours)


def test_a_run_over_more_blocks_than_are_joined_at_once():
    ids, grad = torch.ones(1050, dtype=torch.int64, device=DEVICE), draw(1050, 4, dtype=torch.float64)
    ours, _ = torch.ops.tinyllm_triton.embedding_bwd(grad, ids, 2, None, True, False)
    torch.testing.assert_close(ours[1], grad.sum(0))
    assert torch.equal(ours[0], torch.zeros_like(ours[0]))


@pytest.mark.parametrize("padding_idx", [0, -1])
def test_padding_gets_no_gradient(padding_idx):
    ids, weight, positions = make((2, 30), 6, 8, torch.float64)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    ours = ops.embedding(ids, leaves[0], padding_idx, positions=leaves[1])
    theirs = F.embedding(ids, leaves[0], padding_idx) + leaves[1]
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_an_id_out_of_range_gives_nan_and_no_gradient(id_dtype, dropout_p):
    far = 2**32 + 1 if id_dtype == torch.int64 else 2**31 - 1
    ids = torch.tensor([[0, -1, 3], [4, 1, far]], dtype=id_dtype, device=DEVICE)
    weight, positions = (draw(n, 5, dtype=torch.float64).requires_grad_() for n in (4, 3))
    y = reseeded(ops.embedding)(ids, weight, positions=positions, dropout_p=dropout_p)
    known = torch.tensor([[True, False, True], [False, True, False]], device=DEVICE)
    assert torch.equal(y.isnan(), ~known[..., None].expand(2, 3, 5))
    grad_weight, grad_positions = torch.autograd.grad(y.nan_to_num().sum(), (weight, positions))
    theirs = reseeded(ops.embedding)(ids.clamp(0, 3), weight, positions=positions, dropout_p=dropout_p)
    assert torch.equal(y[known], theirs[known])
    wanted = torch.autograd.grad(theirs[known].sum(), weight, retain_graph=True)[0]
    torch.testing.assert_close(grad_weight, wanted)
    assert not grad_positions.isnan().any()


def test_any_strides_and_an_expanded_gradient():
    ids = torch.arange(60, device=DEVICE).view(6, 10)[:, ::2].t() % 9
    weight = draw(16, 18, dtype=torch.float64)[::2].t()[:9].requires_grad_()
    positions = draw(8, 1, dtype=torch.float64)[:6].expand(6, 8).requires_grad_()
    leaves = weight, positions
    ours, theirs = ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "rows", "size"), [((0,), 4, 3), ((2, 0), 4, 3), ((0, 2), 4, 3), ((2, 3), 4, 0), ((0,), 0, 3)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(shape, rows, size, dropout_p):
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    weight, positions = (torch.randn(n, size, device=DEVICE, requires_grad=True) for n in (rows, shape[-1]))
    y = ops.embedding(ids, weight, positions=positions, dropout_p=dropout_p)
    assert y.shape == (*shape, size)
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (weight, positions)), (weight, positions), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_only_what_is_wanted_is_computed():
    ids, weight, positions = make((2, 3), 4, 5, torch.float32)
    (grad,) = torch.autograd.grad(ops.embedding(ids, weight, positions=positions.requires_grad_()).sum(), positions)
    assert torch.equal(grad, torch.full_like(positions, 2.0))
    (grad,) = torch.autograd.grad(
        ops.embedding(ids, weight.requires_grad_(), positions=positions.detach()).sum(), weight
    )
    assert grad.sum().item() == 30.0


def test_the_seed_decides():
    ids, weight, _ = make((3, 20), 65, 33, torch.float32)
    first, again = (reseeded(ops.embedding)(ids, weight, dropout_p=0.5) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, ops.embedding(ids, weight, dropout_p=0.5))
    kept = (first != 0).double().mean().item()
    assert abs(kept - 0.5) < 5 * 0.5 / (3 * 20 * 33) ** 0.5


def test_everything_dropped():
    ids, weight, positions = make((3, 20), 65, 33, torch.float32)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    out = ops.embedding(ids, leaves[0], positions=leaves[1], dropout_p=1.0)
    for x in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_and_double_backward(dropout_p):
    ids, weight, positions = make((2, 3), 4, 3, torch.float64)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    f = reseeded(lambda w, p: ops.embedding(ids, w, positions=p, dropout_p=dropout_p))
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda w, p: f(w, p).pow(2), leaves, fast_mode=True)


def test_opcheck():
    ids, weight, positions = make((2, 3), 4, 5, torch.float32)
    rng = torch.tensor([1, 2], device=DEVICE)
    raw, grad = torch.ops.tinyllm_triton, draw(2, 3, 5)
    torch.library.opcheck(raw.embedding_fwd, (ids, weight, positions))
    torch.library.opcheck(raw.embedding_fwd, (ids.int(), weight.bfloat16(), None))
    torch.library.opcheck(raw.embedding_fwd, (ids, weight, positions, 0.5, rng))
    torch.library.opcheck(raw.embedding_bwd, (grad, ids, 4, 1, True, True))
    torch.library.opcheck(raw.embedding_bwd, (grad, ids, 4, None, False, True, 0.5, rng))
    with pytest.raises(ValueError, match="dropout needs rng"):
        raw.embedding_fwd(ids, weight, positions, 0.5, None)


def test_compile_fullgraph():
    ids, weight, positions = make((2, 3), 4, 5, torch.float32)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"

    def f(w, p):
        return ops.embedding(ids, w, positions=p) * 2

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True, backend=backend)(*leaves)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.equal(a, b)
    dropped = torch.compile(
        reseeded(lambda w, p: ops.embedding(ids, w, positions=p, dropout_p=0.5)), fullgraph=False, backend=backend
    )(*[torch.ones_like(x).requires_grad_() for x in leaves])
    assert set(dropped.unique().tolist()) <= {0.0, 4.0}
