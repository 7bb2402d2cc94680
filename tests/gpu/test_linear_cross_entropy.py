import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.device import DEVICE, draw
from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference
from tinyllm.kernels import linear_cross_entropy as kernels

# The interpreter's numpy tells of every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# N, D, C; the last three are several blocks, of which the last is not whole.
SHAPES = [(1, 1, 1), (3, 2, 5), (5, 20, 300), (9, 64, 257), (7, 7, 60)]


@pytest.fixture(autouse=True)
def _in_small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_ROWS", 4)
    monkeypatch.setattr(kernels, "ROWS_MULTIPLE", 2)


def make(shape, dtype=torch.float64, ignored=()):
    """Input, linear weight, linear bias, targets of which the rows `ignored` are, and positive class weights."""
    rows, features, classes = shape
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(sum(shape)))
    for row in ignored:
        target[row] = -100
    floats = (
        draw(rows, features, seed=1), 2 * draw(classes, features, seed=2) / math.sqrt(features), draw(classes, seed=3),
        0.2 + draw(classes, seed=4).abs(),
    )  # fmt: skip
    x, w, b, weight = (t.to(dtype) for t in floats)
    return x, w, b, target.to(DEVICE), weight


def torchs(input, linear_weight, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def compare(inputs, target, **options):
    """Ours against PyTorch's and the reference, loss and gradients, with a random upstream gradient."""
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def call(function, options):
        return lambda x, w, b=None: function(x, w, target, linear_bias=b, **options)

    if inputs[0].dtype == torch.float64:
        # PyTorch's own result is the exact one then, and its sums are rounded in another order.
        ours, theirs = (values(f, inputs, target, **options) for f in (ops.linear_cross_entropy, torchs))
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-13 * max(1.0, b.abs().max())
    else:
        check_parity(
            call(ops.linear_cross_entropy, options),
            call(torchs, options),
            call(reference.linear_cross_entropy, double),
            inputs,
        )
    assert ops.last_backend() == "triton"


def values(function, inputs, *arguments, **options):
    """Loss and the gradients of its sum, NaN and all."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(*leaves[:2], *arguments, linear_bias=leaves[2] if len(leaves) > 2 else None, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, bias, dtype):
    x, w, b, target, _ = make(shape, dtype)
    compare((x, w, b) if bias else (x, w), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("reduction", "weighted", "smoothing"), list(itertools.product(["mean", "sum", "none"], [False, True], [0.0, 0.1]))
)
def test_options(reduction, weighted, smoothing, dtype):
    x, w, b, target, weight = make((6, 20, 30), dtype, ignored=(0, 5))
    compare((x, w, b), target, weight=weight if weighted else None, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_of_the_gradients(needed, reduction):
    x, w, b, target, _ = make((5, 24, 30))
    found = []
    for f in (ops.linear_cross_entropy, torchs):
        inputs = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
        loss = f(*inputs[:2], target, linear_bias=inputs[2], reduction=reduction)
        found.append([loss, *torch.autograd.grad(loss.sum(), [t for t in inputs if t.requires_grad])])
    torch.testing.assert_close(*found)


def test_loss_alone_is_the_loss_with_gradients():
    x, w, b, target, _ = make((12, 24, 30), torch.float32)
    alone = ops.linear_cross_entropy(x, w, target, linear_bias=b)
    assert torch.equal(alone, ops.linear_cross_entropy(x, w.requires_grad_(), target, linear_bias=b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_rows_ignored_or_of_weight_zero(reduction, dtype):
    x, w, b, _, _ = make((10, 8, 20), dtype)
    for target, weight in ((-100, None), (1, torch.zeros(20, dtype=dtype, device=DEVICE))):
        arguments = (torch.full((10,), target, device=DEVICE),)
        ours, theirs = (
            values(f, (x, w, b), *arguments, weight=weight, reduction=reduction)
            for f in (ops.linear_cross_entropy, torchs)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("bad", [60, -1, 2**40])
def test_a_target_out_of_range_gives_nan(bad):
    x, w, _, target, _ = make((9, 7, 60))
    target[4] = bad
    loss, grad_x, grad_w = values(ops.linear_cross_entropy, (x, w), target, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[4]]
    assert grad_x.isnan().all(1).nonzero().tolist() == [[4]]
    assert not grad_x[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    assert grad_w.isnan().all()


def test_any_strides():
    x, w, b, target, _ = make((10, 24, 64))
    compare((x.t().contiguous().t(), w[::2, :], b[::2]), target % 32)
    compare((x[::2, 1:], w.flip(0)[:, 1:], b.flip(0)), target.repeat(2)[::4])
    compare((x[:, :1].expand(-1, 24), w[:1].expand(64, -1), b[:1].expand(64)), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_twice_with_different_gradients(reduction, dtype):
    """Forward computes the gradients; what comes after the first backward must not depend on what became of them."""
    x, w, b, target, _ = make((5, 12, 50), dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=b, reduction=reduction)
    exact = values(torchs, [t.double() for t in (x, w, b)], target, reduction=reduction)[1:]
    # Gradients of logits that are rounded to 16 bits, and sums of up to 50 of these.
    tolerance = dict.fromkeys(("rtol", "atol"), (64 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps)
    for factor in (1.0, 1.0, -2.5):
        grads = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        for grad, right in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad.double(), factor * right, **tolerance)
            grad.fill_(77.0)
    loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=b, reduction=reduction)
    for grad, right in zip(torch.autograd.grad(loss * 3.0, leaves), exact, strict=True):
        torch.testing.assert_close(grad.double(), 3 * right, **tolerance)


def test_float16_gradients_survive_loss_scaling():
    # 1 / rows / classes would be lost in float16 before the scale comes.
    rows, classes = 12, 20_000
    x = torch.ones(rows, 1, dtype=torch.float16, device=DEVICE)
    w = torch.zeros(classes, 1, dtype=torch.float16, device=DEVICE, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(x, w, target).float() * 2.0**10, w)
    expected = torch.full_like(grad[1:], 2.0**10 / classes, dtype=torch.float32)
    torch.testing.assert_close(grad[1:].float(), expected, rtol=3e-3, atol=0)


def test_blocks_of_rows(monkeypatch):
    monkeypatch.undo()
    found = [kernels.block_rows(rows) for rows in (1, 700, 2048, 2049, 5000, 32_768, 100_000)]
    assert found == [256, 768, 2048, 1280, 1792, 2048, 6400]


def test_the_same_bits_again():
    x, w, b, target, weight = make((11, 20, 30), torch.float32)
    first, second = (
        values(ops.linear_cross_entropy, (x, w, b), target, weight=weight, label_smoothing=0.1) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck_and_double_backward():
    x, w, b, target, weight = make((5, 2, 3))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for reduction in ("mean", "none"):
        options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
        f = lambda x, w, b, o=options: ops.linear_cross_entropy(x, w, target, linear_bias=b, **o)  # noqa: E731
        assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_opcheck():
    x, w, b, target, weight = make((5, 10, 30), torch.float32)
    raw = torch.ops.tinyllm_triton
    averaged, apart = ((x, w, target, b, weight, reduction, -100, 0.1) for reduction in (1, 0))
    torch.library.opcheck(raw.linear_cross_entropy_fwd, (*averaged, True, True, True))
    torch.library.opcheck(raw.linear_cross_entropy_fwd, (*apart, False, False, False))
    loss = raw.linear_cross_entropy_fwd(*apart, False, False, False)[0]
    torch.library.opcheck(raw.linear_cross_entropy_bwd, (loss, *apart, True, False, True))
    low = (x.bfloat16(), w.bfloat16(), target, None, None, 1, -100, 0.0, True, True, False)
    torch.library.opcheck(raw.linear_cross_entropy_fwd, low)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_fullgraph(reduction, dtype):
    x, w, b, target, weight = make((5, 10, 30), dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def f(x, w, b):
        return 2 * ops.linear_cross_entropy(x * 3, w, target, linear_bias=b, weight=weight, reduction=reduction)

    eager = f(*leaves)
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_projects_in_its_dtype_and_gives_float32(dtype):
    x, w, b, target, _ = make((9, 16, 30), dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, theirs = (values(f, (x, w, b), target) for f in (ops.linear_cross_entropy, torchs))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
