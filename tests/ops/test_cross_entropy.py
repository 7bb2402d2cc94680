import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import losses
from tests.helpers.losses import values
from tests.ops.parity import DTYPES
from tinyllm import ops

SHAPES = [(1, 1), (5, 1), (3, 2), (7, 16), (4, 31), (129, 65), (17, 1000), (2, 50257), (700, 24)]


@pytest.fixture(autouse=True)
def _on_the_kernel():
    with ops.backend("cpp"):
        yield


def make(shape, dtype=torch.float64, ignored=()):
    """Logits, targets of which the rows `ignored` are, and positive class weights."""
    generator = torch.Generator().manual_seed(sum(shape))
    classes = shape[min(1, len(shape) - 1)]
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    weight = 0.2 + torch.rand(classes, generator=generator, dtype=torch.float64)
    for row in ignored:
        target[row] = -100
    return logits.to(dtype), target, weight.to(dtype)


compare = functools.partial(losses.compare, "cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype):
    logits, target, _ = make(shape, dtype)
    compare(logits, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("reduction", "weighted", "ignored", "smoothing"),
    list(itertools.product(["mean", "sum", "none"], [False, True], [(), (0, 3, 8)], [0.0, 0.1, 1.0])),
)
def test_options(reduction, weighted, ignored, smoothing, dtype):
    logits, target, weight = make((9, 37), dtype, ignored)
    compare(logits, target, weight=weight if weighted else None, reduction=reduction, label_smoothing=smoothing)


def test_an_ignored_class_inside_the_range():
    logits, target, weight = make((40, 7), torch.float32)
    compare(logits, target, weight=weight, ignore_index=3)


@pytest.mark.parametrize("shape", [(5,), (2, 6, 3), (2, 3, 4, 5), (3, 4, 0), (1,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_other_shapes(shape, reduction):
    logits, target, weight = make(shape)
    ours, theirs = (
        values(f, logits, target, weight, reduction=reduction, label_smoothing=0.2)
        for f in (ops.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ops.last_backend() == "cpp"


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty(shape, reduction):
    logits, target = torch.zeros(shape), torch.full(shape[:1], -100)
    ours, theirs = (values(f, logits, target, reduction=reduction) for f in (ops.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_rows_ignored(reduction, smoothing):
    logits, target = torch.randn(4, 9), torch.full((4,), -100)
    ours, theirs = (
        values(f, logits, target, reduction=reduction, label_smoothing=smoothing)
        for f in (ops.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [0, 20, 40])
@pytest.mark.parametrize("classes", [3, 41, 100])
def test_special_logits(classes, target, smoothing):
    inf, nan = math.inf, math.nan
    logits = torch.randn(9, classes)
    logits[0, 0] = -inf
    logits[1, classes // 2 :] = -inf
    logits[2, -1] = inf
    logits[3, 1] = nan
    logits[4] = -inf
    logits[5] = nan
    logits[6, 0], logits[6, 1] = nan, inf
    logits[7, 0], logits[7, 1:] = nan, -inf
    targets = torch.full((9,), min(target, classes - 1))
    ours, theirs = (
        values(f, logits, targets, reduction="none", label_smoothing=smoothing)
        for f in (ops.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_huge_logits(smoothing):
    logits, target, _ = make((20, 300), torch.float32)
    compare(logits * 1e4, target, reduction="none", label_smoothing=smoothing)
    # Large, but close to each other: max + log(sum) as one number would be off by 1e-3.
    compare(logits + 1e4, target, reduction="none", label_smoothing=smoothing)


def test_an_ignored_row_is_zero_whatever_its_logits():
    logits = torch.tensor([[math.nan, 1.0], [0.5, -0.5]])
    loss, grad = values(ops.cross_entropy, logits, torch.tensor([-100, 0]))
    torch.testing.assert_close(loss, F.cross_entropy(logits[1:], torch.tensor([0])))
    assert torch.equal(grad[0], torch.zeros(2))


def test_a_target_of_weight_zero():
    logits, weight = torch.randn(3, 3), torch.tensor([0.0, 1.0, 2.0])
    for target in ([0, 0, 0], [0, 1, 2]):
        ours, theirs = (values(f, logits, torch.tensor(target), weight) for f in (ops.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("bad", [7, -1, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_an_index_error(bad, reduction):
    logits = torch.randn(3, 7, requires_grad=True)
    for f in (ops.cross_entropy, F.cross_entropy):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            f(logits, torch.tensor([0, bad, -100]), reduction=reduction)


@pytest.mark.parametrize("make_view", [
    lambda x: x.transpose(0, 1), lambda x: x[::2, 1:], lambda x: x[:, :1].expand(-1, 12), lambda x: x.flip(0),
])  # fmt: skip
def test_any_strides(make_view):
    logits = make_view(torch.randn(16, 24, dtype=torch.float64))
    target = torch.randint(logits.size(1), (2 * logits.size(0),))[::2]
    weight = torch.rand(2 * logits.size(1), dtype=torch.float64)[::2]
    compare(logits, target, weight=weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_twice_with_different_gradients(reduction, dtype):
    """Forward writes the gradient once; what comes after the first backward must not depend on what became of it."""
    logits, target, _ = make((6, 50), dtype)
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
    # 1 / rows would be lost in float16 before the scale comes.
    logits, target = torch.zeros(4096, 300, dtype=torch.float16, requires_grad=True), torch.zeros(4096).long()
    (grad,) = torch.autograd.grad(ops.cross_entropy(logits, target).float() * 2.0**15, logits)
    torch.testing.assert_close(grad[:, 1:].float(), torch.full((4096, 299), 2.0**15 / 4096 / 300), rtol=1e-3, atol=0)


def test_an_expanded_gradient():
    logits, target, weight = make((6, 20))
    leaf = logits.requires_grad_()
    for f in (ops.cross_entropy, F.cross_entropy):
        loss = f(leaf, target, weight, reduction="none")
        (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0, dtype=torch.float64).expand(6))
        torch.testing.assert_close(grad, 2 * values(F.cross_entropy, logits, target, weight, reduction="sum")[1])


def test_bytes_as_targets():
    logits, target, _ = make((6, 20))
    assert torch.equal(ops.cross_entropy(logits, target.byte()), ops.cross_entropy(logits, target))


def test_weight_in_float32_beside_16_bit_logits():
    logits, target, weight = make((9, 40), torch.bfloat16)
    ours = ops.cross_entropy(logits, target, weight.float())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, ops.cross_entropy(logits, target, weight))


@pytest.mark.parametrize("shape", [(700, 72), (1000, 30000)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bits_do_not_depend_on_threads(shape, reduction):
    logits, target, weight = make(shape, torch.float32, (5,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values(ops.cross_entropy, logits, target, weight, reduction=reduction, label_smoothing=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("classes", [10001, 16384])
def test_gradients_larger_than_the_caches(classes):
    # Written past the caches by another kind of store, from rows that are not aligned to it.
    logits, target, weight = make((600, classes), torch.float32)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
        ours = values(ops.cross_entropy, logits, target, **options)
        torch.testing.assert_close(ours, values(F.cross_entropy, logits, target, **options))


def test_gradcheck():
    logits, target, weight = make((4, 7))
    leaf = logits.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: ops.cross_entropy(x, target, weight, reduction=r, label_smoothing=0.1), leaf
        )


def test_double_backward_goes_through_the_reference():
    logits, target, weight = make((3, 5))
    assert torch.autograd.gradgradcheck(
        lambda x: ops.cross_entropy(x, target, weight, label_smoothing=0.1), logits.requires_grad_()
    )


def test_opcheck():
    logits, target, weight = make((6, 10), torch.float32)
    raw = torch.ops.tinyllm
    for reduction in (0, 1, 2):
        torch.library.opcheck(raw.cross_entropy_fwd, (logits, target, weight, reduction, -100, 0.1, True))
        torch.library.opcheck(raw.cross_entropy_fwd, (logits.bfloat16(), target, None, reduction, 3, 0.0, False))
        loss, statistics, _ = raw.cross_entropy_fwd(logits, target, None, reduction, -100, 0.0, False)
        torch.library.opcheck(raw.cross_entropy_bwd, (loss, logits, target, None, statistics, reduction, -100, 0.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    logits, target, weight = make((6, 10, 3), torch.float32)
    leaf = logits.requires_grad_()

    def f(x):
        return 2 * ops.cross_entropy(x * 3, target, weight, reduction=reduction)

    eager, compiled = f(leaf), torch.compile(f, fullgraph=True)(leaf)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), leaf), torch.autograd.grad(eager.sum(), leaf))


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return ops.cross_entropy(x, t)

    logits, target, _ = make((4, 10), torch.float32)
    with torch.no_grad():
        program = torch.export.export(Loss(), (logits, target))
    assert any("cross_entropy_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_float32_as_pytorch_does(dtype):
    logits, target, _ = make((4, 16), dtype)
    leaf = logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ops.cross_entropy(leaf, target), F.cross_entropy(leaf, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, leaf), torch.autograd.grad(theirs, leaf))


class TestWhereNoKernelServes:
    """PyTorch takes over, with its errors too; with the kernel forced, the call is refused with the reason."""

    CASES = (
        ({"target": torch.full((4, 8), 1 / 8)}, "target is torch.float32"),
        ({"target": torch.tensor([1]), "input": torch.arange(5.0)}, r"of shape \[1\]"),
    )

    @pytest.mark.parametrize(("change", "says"), CASES)
    def test_it_is_pytorchs(self, change, says):
        arguments = {"input": torch.randn(4, 8), "target": torch.arange(4)} | change
        with pytest.raises(RuntimeError, match=says):
            ops.cross_entropy(**arguments)
        with ops.backend("reference"):
            torch.testing.assert_close(ops.cross_entropy(**arguments), F.cross_entropy(**arguments))

    @pytest.mark.parametrize(("change", "says"), [
        ({"target": torch.arange(4).int()}, "target is torch.int32"),
        ({"target": torch.arange(3)}, r"class indices of shape \[4\]"),
        ({"input": torch.tensor(1.0)}, "input is a scalar"),
        ({"weight": torch.ones(7)}, r"weight has shape \[7\]"),
        ({"weight": torch.ones(8, requires_grad=True)}, "weight requires a gradient"),
        ({"reduction": "median"}, "reduction is 'median'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"target": torch.ones(4, device="meta").long()}, "target is on meta"),
    ])  # fmt: skip
    def test_errors_are_pytorchs(self, change, says):
        arguments = {"input": torch.randn(4, 8, requires_grad=True), "target": torch.arange(4)} | change
        with pytest.raises(RuntimeError, match=says):
            ops.cross_entropy(**arguments)
        with ops.backend("reference"):
            try:
                F.cross_entropy(**arguments)
            except Exception as error:
                with pytest.raises(type(error)):
                    ops.cross_entropy(**arguments)
            else:
                pytest.fail("PyTorch takes it")


def test_a_raw_call_with_bad_shapes_is_refused():
    x, t, raw = torch.ones(4, 8), torch.zeros(4).long(), torch.ops.tinyllm
    with pytest.raises((ValueError, RuntimeError), match="target has shape"):
        raw.cross_entropy_fwd(x, t[:3], None, 1, -100, 0.0, False)
    with pytest.raises((ValueError, RuntimeError), match="weight has shape"):
        raw.cross_entropy_fwd(x, t, torch.ones(3), 1, -100, 0.0, False)
    with pytest.raises((ValueError, RuntimeError), match="max_and_sum has shape"):
        raw.cross_entropy_bwd(torch.ones(()), x, t, None, torch.ones(4), 1, -100, 0.0)
    with pytest.raises((ValueError, RuntimeError), match="grad has shape"):
        raw.cross_entropy_bwd(torch.ones(()), x, t, None, torch.ones(4, 2), 0, -100, 0.0)
