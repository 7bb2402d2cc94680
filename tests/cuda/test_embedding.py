import pytest
import torch
import torch.nn.functional as F

from tests.cuda.device import DEVICE, DTYPES, ON_GPU, draw, raw
from tests.ops.parity import check_parity
from tinyllm import ops, reference

# ids' shape, V, D: rows that are whole vectors and rows that are not, several loads a thread, several blocks of columns
# (300: backward of single elements has 256 of them, and 32 where rows are joined).
SHAPES = [
    ((), 3, 4), ((1,), 1, 1), ((7,), 5, 3), ((2, 3), 4, 16), ((2, 33), 65, 31), ((2, 2, 2), 7, 300), ((34, 1), 3, 8),
    ((3, 5), 9, 1000), ((2, 2), 3, 4160),
]  # fmt: skip


def make(shape, rows, size, dtype=torch.float32, id_dtype=torch.int64):
    ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(rows)).to(id_dtype)
    positions = draw(shape[-1] if shape else 1, size, dtype=dtype, seed=1)
    return ids.to(DEVICE), draw(rows, size, dtype=dtype), positions


def compare(ids, weight, positions=None):
    inputs = (weight,) if positions is None else (weight, positions)
    check_parity(
        lambda w, *p: ops.embedding(ids, w, positions=p[0] if p else None),
        lambda w, *p: F.embedding(ids, w) + (p[0] if p else 0),
        lambda w, *p: reference.embedding(ids, w, positions=p[0] if p else None),
        inputs,
    )
    assert ops.last_backend() == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rows", "size"), SHAPES, ids=str)
def test_parity(shape, rows, size, dtype):
    ids, weight, positions = make(shape, rows, size, dtype)
    compare(ids, weight, None if shape == () else positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_int32_and_without_positions(dtype):
    ids, weight, _ = make((2, 17), 5, 24, dtype, torch.int32)
    compare(ids, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [33, 48])
def test_the_values_are_exactly_pytorchs(size, dtype):
    ids, weight, positions = make((3, 20), 65, size, dtype)
    assert torch.equal(ops.embedding(ids, weight), F.embedding(ids, weight))
    assert torch.equal(ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions)


# Of equal ids: within a block of 32, across a border, over whole blocks, one for each token, and more blocks than are
# joined at once.
@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize(("lengths", "dtype"), [
    *(([3, 29, 32], dtype) for dtype in DTYPES), ([31, 2, 31], torch.float32), ([10, 100, 20], torch.float16),
    ([32, 32, 6], torch.float32), ([1] * 70, torch.bfloat16), ([33] * 4, torch.float32), ([64], torch.float32),
    ([95, 1, 1], torch.float32), ([1, 63, 1], torch.float32), ([1100, 2], torch.float32), ([5, 1200], torch.bfloat16),
], ids=str)  # fmt: skip
def test_runs_of_equal_ids(lengths, dtype, size):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    backward = raw().embedding_bwd
    grad = draw(len(ids), size, dtype=dtype)
    ours, _ = backward(grad, ids, len(lengths) + 1, None, True, False)
    exact = torch.zeros(len(lengths) + 1, size, dtype=torch.float64, device=DEVICE).index_add_(0, ids, grad.double())
    torch.testing.assert_close(
        ours,
        exact.to(dtype),
        atol=3e-5 if dtype == torch.float32 else None,
        rtol=None if dtype != torch.float32 else 1e-5,
    )
    assert torch.equal(ours, backward(grad, ids, len(lengths) + 1, None, True, False)[0])
    assert torch.equal(ours, backward(grad, ids.int(), len(lengths) + 1, None, True, False)[0])
    padded, _ = backward(grad, ids, len(lengths) + 1, len(lengths) // 2, True, False)
    ours[len(lengths) // 2] = 0
    assert torch.equal(padded, ours)


def test_runs_out_of_range_are_no_run():
    """At the beginning and at the end of what is sorted, over borders of blocks, and in tables of no rows at all."""
    ids = torch.tensor([-1] * 40 + [2] * 3 + [7] * 50 + [-9] * 30, device=DEVICE)
    grad = draw(len(ids), 8)
    for given in (ids, ids.int()):
        ours, _ = raw().embedding_bwd(grad, given, 4, None, True, False)
        exact = torch.zeros(4, 8, device=DEVICE)
        exact[2] = grad[40:43].sum(0)
        torch.testing.assert_close(ours, exact)
        assert raw().embedding_bwd(grad, given, 0, None, True, False)[0].shape == (0, 8)


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 33, 70])
@pytest.mark.parametrize("size", [5, 8])
def test_positions_of_many_sequences(batch, size):
    grad, ids = draw(batch, 3, size), torch.zeros(batch, 3, dtype=torch.int64, device=DEVICE)
    _, ours = raw().embedding_bwd(grad, ids, 1, None, False, True)
    torch.testing.assert_close(ours, grad.sum(0), atol=2e-6, rtol=1e-5)
    assert torch.equal(ours, raw().embedding_bwd(grad, ids, 1, None, False, True)[1])


@pytest.mark.parametrize("padding_idx", [0, -1])
def test_padding_gets_no_gradient(padding_idx):
    ids, weight, positions = make((2, 30), 6, 8)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    ours = ops.embedding(ids, leaves[0], padding_idx, positions=leaves[1])
    theirs = F.embedding(ids, leaves[0], padding_idx) + leaves[1]
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("size", [5, 8])
def test_an_id_out_of_range_gives_nan_and_no_gradient(id_dtype, size):
    far = 2**32 + 1 if id_dtype == torch.int64 else 2**31 - 1
    ids = torch.tensor([[0, -1, 3], [4, 1, far]], dtype=id_dtype, device=DEVICE)
    weight, positions = (draw(n, size).requires_grad_() for n in (4, 3))
    y = ops.embedding(ids, weight, positions=positions)
    known = torch.tensor([[True, False, True], [False, True, False]], device=DEVICE)
    assert torch.equal(y.isnan(), ~known[..., None].expand(2, 3, size))
    assert torch.equal(ops.embedding(ids, weight).isnan(), y.isnan())
    grad_weight, grad_positions = torch.autograd.grad(y.nan_to_num().sum(), (weight, positions))
    theirs = ops.embedding(ids.clamp(0, 3), weight, positions=positions)
    assert torch.equal(y[known], theirs[known])
    wanted = torch.autograd.grad(theirs[known].sum(), weight, retain_graph=True)[0]
    torch.testing.assert_close(grad_weight, wanted)
    assert not grad_positions.isnan().any()


# Of weight (20, 24) and positions (20, 24): rows apart, a misaligned begin, columns apart, one row or column for all.
@pytest.mark.parametrize("make_view", [
    lambda x: x[::2, :16], lambda x: x[:, 1:17], lambda x: x[:, ::3], lambda x: x.t(), lambda x: x[:1].expand(20, 24),
    lambda x: x[:, :1].expand(20, 24), lambda x: x.view(-1)[1:449].view(28, 16), lambda x: x[:, :21],
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(make_view, dtype):
    weight = make_view(draw(20, 24, dtype=dtype))
    positions = make_view(draw(20, 24, dtype=dtype, seed=1))[:5]
    ids = torch.arange(60, device=DEVICE).view(6, 10)[:, ::2] % weight.size(0)
    compare(ids, weight, positions)
    compare(ids.t()[:, :5], weight.contiguous(), positions)


def test_an_expanded_and_a_misaligned_gradient():
    ids, weight, positions = make((2, 30), 6, 8)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    buffer = draw(2 * 30 * 8 + 1)
    for grad in (draw(1, 1, 8).expand(2, 30, 8), buffer[1:].view(2, 30, 8), draw(2, 8, 30).transpose(1, 2)):
        ours, theirs = (
            torch.autograd.grad(y, leaves, grad)
            for y in (ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "rows", "size"), [((0,), 4, 3), ((2, 0), 4, 3), ((0, 2), 4, 3), ((2, 3), 4, 0), ((0,), 0, 3)]
)
def test_empty(shape, rows, size):
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    weight, positions = (torch.randn(n, size, device=DEVICE, requires_grad=True) for n in (rows, shape[-1]))
    y = ops.embedding(ids, weight, positions=positions)
    assert y.shape == (*shape, size)
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (weight, positions)), (weight, positions), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_only_what_is_wanted_is_computed():
    ids, weight, positions = make((2, 3), 4, 5)
    (grad,) = torch.autograd.grad(ops.embedding(ids, weight, positions=positions.requires_grad_()).sum(), positions)
    assert torch.equal(grad, torch.full_like(positions, 2.0))
    (grad,) = torch.autograd.grad(
        ops.embedding(ids, weight.requires_grad_(), positions=positions.detach()).sum(), weight
    )
    assert grad.sum().item() == 30.0


def test_what_the_kernel_refuses():
    ids, weight, positions = make((2, 3), 4, 5)
    rng, grad = torch.tensor([1, 2], device=DEVICE), draw(2, 3, 5)
    forward, backward = raw().embedding_fwd, raw().embedding_bwd
    for call, words in [
        (lambda: forward(ids, weight.double(), None), "no CUDA kernel for dtype Double"),
        (lambda: forward(ids, weight, positions, 0.5, rng), "the CUDA kernel drops nothing"),
        (lambda: forward(ids, weight, positions, 0.0, rng), "the CUDA kernel drops nothing"),
        (lambda: backward(grad, ids, 4, None, True, True, 0.5, rng), "the CUDA kernel drops nothing"),
        (lambda: forward(ids.short(), weight, None), "int64 or int32 is needed"),
        (lambda: forward(ids, weight, positions[:2]), r"positions has shape \[2, 5\]; \[3, 5\] is needed"),
        (lambda: backward(grad[:1], ids, 4, None, True, True), r"grad has shape \[1, 3, 5\]"),
    ]:
        with pytest.raises(Exception, match=words):
            call()


def test_double_backward():
    ids, weight, positions = make((2, 3), 4, 3)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    results = []
    for y in (ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions):
        grads = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves))
    torch.testing.assert_close(*results)


def test_opcheck():
    ids, weight, positions = make((2, 3), 4, 5)
    grad = draw(2, 3, 5)
    torch.library.opcheck(raw().embedding_fwd, (ids, weight, positions))
    torch.library.opcheck(raw().embedding_fwd, (ids.int(), weight.bfloat16(), None))
    torch.library.opcheck(raw().embedding_bwd, (grad, ids, 4, 1, True, True))
    torch.library.opcheck(raw().embedding_bwd, (grad, ids, 4, None, False, True))


def test_compile_fullgraph():
    ids, weight, positions = make((2, 3), 4, 5)
    leaves = weight.requires_grad_(), positions.requires_grad_()

    def f(w, p):
        return ops.embedding(ids, w, positions=p) * 2

    backend = "inductor" if ON_GPU else "aot_eager"
    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True, backend=backend)(*leaves)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to capture a graph of")
@pytest.mark.parametrize("tokens", [100, 20_000])
def test_cuda_graph(tokens):
    ids, weight, positions = make((2, tokens // 2), 50, 64, torch.bfloat16)
    leaves = weight.requires_grad_(), positions.requires_grad_()

    def step():
        y = ops.embedding(ids, weight, positions=positions)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
