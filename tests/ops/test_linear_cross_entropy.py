import itertools
import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import BACKENDS, cases, on, params
from tests.ops.parity import DTYPES, assert_same_bits, check_parity, outputs_and_gradients
from tinyllm import ops, reference
from tinyllm.ops import _products

# The interpreter's NumPy warns of every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F64, F32, BF16, F16 = DTYPES
# N, D, C
SHAPES = {
    # More rows than the D that fit where the weight's gradient will be, columns that fill no vector, several ranges of
    # classes.
    "cpp": [(1, 1, 1), (3, 2, 5), (33, 20, 300), (17, 64, 257), (130, 40, 513), (300, 7, 60), (64, 1024, 33)],
    # The last three are several blocks, of which the last is not whole.
    "triton": [(1, 1, 1), (3, 2, 5), (5, 20, 300), (9, 64, 257), (7, 7, 60)],
}
CPP = ("cpp", "cpp_torch")


@pytest.fixture(params=params(*CPP, "triton"))
def backend(request, monkeypatch):
    """Force C++ with our own products, C++ with PyTorch's, or Triton in small blocks."""
    name, _, products = request.param.partition("_")
    found = BACKENDS[name]
    monkeypatch.setattr(_products, "_setting", products or "cpp")
    if products == "torch":
        found = replace(found, raw=torch.ops.tinyllm_products)
    with found.forced():
        if name == "triton":
            from tinyllm.kernels import linear_cross_entropy as kernels

            monkeypatch.setattr(kernels, "LEAST_ROWS", 4)
            monkeypatch.setattr(kernels, "ROWS_MULTIPLE", 2)
        yield found


def each(names, cpp, triton):
    """Run a test on all three, the two of C++ with the same values of the arguments `names`."""
    return cases(names, **dict.fromkeys(CPP, tuple(cpp)), triton=triton)


def make(backend, shape, dtype=F64, ignored=()):
    """Return input, linear weight, linear bias, targets of which the rows `ignored` are, and positive class weights."""
    rows, features, classes = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *s: torch.randn(s, generator=generator, dtype=F64)  # noqa: E731
    target = torch.randint(classes, (rows,), generator=generator)
    for row in ignored:
        target[row] = -100
    weight = 0.2 + torch.rand(classes, generator=generator, dtype=F64)
    floats = draw(rows, features), 2 * draw(classes, features) / math.sqrt(features), draw(classes), weight
    x, w, b, weight = (t.to(dtype).to(backend.device) for t in floats)
    return x, w, b, target.to(backend.device), weight


def torchs(input, linear_weight, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def compare(backend, inputs, target, **options):
    """Compare ours with PyTorch's and the reference, loss and gradients, with a random upstream gradient."""
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
    assert ops.last_backend() == backend.name


def values(function, inputs, *arguments, **options):
    """Return the loss and the gradients of its sum, NaN and all."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(*leaves[:2], *arguments, linear_bias=leaves[2] if len(leaves) > 2 else None, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@each("shape", **SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_parity(backend, shape, bias, dtype):
    x, w, b, target, _ = make(backend, shape, dtype)
    compare(backend, (x, w, b) if bias else (x, w), target)


@each(
    "shape ignored smoothing dtype",
    cpp=itertools.product([(90, 20, 300)], [(), (0, 3, 88)], [0.0, 0.1, 1.0], [F64, F32, BF16]),
    triton=itertools.product([(6, 20, 30)], [(0, 5)], [0.0, 0.1], DTYPES),
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(backend, shape, ignored, reduction, weighted, smoothing, dtype):
    x, w, b, target, weight = make(backend, shape, dtype, ignored)
    options = {"weight": weight if weighted else None, "reduction": reduction, "label_smoothing": smoothing}
    compare(backend, (x, w, b), target, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_another_ignore_index(backend, smoothing):
    x, w, b, target, weight = make(backend, (30, 20, 12), F32)
    assert 0 < (target == 3).sum() < 30
    compare(backend, (x, w, b), target, weight=weight, ignore_index=3, label_smoothing=smoothing)


@pytest.mark.any_build
def test_the_reference_is_pytorchs():
    x, w, b, target, weight = make(BACKENDS["cpp"], (9, 5, 12))
    options = {"linear_bias": b, "weight": weight, "label_smoothing": 0.1, "ignore_index": 3}
    exact = reference.linear_cross_entropy(x, w, target, **options)
    torch.testing.assert_close(exact, torchs(x, w, target, **options))
    if hasattr(F, "linear_cross_entropy"):
        torch.testing.assert_close(exact, F.linear_cross_entropy(x, w, target, **options))


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each("shape", cpp=[(70, 24, 300)], triton=[(5, 24, 30)])
def test_any_of_the_gradients(backend, shape, needed, reduction):
    x, w, b, target, _ = make(backend, shape)
    found = []
    for f in (ops.linear_cross_entropy, torchs):
        inputs = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
        loss = f(*inputs[:2], target, linear_bias=inputs[2], reduction=reduction)
        found.append([loss, *torch.autograd.grad(loss.sum(), [t for t in inputs if t.requires_grad])])
    torch.testing.assert_close(*found)


@each("shape reduction", cpp=[((700, 24, 300), "none")], triton=[((12, 24, 30), "mean")])
def test_loss_alone_is_the_loss_with_gradients(backend, shape, reduction):
    x, w, b, target, _ = make(backend, shape, F32)
    alone = ops.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    with_gradients = ops.linear_cross_entropy(x, w.requires_grad_(), target, linear_bias=b, reduction=reduction)
    assert torch.equal(alone, with_gradients)


@each("rows dtype", cpp=[(40, F64)], triton=[(10, F64), (10, F16)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_or_of_weight_zero(backend, rows, reduction, dtype):
    x, w, b, _, _ = make(backend, (rows, 8, 20), dtype)
    for target, weight in ((-100, None), (1, torch.zeros_like(b))):
        arguments = (torch.full((rows,), target, device=backend.device),)
        ours, theirs = (
            values(f, (x, w, b), *arguments, weight=weight, reduction=reduction)
            for f in (ops.linear_cross_entropy, torchs)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@on(*CPP)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_logits(backend, smoothing):
    inf, nan = math.inf, math.nan
    for bias in (
        [-inf] * 300 + [0.0] * 300, [0.0] * 300 + [-inf] * 300, [-inf] * 600, [0.0] * 599 + [inf], [nan] + [0.0] * 599,
    ):  # fmt: skip
        x, w, _, target, _ = make(backend, (20, 6, 600))
        found = []
        for f in (ops.linear_cross_entropy, torchs):
            leaves = [t.requires_grad_() for t in (x, w)]
            options = {"linear_bias": x.new_tensor(bias), "reduction": "none", "label_smoothing": smoothing}
            loss = f(*leaves, target, **options)
            found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        torch.testing.assert_close(*found, equal_nan=True)


@on(*CPP)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits(backend, size):
    x, w, b, target, _ = make(backend, (40, 16, 300), F32)
    compare(backend, (x * size, w, b), target)
    compare(backend, (x, w, b + size), target)


@on(*CPP)
def test_one_row(backend):
    x, w, b, target, _ = make(backend, (1, 5, 30))
    ours, theirs = (values(f, (x[0], w, b), target[0], reduction="none") for f in (ops.linear_cross_entropy, torchs))
    torch.testing.assert_close(ours, theirs)
    assert ops.last_backend() == backend.name


@on(*CPP)
@pytest.mark.parametrize("bad", [60, -1, 2**40])
def test_a_target_out_of_range_is_an_index_error(backend, bad):
    x, w, _, target, _ = make(backend, (30, 7, 60))
    target[20] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        ops.linear_cross_entropy(x, w.requires_grad_(), target)


@on("triton")
@pytest.mark.parametrize("bad", [60, -1, 2**40])
def test_a_target_out_of_range_gives_nan(backend, bad):
    x, w, _, target, _ = make(backend, (9, 7, 60))
    target[4] = bad
    loss, grad_x, grad_w = values(ops.linear_cross_entropy, (x, w), target, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[4]]
    assert grad_x.isnan().all(1).nonzero().tolist() == [[4]]
    assert not grad_x[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    assert grad_w.isnan().all()


@each("rows", cpp=[48], triton=[10])
def test_any_strides(backend, rows):
    x, w, b, target, _ = make(backend, (rows, 24, 64))
    compare(backend, (x.t().contiguous().t(), w[::2, :], b[::2]), target % 32)
    compare(backend, (x[::2, 1:], w.flip(0)[:, 1:], b.flip(0)), target.repeat(2)[::4])
    compare(backend, (x[:, :1].expand(-1, 24), w[:1].expand(64, -1), b[:1].expand(64)), target)


@each("rows", cpp=[40], triton=[5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_twice_with_different_gradients(backend, rows, reduction, dtype):
    """Forward computes the gradients; what comes after the first backward must not depend on what became of them."""
    x, w, b, target, _ = make(backend, (rows, 12, 50), dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=b, reduction=reduction)
    exact = values(torchs, [t.double() for t in (x, w, b)], target, reduction=reduction)[1:]
    # Gradients of logits that are rounded to 16 bits, and sums of up to 50 of these.
    steps = 64 if dtype == F64 else 16 if backend.raw is torch.ops.tinyllm_products else 8
    tolerance = dict.fromkeys(("rtol", "atol"), steps * torch.finfo(dtype).eps)
    for factor in (1.0, 1.0, -2.5):
        grads = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        for grad, right in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad.double(), factor * right, **tolerance)
            grad.fill_(77.0)
    loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=b, reduction=reduction)
    for grad, right in zip(torch.autograd.grad(loss * 3.0, leaves), exact, strict=True):
        torch.testing.assert_close(grad.double(), 3 * right, **tolerance)


@on("triton")
def test_float16_gradients_survive_loss_scaling(backend):
    # 1 / rows / classes would be lost in float16 before the scale comes.
    rows, classes = 12, 20_000
    x = torch.ones(rows, 1, dtype=F16, device=backend.device)
    w = torch.zeros(classes, 1, dtype=F16, device=backend.device, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device=backend.device)
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(x, w, target).float() * 2.0**10, w)
    expected = torch.full_like(grad[1:], 2.0**10 / classes, dtype=F32)
    torch.testing.assert_close(grad[1:].float(), expected, rtol=3e-3, atol=0)


@each(
    "shape reduction",
    cpp=itertools.product([(300, 72, 1500), (90, 100, 5000)], ["mean", "none"]),
    triton=[((11, 20, 30), "mean")],
)
def test_the_same_bits_each_time(backend, shape, reduction):
    x, w, b, target, weight = make(backend, shape, F32, (5,))
    options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
    assert_same_bits(backend.threads, lambda: values(ops.linear_cross_entropy, (x, w, b), target, **options))


@each("shape", cpp=[(20, 3, 7)], triton=[(5, 2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend, shape, reduction):
    x, w, b, target, weight = make(backend, shape)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        [t.requires_grad_() for t in (x, w, b)], fast_mode=backend.name == "triton",
    )  # fmt: skip


def test_double_backward_goes_through_the_reference(backend):
    x, w, b, target, weight = make(backend, (3, 2, 4))
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: ops.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, label_smoothing=0.1),
        [t.requires_grad_() for t in (x, w, b)], fast_mode=backend.name == "triton",
    )  # fmt: skip


@each("rows reductions", cpp=[(40, (0, 1, 2))], triton=[(5, (0, 1))])
def test_opcheck(backend, rows, reductions):
    x, w, b, target, weight = make(backend, (rows, 10, 30), F32)
    forward, backward = backend.raw.linear_cross_entropy_fwd, backend.raw.linear_cross_entropy_bwd
    for reduction in reductions:
        arguments = (x, w, target, b, weight, reduction, -100, 0.1)
        torch.library.opcheck(forward, (*arguments, True, True, True))
        torch.library.opcheck(forward, (*arguments, False, False, False))
        loss = forward(*arguments, False, False, False)[0]
        torch.library.opcheck(backward, (loss, *arguments, True, False, True))
    low = (x.bfloat16(), w.bfloat16(), target, None, None, 1, -100, 0.0, True, True, False)
    torch.library.opcheck(forward, low)


@each("rows", cpp=[40], triton=[5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_compile_fullgraph(backend, rows, reduction, dtype):
    x, w, b, target, weight = make(backend, (rows, 10, 30), dtype)

    def f(x, w, b):
        return 2 * ops.linear_cross_entropy(x * 3, w, target, linear_bias=b, weight=weight, reduction=reduction)

    inputs = x, w, b
    torch.testing.assert_close(outputs_and_gradients(backend.compile(f), *inputs), outputs_and_gradients(f, *inputs))


@on(*CPP)
def test_export(backend):
    class Loss(torch.nn.Module):
        def forward(self, x, w, t):
            return ops.linear_cross_entropy(x, w, t)

    x, w, _, target, _ = make(backend, (4, 6, 10), F32)
    with torch.no_grad():
        program = torch.export.export(Loss(), (x, w, target))
    assert any("linear_cross_entropy_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, w, target), torchs(x, w, target))


@each("rows dtype", cpp=[(40, F64), (40, F32), (40, BF16)], triton=[(9, F32), (9, BF16)])
def test_autocast_projects_in_its_dtype_and_gives_float32(backend, rows, dtype):
    x, w, b, target, _ = make(backend, (rows, 16, 30), dtype)
    with torch.autocast(backend.device, torch.bfloat16):
        ours, theirs = (values(f, (x, w, b), target) for f in (ops.linear_cross_entropy, torchs))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("change", "says"), [
    ({"target": torch.full((4, 8), 1 / 8)}, "target is torch.float32"),
    ({"linear_weight": torch.ones(8, 2, 5), "target": torch.ones(4, 2).long()}, "the kernel takes"),
    ({"input": torch.ones(0, 5), "target": torch.ones(0).long()}, "there is nothing to multiply"),
])  # fmt: skip
@on(*CPP)
def test_where_no_kernel_serves_the_reference_does(backend, change, says):
    arguments = {"input": torch.randn(4, 5), "linear_weight": torch.randn(8, 5), "target": torch.arange(4)} | change
    with pytest.raises(RuntimeError, match=says):
        ops.linear_cross_entropy(**arguments)
    with ops.backend("reference"):
        ours = ops.linear_cross_entropy(**arguments)
    weight = arguments["linear_weight"]
    logits = F.linear(arguments["input"], weight.flatten(0, -2)).reshape(-1, *weight.shape[:-1])
    torch.testing.assert_close(ours, F.cross_entropy(logits, arguments["target"]), equal_nan=True)


@pytest.mark.parametrize(("change", "says"), [
    ({"linear_weight": torch.ones(8, 4)}, r"linear_weight \[8, 4\]"),
    ({"linear_weight": torch.ones(8, 5).double()}, "linear_weight is torch.float64"),
    ({"linear_bias": torch.ones(7)}, r"linear_bias has shape \[7\]"),
    ({"target": torch.arange(3)}, r"class indices of shape \[4\]"),
    ({"weight": torch.ones(7)}, r"weight has shape \[7\]"),
    ({"target": torch.full((4, 8), 1 / 8), "ignore_index": 3}, "target is torch.float32"),
])  # fmt: skip
@on(*CPP)
def test_bad_input(backend, change, says):
    arguments = {"input": torch.randn(4, 5), "linear_weight": torch.randn(8, 5), "target": torch.arange(4)} | change
    with pytest.raises(RuntimeError, match=says):
        ops.linear_cross_entropy(**arguments)


@on(*CPP)
def test_a_raw_call_with_bad_shapes_is_refused(backend):
    raw, x, w, t = backend.raw, torch.ones(4, 8), torch.ones(5, 8), torch.zeros(4).long()
    rest = (None, None, 1, -100, 0.0, True, True, True)
    with pytest.raises((ValueError, RuntimeError), match="target has shape"):
        raw.linear_cross_entropy_fwd(x, w, t[:3], *rest)
    with pytest.raises((ValueError, RuntimeError), match="linear_weight has shape"):
        raw.linear_cross_entropy_fwd(x, w[:, :3], t, *rest)
    with pytest.raises((ValueError, RuntimeError), match="linear_bias has shape"):
        raw.linear_cross_entropy_fwd(x, w, t, torch.ones(4), *rest[1:])
    with pytest.raises((ValueError, RuntimeError), match="grad has shape"):
        raw.linear_cross_entropy_bwd(torch.ones(4), x, w, t, *rest)
    with pytest.raises((ValueError, RuntimeError), match="grad has shape"):
        raw.linear_cross_entropy_bwd(torch.ones(()), x, w, t, None, None, 0, *rest[3:])


@on(*CPP)
def test_targets_beyond_the_classes_with_class_weights(backend):
    for target in (-1, 12, 2**40):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            ops.linear_cross_entropy(
                torch.ones(40, 3), torch.ones(12, 3), torch.full((40,), target), weight=torch.ones(12)
            )


@on(*CPP)
def test_class_weights_that_float16_cannot_hold(backend):
    """Products by PyTorch divide the gradients last; float16 has not the range for that."""
    x, w, b, target, weight = make(backend, (64, 12, 50), F16)
    for factor in (1e5, 1e-9):
        exact = values(torchs, (x.double(), w.double(), b.double()), target, weight=weight.double())
        ours = values(ops.linear_cross_entropy, (x, w, b), target, weight=weight.float() * factor)
        for a, e in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-2, atol=2e-4)


@on(*CPP)
def test_a_float32_bias_of_16_bit_logits(backend):
    x, w, b, target, _ = make(backend, (64, 12, 50), BF16)
    b = b.float() * 1.01  # more digits than bfloat16 has
    exact = values(torchs, (x.double(), w.double(), b.double()), target)
    ours = values(ops.linear_cross_entropy, (x, w, b), target)
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=1e-5, atol=1e-6)


@on(*CPP)
def test_threads_keep_their_autocast(backend):
    """One thread's call must not change whether another's casts."""
    x, w, _, target, _ = make(backend, (40, 12, 50), F32)
    wrong = []

    def calls(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(300):
                ops.linear_cross_entropy(x, w, target)
                if torch.is_autocast_enabled("cpu") != enabled:
                    wrong.append(enabled)

    threads = [threading.Thread(target=calls, args=(enabled,)) for enabled in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.triton
def test_blocks_of_rows():
    kernels = pytest.importorskip("tinyllm.kernels.linear_cross_entropy")
    found = [kernels.block_rows(rows) for rows in (1, 700, 2048, 2049, 5000, 32_768, 100_000)]
    assert found == [256, 768, 2048, 1280, 1792, 2048, 6400]
