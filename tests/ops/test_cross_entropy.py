import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import BACKENDS, KERNELS, cases, each_dtype, on, with_dtypes
from tests.helpers.losses import assert_pytorchs, compare, make, values
from tests.ops.parity import DTYPES, assert_same_bits, outputs_and_gradients, second_gradients
from tinyllm import ops

# The interpreter's NumPy warns of every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F64, F32, BF16, F16 = DTYPES
SHAPES = {
    "cpp": [(1, 1), (5, 1), (3, 2), (7, 16), (4, 31), (129, 65), (17, 1000), (2, 50_257), (700, 24)],
    # The last two are several tiles of a program; rows of the last begin at any even address.
    "triton": [(1, 1), (5, 1), (3, 2), (7, 16), (4, 31), (3, 65), (2, 20_000), (3, 50_257)],
    # A warp a row and four rows a block (up to 2 KB), then a block a row; rows of odd lengths begin at any element, so
    # that their vectors have heads and tails of all lengths.
    "cuda": [(1, 1), (5, 1), (9, 3), (7, 8), (6, 37), (3, 1000), (3, 1003), (2, 5003)],
}
WIDE = 70_001  # more than shared memory keeps


@cases("shape dtype", **{name: list(product(shapes, BACKENDS[name].dtypes)) for name, shapes in SHAPES.items()})
def test_parity(backend, shape, dtype):
    logits, target, _ = make(backend, shape, dtype)
    compare(backend, logits, target)


@cases(
    "shape ignored smoothing dtype",
    cpp=product([(9, 37)], [(), (0, 3, 8)], [0.0, 0.1, 1.0], DTYPES),
    triton=product([(4, 37)], [(2,)], [0.0, 0.1], [F64, F32, BF16]),
    cuda=product([(6, 37), (6, 601)], [(2,)], [0.0, 0.1], [F32, BF16, F16]),
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(backend, shape, ignored, reduction, weighted, smoothing, dtype):
    logits, target, weight = make(backend, shape, dtype, ignored)
    options = {"weight": weight if weighted else None, "reduction": reduction, "label_smoothing": smoothing}
    compare(backend, logits, target, **options)


@cases(
    "shape ignored smoothing dtype",
    triton=product([(3, 20_001)], [()], [0.1, 1.0], [F32]),
    # Six rows are more than there are multiprocessors: two blocks share one.
    cuda=[
        ((3, 1001), (), 1.0, F32),
        *product([(2, WIDE)], [()], [0.0, 0.1], [F32, BF16]),
        *product([(6, WIDE)], [(0, 1, 2, 4)], [0.0, 0.1], [F32, BF16]),
    ],
)
def test_long_rows(backend, shape, ignored, smoothing, dtype):
    logits, target, weight = make(backend, shape, dtype, ignored)
    compare(backend, logits, target, weight=None if ignored else weight, label_smoothing=smoothing)


@cases("shape", cpp=[(40, 7)], triton=[(12, 3)], cuda=[(12, 3)])
def test_an_ignored_class_inside_the_range(backend, shape):
    logits, target, weight = make(backend, shape, F32)
    compare(backend, logits, target, weight=weight, ignore_index=1)


@pytest.mark.parametrize("shape", [(5,), (2, 6, 3), (2, 3, 4, 5), (3, 4, 0), (1,), (0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_other_shapes(backend, shape, reduction):
    if 0 in shape:
        logits, weight = torch.zeros(shape, device=backend.device), None
        target = torch.full((shape[0], *shape[2:]), -100, device=backend.device)
    else:
        logits, target, weight = make(backend, shape)
    assert_pytorchs(logits, target, weight, reduction=reduction, label_smoothing=0.0 if weight is None else 0.2)
    assert ops.last_backend() == backend.name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_rows_ignored(backend, reduction, smoothing):
    target = torch.full((4,), -100, device=backend.device)
    assert_pytorchs(backend.draw(4, 9), target, reduction=reduction, label_smoothing=smoothing)


@cases(
    "classes target",
    cpp=[(3, 0), (3, 2), *product([41, 100], [0, 20, 40])],
    triton=[(3, 0), (41, 20), (9001, 8999)],
    cuda=[(3, 0), (41, 20), (1003, 1001)],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_logits(backend, classes, target, smoothing):
    inf, nan, lowest = math.inf, math.nan, torch.finfo(F32).min
    logits = backend.draw(12, classes)
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
    targets = torch.full((12,), target, device=backend.device)
    assert_pytorchs(logits, targets, reduction="none", label_smoothing=smoothing)


@cases("shape", cpp=[(20, 300)], triton=[(4, 300)], cuda=[(4, 300), (4, 1003)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_huge_logits(backend, shape, smoothing):
    logits, target, _ = make(backend, shape, F32)
    compare(backend, logits * 1e4, target, reduction="none", label_smoothing=smoothing)
    # Large, but close to each other: max + log(sum) as one number would be off by 1e-3.
    compare(backend, logits + 1e4, target, reduction="none", label_smoothing=smoothing)


@cases("classes dtype", **with_dtypes({name: [(2,), (37,), (1003,)] for name in KERNELS}, triton=[F32]))
def test_an_ignored_row_is_zero_whatever_its_logits(backend, classes, dtype):
    logits, target = backend.draw(5, classes, dtype=dtype), backend.tensor([0, -100, 1, -100, 0])
    logits[1], logits[3] = math.nan, math.inf
    loss, grad = values(ops.cross_entropy, logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits[::2], target[::2]))
    assert torch.equal(grad[1::2], torch.zeros_like(grad[1::2]))
    assert not grad.isnan().any()


@pytest.mark.parametrize("target", [[0, 0, 0], [0, 1, 2]])
def test_a_target_of_weight_zero(backend, target):
    assert_pytorchs(backend.draw(3, 3), backend.tensor(target), backend.tensor([0.0, 1.0, 2.0]))


@on("cpp")
@pytest.mark.parametrize("bad", [7, -1, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_an_index_error(backend, bad, reduction):
    logits = torch.randn(3, 7, requires_grad=True)
    for f in (ops.cross_entropy, F.cross_entropy):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            f(logits, torch.tensor([0, bad, -100]), reduction=reduction)


@on("triton", "cuda")
@pytest.mark.parametrize("bad", [7, -1, 2**40, 2**32 + 1])
@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_a_target_out_of_range_gives_nan(backend, bad, weighted, smoothing):
    logits, target, weight = make(backend, (3, 7))
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


# On a GPU the first two are copied; of the others rows begin where they do, some unlike the gradient's.
@pytest.mark.parametrize("make_view", [
    lambda x: x.transpose(0, 1), lambda x: x[:, :1].expand(-1, 12), lambda x: x[::2, 1:], lambda x: x.flip(0),
    lambda x: x[:, :15], lambda x: x[:, 3:20], lambda x: x[:1].expand(5, 24),
    lambda x: x.view(-1)[5:].unfold(0, 22, 23), lambda x: x.view(-1)[1:133].view(6, 22),
], ids=lambda f: "")  # fmt: skip
@cases(
    "smoothing dtype",
    cpp=[(0.0, F64), (0.1, F64)],
    triton=[(0.1, F64), (0.1, BF16)],
    cuda=product([0.0, 0.1], [F32, BF16, F16]),
)
def test_any_strides(backend, make_view, smoothing, dtype):
    logits = make_view(backend.draw(6, 24, dtype=dtype))
    target = torch.arange(2 * logits.size(0), device=backend.device)[::2] % logits.size(1)
    weight = backend.draw(2 * logits.size(1), dtype=dtype).abs()[::2]
    compare(backend, logits, target, weight=weight, label_smoothing=smoothing)


@each_dtype()
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_twice_with_different_gradients(backend, reduction, dtype):
    """Forward writes the gradient once; what comes after the first backward must not depend on what became of it."""
    logits, target, _ = make(backend, (6, 50), dtype)
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, target, reduction=reduction)
    exact = values(F.cross_entropy, logits.double(), target, reduction=reduction)[1]
    for factor in (1.0, 1.0, -2.5):
        (grad,) = torch.autograd.grad(loss * factor, leaf, retain_graph=True)
        torch.testing.assert_close(grad.double(), factor * exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        grad.fill_(77.0)
    (grad,) = torch.autograd.grad(ops.cross_entropy(leaf, target, reduction=reduction) * 3.0, leaf)
    torch.testing.assert_close(grad.double(), 3 * exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@cases("rows classes scale", cpp=[(4096, 300, 2.0**15)], triton=[(10, 30_000, 2.0**15)], cuda=[(10, 6000, 2.0**12)])
def test_float16_gradients_survive_loss_scaling(backend, rows, classes, scale):
    # 1 / rows / classes would be lost in float16 before the scale comes.
    logits = torch.zeros(rows, classes, dtype=F16, device=backend.device, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device=backend.device)
    (grad,) = torch.autograd.grad(ops.cross_entropy(logits, target).float() * scale, logits)
    expected = torch.full_like(grad[:, 1:], scale / rows / classes, dtype=F32)
    torch.testing.assert_close(grad[:, 1:].float(), expected, rtol=1e-3, atol=0)


def test_an_expanded_gradient(backend):
    logits, target, weight = make(backend, (6, 20))
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, target, weight, reduction="none")
    (grad,) = torch.autograd.grad(loss, leaf, loss.new_tensor(2.0).expand(6))
    torch.testing.assert_close(grad, 2 * values(F.cross_entropy, logits, target, weight, reduction="sum")[1])


@each_dtype(cpp=[BF16], triton=[BF16], cuda=[BF16, F16])
def test_weight_in_float32_beside_16_bit_logits_and_bytes_as_targets(backend, dtype):
    logits, target, weight = make(backend, (9, 40), dtype)
    ours = ops.cross_entropy(logits, target.byte(), weight.float(), label_smoothing=0.1)
    assert ours.dtype == dtype
    assert torch.equal(ours, ops.cross_entropy(logits, target, weight, label_smoothing=0.1))


@cases(
    "shape reduction",
    cpp=product([(700, 72), (1000, 30_000)], ["mean", "none"]),
    triton=[((5, 3001), "mean")],
    cuda=product([(5, 301), (5, 3001), (1025, 2)], ["mean"]),
)
def test_the_same_bits_each_time(backend, shape, reduction):
    logits, target, weight = make(backend, shape, F32, (1,))
    options = {"reduction": reduction, "label_smoothing": 0.1}
    assert_same_bits(backend.threads, lambda: values(ops.cross_entropy, logits, target, weight, **options))


@on("cpp")
@pytest.mark.parametrize("classes", [10001, 16384])
def test_gradients_larger_than_the_caches(backend, classes):
    # Written past the caches by another kind of store, from rows that are not aligned to it.
    logits, target, weight = make(backend, (600, classes), F32)
    assert_pytorchs(logits, target)
    assert_pytorchs(logits, target, weight, label_smoothing=0.1)


@on("cpp", "triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend, reduction):
    logits, target, weight = make(backend, (4, 7) if backend.name == "cpp" else (2, 5))
    assert torch.autograd.gradcheck(
        lambda x: ops.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1),
        logits.requires_grad_(), fast_mode=backend.name != "cpp",
    )  # fmt: skip


def test_double_backward_goes_through_the_reference(backend):
    logits, target, weight = make(backend, (3, 5))
    ours, theirs = (
        second_gradients(lambda x, f=f: f(x, target, weight, label_smoothing=0.1), logits)
        for f in (ops.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(backend, reduction):
    logits, target, weight = make(backend, (6, 10), F32)
    forward, backward = backend.raw.cross_entropy_fwd, backend.raw.cross_entropy_bwd
    torch.library.opcheck(forward, (logits, target, weight, reduction, -100, 0.1, True))
    torch.library.opcheck(forward, (logits.bfloat16(), target, None, reduction, 3, 0.0, False))
    loss, statistics, _ = forward(logits, target, None, reduction, -100, 0.0, False)
    torch.library.opcheck(backward, (loss, logits, target, None, statistics, reduction, -100, 0.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(backend, reduction):
    logits, target, weight = make(backend, (2, 10, 3), F32)

    def f(x):
        return 2 * ops.cross_entropy(x * 3, target, weight, reduction=reduction)

    torch.testing.assert_close(outputs_and_gradients(backend.compile(f), logits), outputs_and_gradients(f, logits))


@on("cpp")
def test_export(backend):
    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return ops.cross_entropy(x, t)

    logits, target, _ = make(backend, (4, 10), F32)
    with torch.no_grad():
        program = torch.export.export(Loss(), (logits, target))
    assert any("cross_entropy_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(logits, target), F.cross_entropy(logits, target))


@each_dtype(triton=[BF16], cuda=[BF16])
def test_autocast_gives_float32_as_pytorch_does(backend, dtype):
    logits, target, _ = make(backend, (4, 16), dtype)
    with torch.autocast(backend.device, torch.bfloat16):
        assert_pytorchs(logits, target)


@on("cpp")
class TestWhereNoKernelServes:
    """PyTorch takes over, with its errors too; with the kernel forced, the call is refused with the reason."""

    CASES = (
        ({"target": torch.full((4, 8), 1 / 8)}, "target is torch.float32"),
        ({"target": torch.tensor([1]), "input": torch.arange(5.0)}, r"of shape \[1\]"),
    )

    @pytest.mark.parametrize(("change", "says"), CASES)
    def test_it_is_pytorchs(self, backend, change, says):
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
    def test_errors_are_pytorchs(self, backend, change, says):
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


@on("cpp")
def test_a_raw_call_with_bad_shapes_is_refused(backend):
    x, t, raw = torch.ones(4, 8), torch.zeros(4).long(), backend.raw
    with pytest.raises((ValueError, RuntimeError), match="target has shape"):
        raw.cross_entropy_fwd(x, t[:3], None, 1, -100, 0.0, False)
    with pytest.raises((ValueError, RuntimeError), match="weight has shape"):
        raw.cross_entropy_fwd(x, t, torch.ones(3), 1, -100, 0.0, False)
    with pytest.raises((ValueError, RuntimeError), match="max_and_sum has shape"):
        raw.cross_entropy_bwd(torch.ones(()), x, t, None, torch.ones(4), 1, -100, 0.0)
    with pytest.raises((ValueError, RuntimeError), match="grad has shape"):
        raw.cross_entropy_bwd(torch.ones(()), x, t, None, torch.ones(4, 2), 0, -100, 0.0)
