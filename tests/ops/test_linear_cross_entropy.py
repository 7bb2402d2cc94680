import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference

# N, D, C: more rows than the D that fit where the weight's gradient will be, columns that fill no vector, several
# ranges of classes.
SHAPES = [(1, 1, 1), (3, 2, 5), (33, 20, 300), (17, 64, 257), (130, 40, 513), (300, 7, 60), (64, 1024, 33)]


@pytest.fixture(autouse=True, params=["cpp", "torch"])
def raw(request, monkeypatch):
    """The raw operators, with our own products and with PyTorch's."""
    monkeypatch.setenv("TINYLLM_LINEAR", request.param)
    with ops.backend("cpp"):
        yield torch.ops.tinyllm if request.param == "cpp" else torch.ops.tinyllm_products


def make(shape, dtype=torch.float64, ignored=()):
    """Input, linear weight, linear bias, targets of which the rows `ignored` are, and positive class weights."""
    rows, features, classes = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)  # noqa: E731
    target = torch.randint(classes, (rows,), generator=generator)
    for row in ignored:
        target[row] = -100
    weight = 0.2 + torch.rand(classes, generator=generator, dtype=torch.float64)
    floats = draw(rows, features), 2 * draw(classes, features) / math.sqrt(features), draw(classes), weight
    x, w, b, weight = (t.to(dtype) for t in floats)
    return x, w, b, target, weight


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
    assert ops.last_backend() == "cpp"


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("reduction", "weighted", "ignored", "smoothing"),
    list(itertools.product(["mean", "sum", "none"], [False, True], [(), (0, 3, 88)], [0.0, 0.1, 1.0])),
)
def test_options(reduction, weighted, ignored, smoothing, dtype):
    x, w, b, target, weight = make((90, 20, 300), dtype, ignored)
    compare((x, w, b), target, weight=weight if weighted else None, reduction=reduction, label_smoothing=smoothing)


def test_the_reference_is_pytorchs():
    x, w, b, target, weight = make((9, 5, 12))
    options = {"linear_bias": b, "weight": weight, "label_smoothing": 0.1, "ignore_index": 3}
    exact = reference.linear_cross_entropy(x, w, target, **options)
    torch.testing.assert_close(exact, torchs(x, w, target, **options))
    if hasattr(F, "linear_cross_entropy"):
        torch.testing.assert_close(exact, F.linear_cross_entropy(x, w, target, **options))


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_of_the_gradients(needed, reduction):
    x, w, b, target, _ = make((70, 24, 300))
    found = []
    for f in (ops.linear_cross_entropy, torchs):
        inputs = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
        loss = f(*inputs[:2], target, linear_bias=inputs[2], reduction=reduction)
        found.append([loss, *torch.autograd.grad(loss.sum(), [t for t in inputs if t.requires_grad])])
    torch.testing.assert_close(*found)


def test_loss_alone_is_the_loss_with_gradients():
    x, w, b, target, _ = make((700, 24, 300), torch.float32)
    alone = ops.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    with_gradients = ops.linear_cross_entropy(x, w.requires_grad_(), target, linear_bias=b, reduction="none")
    assert torch.equal(alone, with_gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_or_of_weight_zero(reduction):
    x, w, b, _, _ = make((40, 8, 20))
    for target, weight in ((-100, None), (1, torch.zeros(20, dtype=torch.float64))):
        arguments = (torch.full((40,), target),)
        ours, theirs = (
            values(f, (x, w, b), *arguments, weight=weight, reduction=reduction)
            for f in (ops.linear_cross_entropy, torchs)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_logits(smoothing):
    inf, nan = math.inf, math.nan
    for bias in (
        [-inf] * 300 + [0.0] * 300, [0.0] * 300 + [-inf] * 300, [-inf] * 600, [0.0] * 599 + [inf], [nan] + [0.0] * 599,
    ):  # fmt: skip
        x, w, _, target, _ = make((20, 6, 600))
        found = []
        for f in (ops.linear_cross_entropy, torchs):
            leaves = [t.requires_grad_() for t in (x, w)]
            options = {"linear_bias": x.new_tensor(bias), "reduction": "none", "label_smoothing": smoothing}
            loss = f(*leaves, target, **options)
            found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits(size):
    x, w, b, target, _ = make((40, 16, 300), torch.float32)
    compare((x * size, w, b), target)
    compare((x, w, b + size), target)


def test_one_row():
    x, w, b, target, _ = make((1, 5, 30))
    ours, theirs = (values(f, (x[0], w, b), target[0], reduction="none") for f in (ops.linear_cross_entropy, torchs))
    torch.testing.assert_close(ours, theirs)
    assert ops.last_backend() == "cpp"


@pytest.mark.parametrize("bad", [60, -1, 2**40])
def test_a_target_out_of_range_is_an_index_error(bad):
    x, w, _, target, _ = make((30, 7, 60))
    target[20] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        ops.linear_cross_entropy(x, w.requires_grad_(), target)


def test_any_strides():
    x, w, b, target, _ = make((48, 24, 64))
    compare((x.t().contiguous().t(), w[::2, :], b[::2]), target % 32)
    compare((x[::2, 1:], w.flip(0)[:, 1:], b.flip(0)), target.repeat(2)[::4])
    compare((x[:, :1].expand(-1, 24), w[:1].expand(64, -1), b[:1].expand(64)), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_twice_with_different_gradients(reduction, dtype, raw):
    """Forward computes the gradients; what comes after the first backward must not depend on what became of them."""
    x, w, b, target, _ = make((40, 12, 50), dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=b, reduction=reduction)
    exact = values(torchs, [t.double() for t in (x, w, b)], target, reduction=reduction)[1:]
    steps = 64 if dtype == torch.float64 else 8 if raw is torch.ops.tinyllm else 16
    tolerance = dict.fromkeys(("rtol", "atol"), steps * torch.finfo(dtype).eps)
    for factor in (1.0, 1.0, -2.5):
        grads = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        for grad, right in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad.double(), factor * right, **tolerance)
            grad.fill_(77.0)
    loss = ops.linear_cross_entropy(*leaves[:2], target, linear_bias=b, reduction=reduction)
    for grad, right in zip(torch.autograd.grad(loss * 3.0, leaves), exact, strict=True):
        torch.testing.assert_close(grad.double(), 3 * right, **tolerance)


@pytest.mark.parametrize("shape", [(300, 72, 1500), (90, 100, 5000)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bits_do_not_depend_on_threads(shape, reduction):
    x, w, b, target, weight = make(shape, torch.float32, (5,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
            results.append(values(ops.linear_cross_entropy, (x, w, b), target, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("needed", "rows"), [((True, True), 1024), ((True, False), 1024), ((False, False), 1024), ((True, True), 3000)]
)
def test_memory_is_a_tenth_of_the_logits(needed, rows, dtype, raw):
    features, classes = 256, 20_000
    x, w, _, target, _ = make((rows, features, classes), dtype)
    x.requires_grad_(needed[0])
    w.requires_grad_(needed[1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = ops.linear_cross_entropy(x, w, target)
    assert loss.requires_grad == any(needed)
    # Forward has computed the gradients, which have float32 until backward hands them out.
    gradients = sum(t.numel() * 4 for t, need in zip((x, w), needed, strict=True) if need)
    held = peak = 0
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    assert gradients < peak
    share = 0.1 if any(needed) or raw is not torch.ops.tinyllm else 0.03
    assert (peak - gradients) / (rows * classes * x.element_size()) < share


def test_gradcheck():
    x, w, b, target, weight = make((20, 3, 7))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for reduction in ("mean", "sum", "none"):
        options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
        assert torch.autograd.gradcheck(
            lambda x, w, b, o=options: ops.linear_cross_entropy(x, w, target, linear_bias=b, **o), leaves
        )


def test_double_backward_goes_through_the_reference():
    x, w, b, target, weight = make((3, 2, 4))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: ops.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, label_smoothing=0.1),
        leaves,
    )


def test_opcheck(raw):
    x, w, b, target, weight = make((40, 10, 30), torch.float32)
    for reduction in (0, 1, 2):
        arguments = (x, w, target, b, weight, reduction, -100, 0.1)
        torch.library.opcheck(raw.linear_cross_entropy_fwd, (*arguments, True, True, True))
        torch.library.opcheck(raw.linear_cross_entropy_fwd, (*arguments, False, False, False))
        loss = raw.linear_cross_entropy_fwd(*arguments, False, False, False)[0]
        torch.library.opcheck(raw.linear_cross_entropy_bwd, (loss, *arguments, True, False, True))
    low = (x.bfloat16(), w.bfloat16(), target, None, None, 1, -100, 0.0, True, True, False)
    torch.library.opcheck(raw.linear_cross_entropy_fwd, low)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_fullgraph(reduction, dtype):
    x, w, b, target, weight = make((40, 10, 30), dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def f(x, w, b):
        return 2 * ops.linear_cross_entropy(x * 3, w, target, linear_bias=b, weight=weight, reduction=reduction)

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, x, w, t):
            return ops.linear_cross_entropy(x, w, t)

    x, w, _, target, _ = make((4, 6, 10), torch.float32)
    with torch.no_grad():
        program = torch.export.export(Loss(), (x, w, target))
    assert any("linear_cross_entropy_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, w, target), torchs(x, w, target))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_autocast_projects_in_its_dtype_and_gives_float32(dtype):
    x, w, b, target, _ = make((40, 16, 30), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (values(f, (x, w, b), target) for f in (ops.linear_cross_entropy, torchs))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("change", "says"), [
    ({"target": torch.full((4, 8), 1 / 8)}, "target is torch.float32"),
    ({"linear_weight": torch.ones(8, 2, 5), "target": torch.ones(4, 2).long()}, "the kernel takes"),
    ({"input": torch.ones(0, 5), "target": torch.ones(0).long()}, "there is nothing to multiply"),
])  # fmt: skip
def test_where_no_kernel_serves_the_reference_does(change, says):
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
def test_bad_input(change, says):
    arguments = {"input": torch.randn(4, 5), "linear_weight": torch.randn(8, 5), "target": torch.arange(4)} | change
    with pytest.raises(RuntimeError, match=says):
        ops.linear_cross_entropy(**arguments)


def test_a_raw_call_with_bad_shapes_is_refused(raw):
    x, w, t = torch.ones(4, 8), torch.ones(5, 8), torch.zeros(4).long()
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


def test_targets_beyond_the_classes_with_class_weights():
    for target in (-1, 12, 2**40):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            ops.linear_cross_entropy(
                torch.ones(40, 3), torch.ones(12, 3), torch.full((40,), target), weight=torch.ones(12)
            )


def test_class_weights_that_float16_cannot_hold():
    """Products by PyTorch divide the gradients last; float16 has not the range for that."""
    x, w, b, target, weight = make((64, 12, 50), torch.float16)
    for factor in (1e5, 1e-9):
        exact = values(torchs, (x.double(), w.double(), b.double()), target, weight=weight.double())
        ours = values(ops.linear_cross_entropy, (x, w, b), target, weight=weight.float() * factor)
        for a, e in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-2, atol=2e-4)


def test_a_float32_bias_of_16_bit_logits():
    x, w, b, target, _ = make((64, 12, 50), torch.bfloat16)
    b = b.float() * 1.01  # more digits than bfloat16 has
    exact = values(torchs, (x.double(), w.double(), b.double()), target)
    ours = values(ops.linear_cross_entropy, (x, w, b), target)
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=1e-5, atol=1e-6)


def test_threads_keep_their_autocast():
    """One thread's call must not change whether another's casts."""
    x, w, _, target, _ = make((40, 12, 50), torch.float32)
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
