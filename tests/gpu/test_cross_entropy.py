import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.device import DEVICE, draw
from tests.helpers import losses
from tests.helpers.losses import values
from tests.ops.parity import DTYPES
from tinyllm import ops

# The interpreter's numpy tells of every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# The last two are several tiles of a program; rows of the last begin at any even address.
SHAPES = [(1, 1), (5, 1), (3, 2), (7, 16), (4, 31), (3, 65), (2, 20_000), (3, 50_257)]


def make(shape, dtype=torch.float64, ignored=()):
    return losses.make(draw, shape, dtype, ignored)


compare = functools.partial(losses.compare, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype):
    logits, target, _ = make(shape, dtype)
    compare(logits, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("reduction", "weighted", "smoothing"), list(itertools.product(["mean", "sum", "none"], [False, True], [0.0, 0.1]))
)
def test_options(reduction, weighted, smoothing, dtype):
    logits, target, weight = make((4, 37), dtype, ignored=(2,))
    compare(logits, target, weight=weight if weighted else None, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_options_over_several_tiles(smoothing):
    logits, target, weight = make((3, 20_001), torch.float32)
    compare(logits, target, weight=weight, label_smoothing=smoothing)


def test_an_ignored_class_inside_the_range():
    logits, target, weight = make((12, 3), torch.float32)
    compare(logits, target, weight=weight, ignore_index=1)


@pytest.mark.parametrize("shape", [(5,), (2, 6, 3), (3, 4, 0), (1,), (0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_shapes(shape, reduction):
    if 0 in shape:
        logits, weight = torch.zeros(shape, device=DEVICE), None
        target = torch.full((shape[0], *shape[2:]), -100, device=DEVICE)
    else:
        logits, target, weight = make(shape)
    ours, theirs = (
        values(f, logits, target, weight, reduction=reduction) for f in (ops.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ops.last_backend() == "triton"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction):
    logits, target = draw(3, 9), torch.full((3,), -100, device=DEVICE)
    ours, theirs = (values(f, logits, target, reduction=reduction) for f in (ops.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("classes", "target"), [(3, 0), (41, 20), (9001, 8999)])
def test_special_logits(classes, target, smoothing):
    inf, nan = math.inf, math.nan
    logits = draw(9, classes)
    logits[0, 0] = -inf
    logits[1, classes // 2 :] = -inf
    logits[2, -1] = inf
    logits[3, 1] = nan
    logits[4] = -inf
    logits[5] = nan
    logits[6, 0], logits[6, 1] = nan, inf
    logits[7, 0], logits[7, 1:] = nan, -inf
    targets = torch.full((9,), target, device=DEVICE)
    ours, theirs = (
        values(f, logits, targets, reduction="none", label_smoothing=smoothing)
        for f in (ops.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_huge_logits(smoothing):
    logits, target, _ = make((4, 300), torch.float32)
    compare(logits * 1e4, target, reduction="none", label_smoothing=smoothing)
    # Large, but close to each other: max + log(sum) as one number would be off by 1e-3.
    compare(logits + 1e4, target, reduction="none", label_smoothing=smoothing)


def test_an_ignored_row_is_zero_whatever_its_logits():
    logits = torch.tensor([[math.nan, 1.0], [0.5, -0.5]], device=DEVICE)
    loss, grad = values(ops.cross_entropy, logits, torch.tensor([-100, 0], device=DEVICE))
    torch.testing.assert_close(loss, F.cross_entropy(logits[1:], torch.tensor([0], device=DEVICE)))
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))


def test_a_target_of_weight_zero():
    logits, weight = draw(3, 3), torch.tensor([0.0, 1.0, 2.0], device=DEVICE)
    for target in ([0, 0, 0], [0, 1, 2]):
        arguments = torch.tensor(target, device=DEVICE), weight
        ours, theirs = (values(f, logits, *arguments) for f in (ops.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("bad", [7, -1, 2**40])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_a_target_out_of_range_gives_nan(bad, weighted, smoothing):
    logits, target, weight = make((3, 7))
    options = {"weight": weight if weighted else None, "label_smoothing": smoothing}
    good = values(F.cross_entropy, logits[::2], target[::2], reduction="none", **options)
    target[1] = bad
    loss, grad = values(ops.cross_entropy, logits, target, reduction="none", **options)
    assert loss[1].isnan()
    assert grad[1].isnan().all()
    torch.testing.assert_close([loss[::2], grad[::2]], good)
    loss, grad = values(ops.cross_entropy, logits, target, **options)
    assert loss.isnan()
    assert grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("make_view", [
    lambda x: x.transpose(0, 1), lambda x: x[::2, 1:], lambda x: x[:, :1].expand(-1, 12), lambda x: x.flip(0),
    lambda x: x[:, :15],
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_strides(make_view, dtype):
    logits = make_view(draw(6, 24, dtype=dtype))
    target = torch.arange(2 * logits.size(0), device=DEVICE)[::2] % logits.size(1)
    weight = draw(2 * logits.size(1), dtype=dtype).abs()[::2]
    compare(logits, target, weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_twice_with_different_gradients(reduction, dtype):
    """Forward writes the gradient once; what comes after the first backward must not depend on what became of it."""
    logits, target, _ = make((3, 50), dtype)
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, target, reduction=reduction)
    exact = values(F.cross_entropy, logits.double(), target, reduction=reduction)[1]
    for factor in (1.0, 1.0, -2.5):
        (grad,) = torch.autograd.grad(loss * factor, leaf, retain_graph=True)
        torch.testing.assert_close(grad.double(), factor * exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        grad.fill_(77.0)
    (grad,) = torch.autograd.grad(ops.cross_entropy(leaf, target, reduction=reduction) * 3.0, leaf)
    torch.testing.assert_close(grad.double(), 3 * exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_float16_gradients_survive_loss_scaling():
    # 1 / rows / classes would be lost in float16 before the scale comes.
    rows, classes = 10, 30_000
    logits = torch.zeros(rows, classes, dtype=torch.float16, device=DEVICE, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    (grad,) = torch.autograd.grad(ops.cross_entropy(logits, target).float() * 2.0**15, logits)
    expected = torch.full_like(grad[:, 1:], 2.0**15 / rows / classes, dtype=torch.float32)
    torch.testing.assert_close(grad[:, 1:].float(), expected, rtol=1e-3, atol=0)


def test_an_expanded_gradient():
    logits, target, weight = make((4, 20))
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, target, weight, reduction="none")
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0, dtype=torch.float64, device=DEVICE).expand(4))
    torch.testing.assert_close(grad, 2 * values(F.cross_entropy, logits, target, weight, reduction="sum")[1])


def test_weight_in_float32_beside_16_bit_logits():
    logits, target, weight = make((4, 40), torch.bfloat16)
    ours = ops.cross_entropy(logits, target.byte(), weight.float())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, ops.cross_entropy(logits, target, weight))


def test_the_same_bits_again():
    logits, target, weight = make((5, 3001), torch.float32, (1,))
    first, second = (values(ops.cross_entropy, logits, target, weight, label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck_and_double_backward():
    logits, target, weight = make((2, 5))
    leaf = logits.requires_grad_()
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        assert torch.autograd.gradcheck(
            lambda x, o=options: ops.cross_entropy(x, target, weight, **o), leaf, fast_mode=True
        )
    assert torch.autograd.gradgradcheck(lambda x: ops.cross_entropy(x, target, weight, label_smoothing=0.1), leaf)


def test_opcheck():
    logits, target, weight = make((3, 10), torch.float32)
    raw = torch.ops.tinyllm_triton
    for reduction in (0, 1, 2):
        torch.library.opcheck(raw.cross_entropy_fwd, (logits, target, weight, reduction, -100, 0.1, True))
        torch.library.opcheck(raw.cross_entropy_fwd, (logits.bfloat16(), target, None, reduction, 3, 0.0, False))
        loss, statistics, _ = raw.cross_entropy_fwd(logits, target, None, reduction, -100, 0.0, False)
        torch.library.opcheck(raw.cross_entropy_bwd, (loss, logits, target, None, statistics, reduction, -100, 0.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    logits, target, weight = make((2, 10, 3), torch.float32)
    leaf = logits.requires_grad_()

    def f(x):
        return 2 * ops.cross_entropy(x * 3, target, weight, reduction=reduction)

    eager = f(leaf)
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")(leaf)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), leaf), torch.autograd.grad(eager.sum(), leaf))


def test_autocast_gives_float32_as_pytorch_does():
    logits, target, _ = make((4, 16), torch.bfloat16)
    leaf = logits.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, theirs = ops.cross_entropy(leaf, target), F.cross_entropy(leaf, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, leaf), torch.autograd.grad(theirs, leaf))
