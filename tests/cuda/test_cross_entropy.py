import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.cuda.device import DEVICE, DTYPES, ON_GPU, draw, raw
from tests.helpers import losses
from tests.helpers.losses import values
from tinyllm import ops

# A warp a row and four rows a block (up to 2 KB), then a block a row; rows of odd lengths begin at any element, so that
# their vectors have heads and tails of all lengths. The last one is more than shared memory keeps.
SHAPES = [(1, 1), (5, 1), (9, 3), (7, 8), (6, 37), (3, 1000), (3, 1003), (2, 5003)]
WIDE = (2, 70_001)
# So many rows that a kernel of its own counts the targets, and one fewer than that.
MANY, FEW = 1025, 1024


def make(shape, dtype=torch.float32, ignored=()):
    return losses.make(draw, shape, dtype, ignored)


compare = functools.partial(losses.compare, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype):
    logits, target, _ = make(shape, dtype)
    compare(logits, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_longer_than_shared_memory(smoothing, dtype):
    logits, target, weight = make(WIDE, dtype)
    compare(logits, target, weight=weight, label_smoothing=smoothing)
    # More rows than multiprocessors: two blocks share one.
    logits, target, _ = make((6, WIDE[1]), dtype, ignored=(0, 1, 2, 4))
    compare(logits, target, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [37, 601])
@pytest.mark.parametrize(
    ("reduction", "weighted", "smoothing"), list(itertools.product(["mean", "sum", "none"], [False, True], [0.0, 0.1]))
)
def test_options(reduction, weighted, smoothing, classes, dtype):
    logits, target, weight = make((6, classes), dtype, ignored=(2,))
    compare(logits, target, weight=weight if weighted else None, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_the_mean_divides_by(rows, weighted):
    """Counted by each row, by a kernel before them, or by the last kernel where no gradient is wanted."""
    logits, target, weight = make((rows, 3), ignored=range(0, rows, 5))
    options = {"weight": weight if weighted else None}
    compare(logits, target, **options)
    with_grad = ops.cross_entropy(logits.clone().requires_grad_(), target, **options)
    assert torch.equal(ops.cross_entropy(logits, target, **options), with_grad)


def test_smoothing_of_one():
    logits, target, weight = make((3, 1001))
    compare(logits, target, weight=weight, label_smoothing=1.0)


def test_an_ignored_class_inside_the_range():
    logits, target, weight = make((12, 3))
    compare(logits, target, weight=weight, ignore_index=1)


@pytest.mark.parametrize("shape", [(5,), (2, 6, 3), (3, 4, 0), (1,), (0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
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
    assert ops.last_backend() == "cuda"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction):
    logits, target = draw(3, 9), torch.full((3,), -100, device=DEVICE)
    ours, theirs = (values(f, logits, target, reduction=reduction) for f in (ops.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("classes", "target"), [(3, 0), (41, 20), (1003, 1001)])
def test_special_logits(classes, target, smoothing):
    inf, nan = math.inf, math.nan
    lowest = torch.finfo(torch.float32).min
    logits = draw(12, classes)
    logits[0, 0] = -inf
    logits[1, classes // 2 :] = -inf
    logits[2, -1] = inf
    logits[3, 1] = nan
    logits[4] = -inf
    logits[5] = nan
    logits[6, 0], logits[6, 1] = nan, inf
    logits[7, 0], logits[7, 1:] = nan, -inf
    if smoothing == 0.0:  # the distances overflow, PyTorch's logits' sum too
        logits[8] = lowest
        logits[9, 1:] = lowest
        logits[10, 1] = -lowest
    targets = torch.full((12,), target, device=DEVICE)
    ours, theirs = (
        values(f, logits, targets, reduction="none", label_smoothing=smoothing)
        for f in (ops.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [300, 1003])
def test_huge_logits(classes, smoothing):
    logits, target, _ = make((4, classes))
    compare(logits * 1e4, target, reduction="none", label_smoothing=smoothing)
    # Large, but close to each other: max + log(sum) as one number would be off by 1e-3.
    compare(logits + 1e4, target, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 37, 1003])
def test_an_ignored_row_is_zero_whatever_its_logits(classes, dtype):
    logits, target = draw(5, classes, dtype=dtype), torch.tensor([0, -100, 1, -100, 0], device=DEVICE)
    logits[1], logits[3] = math.nan, math.inf
    loss, grad = values(ops.cross_entropy, logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits[::2], target[::2]))
    assert torch.equal(grad[1::2], torch.zeros_like(grad[1::2]))
    assert not grad.isnan().any()


def test_a_target_of_weight_zero():
    logits, weight = draw(3, 3), torch.tensor([0.0, 1.0, 2.0], device=DEVICE)
    for target in ([0, 0, 0], [0, 1, 2]):
        arguments = torch.tensor(target, device=DEVICE), weight
        ours, theirs = (values(f, logits, *arguments) for f in (ops.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("bad", [7, -1, 2**40, 2**32 + 1])
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


# The first two are copied; of the others rows begin where they do, some unlike the gradient's.
@pytest.mark.parametrize("make_view", [
    lambda x: x.transpose(0, 1), lambda x: x[:, :1].expand(-1, 12), lambda x: x[::2, 1:], lambda x: x[:, :15],
    lambda x: x[:, 3:20], lambda x: x[:1].expand(5, 24), lambda x: x.view(-1)[5:].unfold(0, 22, 23),
    lambda x: x.view(-1)[1:133].view(6, 22),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_any_strides(make_view, dtype, smoothing):
    logits = make_view(draw(6, 24, dtype=dtype))
    target = torch.arange(2 * logits.size(0), device=DEVICE)[::2] % logits.size(1)
    weight = draw(2 * logits.size(1), dtype=dtype).abs()[::2]
    compare(logits, target, weight=weight, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_cut_from_a_padded_head(dtype):
    logits = draw(5, 1008, dtype=dtype)[:, :1003]
    compare(logits, torch.arange(5, device=DEVICE), label_smoothing=0.1)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [37, 1003])
def test_forward_and_backward_write_the_same_gradient(classes, dtype):
    logits, target, weight = make((5, classes), dtype, (1,))
    for reduction in (1, 2):
        options = reduction, -100, 0.1
        loss, statistics, early = raw().cross_entropy_fwd(logits, target, weight, *options, True)
        again = raw().cross_entropy_bwd(torch.ones_like(loss), logits, target, weight, statistics, *options)
        assert torch.equal(early, again)


def test_the_statistics():
    logits, target, _ = make((5, 40), ignored=(3,))
    _, statistics, grad = raw().cross_entropy_fwd(logits, target, None, 1, -100, 0.0, False)
    biggest = logits.max(1).values
    exact = torch.stack([biggest, (logits - biggest[:, None]).exp().sum(1)], 1)
    exact[3] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(statistics, exact)
    assert grad.shape == (0,)


def test_float16_gradients_survive_loss_scaling():
    # 1 / rows / classes would be lost in float16 before the scale comes.
    rows, classes = 10, 6000
    logits = torch.zeros(rows, classes, dtype=torch.float16, device=DEVICE, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    (grad,) = torch.autograd.grad(ops.cross_entropy(logits, target).float() * 2.0**12, logits)
    expected = torch.full_like(grad[:, 1:], 2.0**12 / rows / classes, dtype=torch.float32)
    torch.testing.assert_close(grad[:, 1:].float(), expected, rtol=1e-3, atol=0)


def test_an_expanded_gradient():
    logits, target, weight = make((4, 20))
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, target, weight, reduction="none")
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0, device=DEVICE).expand(4))
    torch.testing.assert_close(grad, 2 * values(F.cross_entropy, logits, target, weight, reduction="sum")[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_in_float32_beside_16_bit_logits(dtype):
    logits, target, weight = make((4, 40), dtype)
    ours = ops.cross_entropy(logits, target.byte(), weight.float(), label_smoothing=0.1)
    assert ours.dtype == dtype
    assert torch.equal(ours, ops.cross_entropy(logits, target, weight, label_smoothing=0.1))


@pytest.mark.parametrize("shape", [(5, 301), (5, 3001), (MANY, 2)], ids=str)
def test_the_same_bits_again(shape):
    logits, target, weight = make(shape, ignored=(1,))
    first, second = (values(ops.cross_entropy, logits, target, weight, label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    logits, target, _ = make((7, 37))
    loss, grad = values(ops.cross_entropy, logits, target, reduction="none")
    for row in range(7):
        # Where it begins decides the order of its sums.
        alone = torch.empty(8 * 37, device=DEVICE)[row * 37 : row * 37 + 37].view(1, 37).copy_(logits[row])
        again = values(ops.cross_entropy, alone, target[row : row + 1], reduction="none")
        assert torch.equal(again[0][0], loss[row])
        torch.testing.assert_close(again[1][0], grad[row], rtol=0, atol=0)


def test_what_the_kernel_refuses():
    logits, target, weight = make((3, 7))
    call = lambda x, t, w: raw().cross_entropy_fwd(x, t, w, 1, -100, 0.0, True)  # noqa: E731
    for arguments, words in [
        ((logits.double(), target, None), "no CUDA kernel for dtype Double; float32, bfloat16 and float16 have one"),
        ((logits[0], target, None), "(rows, classes) is needed"),
        ((logits, target.int(), None), "target has dtype Int; Long is needed"),
        ((logits, target[:2], None), r"target has shape \[2\]; \[3\] is needed"),
        ((logits, target, weight[:6]), r"weight has shape \[6\]; \[7\] is needed"),
        ((logits, target, weight.double()), "weight has dtype Double"),
    ]:
        with pytest.raises(Exception, match=words.replace("(", r"\(").replace(")", r"\)")):
            call(*arguments)


def test_double_backward():
    logits, target, weight = make((2, 5))
    leaf = logits.requires_grad_()
    grads = []
    for function in (ops.cross_entropy, F.cross_entropy):
        (grad,) = torch.autograd.grad(function(leaf, target, weight, label_smoothing=0.1), leaf, create_graph=True)
        grads.append(torch.autograd.grad(grad.pow(2).sum(), leaf)[0])
    torch.testing.assert_close(*grads)


def test_opcheck():
    logits, target, weight = make((3, 10))
    for reduction in (0, 1, 2):
        torch.library.opcheck(raw().cross_entropy_fwd, (logits, target, weight, reduction, -100, 0.1, True))
        torch.library.opcheck(raw().cross_entropy_fwd, (logits.bfloat16(), target, None, reduction, 3, 0.0, False))
        loss, statistics, _ = raw().cross_entropy_fwd(logits, target, None, reduction, -100, 0.0, False)
        torch.library.opcheck(raw().cross_entropy_bwd, (loss, logits, target, None, statistics, reduction, -100, 0.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    logits, target, weight = make((2, 10, 3))
    leaf = logits.requires_grad_()

    def f(x):
        return 2 * ops.cross_entropy(x * 3, target, weight, reduction=reduction)

    eager = f(leaf)
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")(leaf)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), leaf), torch.autograd.grad(eager.sum(), leaf))


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to capture a graph of")
def test_cuda_graph():
    logits, target, weight = make((MANY, 1003), torch.bfloat16)
    leaf = logits.requires_grad_()

    def step():
        return values(ops.cross_entropy, leaf, target, weight, label_smoothing=0.1)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_gives_float32_as_pytorch_does():
    logits, target, _ = make((4, 16), torch.bfloat16)
    leaf = logits.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, theirs = ops.cross_entropy(leaf, target), F.cross_entropy(leaf, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, leaf), torch.autograd.grad(theirs, leaf))
