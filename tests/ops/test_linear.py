import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.ops.operations import Operations
from tests.ops.parity import DTYPES, assert_same_bits, check_parity, outputs_and_gradients, run
from tinyllm import ops, reference
from tinyllm.ops import _products
from tinyllm.reference import ACTIVATIONS

# The input's rows, in_features, out_features.
SHAPES = [
    ((1,), 1, 1), ((1,), 5, 3), ((2, 1), 7, 33), ((3,), 64, 32), ((2, 2), 31, 100), ((5,), 16, 31), ((17,), 33, 65),
    ((4, 16), 96, 128), ((127,), 131, 97), ((2, 20), 300, 71),
]  # fmt: skip
LARGE = [
    ((3,), 1024, 1030), ((2,), 20000, 33),  # few rows, not packed
    ((6,), 700, 3100),  # more than is packed at a time, forward
    ((33,), 2100, 40), ((9,), 4100, 70),  # deep: sums continued in the output, forward
    ((4500,), 24, 33), ((2100,), 5, 300),  # and for the weight's gradient
    ((70,), 1024, 64), ((20,), 2048, 600),  # rows 4096 bytes apart, of the input; of the weight
    ((300,), 64, 1024), ((40,), 544, 96),  # and of the gradient
]  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_kernel():
    # With a patch of its own: the test's would be undone after the `with`, and whatever the test does to it, too late.
    with pytest.MonkeyPatch.context() as patch, ops.backend("cpp"):
        patch.setattr(_products, "_setting", "cpp")
        yield


def draw(seed, dtype, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make(rows, inputs, outputs, dtype=torch.float64, bias=True, residual=True):
    """Return input, weight, bias and residual; sums are of the order of 1."""
    weight = draw(1, torch.float64, outputs, inputs) / max(1, inputs) ** 0.5
    return (
        draw(0, dtype, *rows, inputs),
        weight.to(dtype),
        draw(2, dtype, outputs) if bias else None,
        draw(3, dtype, *rows, outputs) if residual else None,
    )


def make_network(rows, inputs, hidden, outputs, dtype=torch.float64, bias=True, residual=True):
    """Return input, weight1, bias1, weight2, bias2 and residual."""
    x, w1, b1, _ = make(rows, inputs, hidden, dtype, bias)
    _, w2, b2, r = make(rows, hidden, outputs, dtype, bias, residual)
    return x, w1, b1, w2, b2, r


def bind(function, activation):
    """Return the function with positional arguments, the residual last."""
    return lambda *x: function(*x[:-1], residual=x[-1], activation=activation)


def check(ours, theirs, arguments, activation):
    check_parity(bind(ours, activation), bind(theirs, activation), bind(theirs, activation), arguments)
    assert ops.last_backend() == "cpp"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("bias", "residual"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [((3,), 19, 37), ((21,), 20, 70)], ids=str)
def test_linear_options(rows, inputs, outputs, bias, residual, activation, dtype):
    check(ops.linear, reference.linear, make(rows, inputs, outputs, dtype, bias, residual), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES, ids=str)
def test_linear_shapes(rows, inputs, outputs, dtype):
    check(ops.linear, reference.linear, make(rows, inputs, outputs, dtype), "gelu")
    check(ops.linear, reference.linear, make(rows, inputs, outputs, dtype, residual=False), "none")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), LARGE, ids=str)
@pytest.mark.parametrize(("activation", "residual"), [("none", False), ("relu", True)])
def test_linear_large(rows, inputs, outputs, activation, residual, dtype):
    if dtype == torch.float16 and activation == "relu":
        pytest.skip("PyTorch's float16 products are slow; the other case tests them")
    check(ops.linear, reference.linear, make(rows, inputs, outputs, dtype, residual=residual), activation)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), LARGE, ids=str)
def test_linear_large_in_float64(rows, inputs, outputs):
    # There is nothing more precise to measure errors of such long sums with.
    for activation, residual in (("none", False), ("gelu", True)):
        arguments = make(rows, inputs, outputs, residual=residual)
        out, grads, used = run(bind(ops.linear, activation), arguments)
        exact, exact_grads, _ = run(bind(reference.linear, activation), arguments, grads=used)
        torch.testing.assert_close([*out, *grads], [*exact, *exact_grads], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("bias", "residual"), [(False, True), (True, False)])
@pytest.mark.parametrize("sizes", [((2,), 9, 21, 5), ((3, 11), 32, 65, 33)], ids=str)
def test_feed_forward_options(sizes, bias, residual, activation, dtype):
    check(ops.feed_forward, reference.feed_forward, make_network(*sizes, dtype, bias, residual), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [
    ((1,), 1, 1, 1), ((5,), 96, 384, 96), ((129,), 64, 100, 32), ((6,), 1100, 2500, 40), ((1,), 64, 700, 64),
    ((7,), 40, 2600, 1000),  # the two last: deep, and too wide to be packed together
], ids=str)  # fmt: skip
def test_feed_forward_shapes(sizes, dtype):
    if dtype == torch.float64 and sizes[2] > 2000:
        pytest.skip("nothing is more precise to measure errors of such long sums with")
    check(ops.feed_forward, reference.feed_forward, make_network(*sizes, dtype), "gelu")


def test_without_an_activation_it_is_pytorchs():
    x, weight, bias, _ = make((3, 4), 10, 6)
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(reference.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("sizes", [
    ((0,), 4, 3), ((3,), 0, 4), ((9,), 0, 40), ((3,), 4, 0), ((0,), 0, 0), ((2, 0), 5, 3), ((70,), 0, 1),
], ids=str)  # fmt: skip
def test_empty(sizes, activation):
    rows, inputs, outputs = sizes
    check(ops.linear, reference.linear, make(*sizes), activation)
    check(ops.feed_forward, reference.feed_forward, make_network(rows, inputs, 3, outputs), activation)
    check(ops.feed_forward, reference.feed_forward, make_network(rows, inputs, 0, outputs), activation)


# ---- Strides, and which gradients are wanted


@pytest.mark.parametrize("view", [
    lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x])[1], lambda x: x.repeat_interleave(3, -1)[..., ::3],
    lambda x: x[:1].expand(x.shape), lambda x: x[:, :1].expand(x.shape), lambda x: F.pad(x, (1, 2))[:, 1:-2],
])  # fmt: skip
@pytest.mark.parametrize("rows", [2, 7, 30])
def test_any_strides(view, rows):
    x, weight, bias, residual = make((rows,), 12, 40)
    arguments = (view(x), view(weight), bias[:1].expand(40), view(residual))
    check(ops.linear, reference.linear, arguments, "gelu")
    network = (view(x), view(weight), bias.repeat(2)[::2], view(weight.T), None, view(x))
    check(ops.feed_forward, reference.feed_forward, network, "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [
    ((1,), 8, 3), ((1,), 1000, 70), ((2,), 7, 33), ((3,), 64, 1100), ((8,), 131, 97), ((9,), 20, 70), ((4, 16), 96, 99),
], ids=str)  # fmt: skip
def test_a_weight_that_is_stored_by_inputs(rows, inputs, outputs, dtype):
    """It is read as it lies, and its gradient lies so, as transformers' Conv1D and its optimizer have it."""
    x, weight, bias, residual = make(rows, inputs, outputs, dtype)
    stored = weight.t().contiguous()
    check(ops.linear, reference.linear, (x, stored.t(), bias, residual), "gelu_tanh")
    second = (draw(5, torch.float64, outputs, 40) / outputs**0.5).to(dtype).t()
    network = (x, stored.t(), bias, second, None, None)
    check(ops.feed_forward, reference.feed_forward, network, "gelu")
    stored.requires_grad_()
    for out in (ops.linear(x, stored.t()), ops.feed_forward(x, stored.t(), None, second, None)):
        (grad,) = torch.autograd.grad(out.sum(), stored)
        assert grad.is_contiguous()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_expanded_gradient(activation):
    arguments = [x.requires_grad_() for x in make((6,), 20, 33)]
    network = [x.requires_grad_() for x in make_network((6,), 20, 33, 5)]
    for leaves, name in ((arguments, "linear"), (network, "feed_forward")):
        ours, theirs = (
            # sum's gradient is one element, expanded
            torch.autograd.grad(
                getattr(module, name)(*leaves[:-1], residual=leaves[-1], activation=activation).sum(), leaves
            )
            for module in (ops, reference)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["linear", "feed_forward"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_any_part_may_be_frozen(name, activation):
    whole = make((7,), 10, 33) if name == "linear" else make_network((7,), 10, 33, 8)
    choices = [[i] for i in range(len(whole))] + [[i for i in range(len(whole)) if i != j] for j in range(len(whole))]
    for chosen in choices:
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(whole)]
        found = []
        for module in (ops, reference):
            out = getattr(module, name)(*leaves[:-1], residual=leaves[-1], activation=activation)
            found.append(torch.autograd.grad(out.square().sum(), [leaves[i] for i in chosen]))
        torch.testing.assert_close(*found)


def test_a_tensor_in_two_roles():
    x = draw(0, torch.float64, 6, 6).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(module.linear(x, x, activation="gelu", residual=x).square().sum(), x)
        for module in (ops, reference)
    )
    torch.testing.assert_close(ours, theirs)


# ---- Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_activations_everywhere(activation, dtype):
    """Every value and slope is compared by itself, so that a large one elsewhere excuses no error."""
    largest = 4 if dtype == torch.float16 else 9
    sizes = torch.cat([torch.linspace(0.01, 7, 500, dtype=torch.float64), torch.logspace(1, largest, 30)])
    x = torch.cat([sizes, -sizes]).to(dtype).view(-1, 1)
    found = []
    for function, at in ((ops.linear, x), (reference.linear, x), (reference.linear, x.double())):
        leaf = at.detach().requires_grad_()
        out = function(leaf, torch.ones(1, 1, dtype=at.dtype), activation=activation)
        found.append((out.double(), torch.autograd.grad(out.sum(), leaf)[0].double()))
    # A value is x times a share that is computed to about a rounding step of 1, a slope is of the order of 1. The
    # reference itself cancels where tanh is nearly 1, which float64 has nothing to tell from.
    steps = 64 if dtype == torch.float64 else 4
    for scale, ours, torchs, exact in zip((x.double().abs(), torch.ones_like(x)), *found, strict=True):
        floor = steps * torch.finfo(dtype).eps * scale
        excess = (ours - exact).abs() - 2 * (torchs - exact).abs() - floor
        assert excess.max() <= 0, (x[excess.argmax()], ours[excess.argmax()], exact[excess.argmax()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("count", [3, 40])
def test_nan_and_infinity(count, activation, dtype):
    """The formula in double precision decides: PyTorch's float32 gelu(inf) is NaN or not, depending on its vectors."""
    nan, inf, most = float("nan"), float("inf"), torch.finfo(dtype).max
    for value in (nan, inf, -inf, most, -most):
        x, weight = torch.full((count, 1), value, dtype=dtype), torch.ones(40, 1, dtype=dtype)
        out = ops.linear(x, weight, activation=activation)
        exact = reference.linear(x.double(), weight.double(), activation=activation)
        torch.testing.assert_close(out, exact.to(dtype), equal_nan=True, rtol=0, atol=0)
    leaf = torch.full((2, 1), nan, dtype=dtype).requires_grad_()
    for function in (ops.linear, reference.linear):
        (grad,) = torch.autograd.grad(function(leaf, weight, activation=activation).sum(), leaf)
        assert torch.isnan(grad).all() == (activation != "relu")


def test_nan_and_infinity_stay_in_their_row():
    for rows in (4, 40):
        x, weight, bias, residual = make((rows,), 33, 40, torch.float32)
        x[1, 5], x[2, 7] = float("nan"), float("inf")
        ours = ops.linear(x, weight, bias, residual=residual)
        theirs = reference.linear(x, weight, bias, residual=residual)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [((3,), 72, 2000), ((700,), 72, 96), ((61,), 2100, 65), ((11,), 300, 3000)], ids=str)
def test_bits_do_not_depend_on_threads(sizes, dtype):
    rows, inputs, hidden = sizes
    network = make_network(rows, inputs, hidden, 40, dtype)

    def one(x, w, b):
        return ops.linear(x, w, b, activation="gelu")

    def two(x, w1, b1, w2, b2, r):
        return ops.feed_forward(x, w1, b1, w2, b2, activation="gelu_tanh", residual=r)

    assert_same_bits((1, 2, 3), lambda: outputs_and_gradients(one, *network[:3]))
    assert_same_bits((1, 2, 3), lambda: outputs_and_gradients(two, *network))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    leaves = [x.requires_grad_() for x in make((3,), 4, 5)]
    network = [x.requires_grad_() for x in make_network((2,), 3, 4, 2)]

    def linear(x, w, b, r):
        return ops.linear(x, w, b, activation=activation, residual=r)

    def feed_forward(x, w1, b1, w2, b2, r):
        return ops.feed_forward(x, w1, b1, w2, b2, activation=activation, residual=r)

    assert torch.autograd.gradcheck(linear, leaves)
    assert torch.autograd.gradcheck(feed_forward, network)
    assert torch.autograd.gradgradcheck(linear, leaves)  # through the reference
    assert torch.autograd.gradgradcheck(feed_forward, network)


# ---- PyTorch's machinery


def test_opcheck():
    raw = torch.ops.tinyllm
    x, w1, b1, w2, b2, r = make_network((2, 3), 10, 12, 7, torch.float32)
    grad, hidden = r, draw(4, torch.float32, 2, 3, 12)
    torch.library.opcheck(raw.linear_fwd, (x, w1, b1, None, "relu", False))
    torch.library.opcheck(raw.linear_fwd, (x.bfloat16(), w1.bfloat16(), None, hidden.bfloat16(), "gelu", True))
    torch.library.opcheck(raw.linear_bwd, (hidden, x, w1, hidden, "gelu", True, True, True))
    torch.library.opcheck(raw.linear_bwd, (hidden, x, w1, None, "none", False, True, False))
    torch.library.opcheck(raw.linear_bwd, (hidden, x, w1.t().contiguous().t(), None, "none", True, True, False))
    torch.library.opcheck(raw.feed_forward_fwd, (x, w1, b1, w2, b2, r, "gelu", True))
    torch.library.opcheck(raw.feed_forward_fwd, (x, w1, None, w2, None, None, "relu", False))
    arguments = (grad, x, w1, w2, hidden, hidden, "relu")
    torch.library.opcheck(raw.feed_forward_bwd, (*arguments, True, True, True, True))
    torch.library.opcheck(raw.feed_forward_bwd, (*arguments, False, False, False, True))
    w1, w2 = (w.t().contiguous().t() for w in (w1, w2))
    torch.library.opcheck(raw.feed_forward_bwd, (grad, x, w1, w2, hidden, hidden, "relu", True, True, False, False))


@pytest.mark.parametrize("setting", ["cpp", "auto"])
def test_compile_fullgraph(setting, unforced, monkeypatch):
    monkeypatch.setattr(_products, "_setting", setting)
    leaves = [x.requires_grad_() for x in make_network((6,), 10, 12, 7, torch.float32)]

    def f(x, w1, b1, w2, b2, r):
        network = ops.feed_forward(x, w1, b1, w2, b2, activation="gelu", residual=r)
        return network * ops.linear(ops.linear(x, w1, b1, activation="relu"), w2)

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves))


def test_export():
    class Network(torch.nn.Module):
        def forward(self, x, w1, w2):
            return ops.linear(ops.feed_forward(x, w1, None, w2, None, activation="gelu"), w2.mT, residual=x @ w1.mT)

    x, w1, _, w2, *_ = make_network((4,), 10, 12, 10, torch.float32)
    with torch.no_grad():
        program = torch.export.export(Network(), (x, w1, w2))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"tinyllm.linear_fwd.default", "tinyllm.feed_forward_fwd.default"} <= targets
    torch.testing.assert_close(program.module()(x, w1, w2), Network()(x, w1, w2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_autocast(dtype):
    x, w1, b1, w2, b2, _ = make_network((4, 3), 16, 12, 7, dtype)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        one, two = ops.linear(x, w1, b1), ops.feed_forward(x, w1, b1, w2, b2)
        torchs = F.linear(x, w1, b1)
    assert one.dtype == two.dtype == torchs.dtype
    torch.testing.assert_close(one, torchs)
    (grad,) = torch.autograd.grad(one.sum() + two.sum(), x)
    assert grad.dtype == dtype


def test_autocast_casts_a_weight_once_where_pytorch_serves(monkeypatch, unforced):
    monkeypatch.setattr(_products, "_setting", "torch")
    x, w1, b1, w2, b2, _ = make_network((4, 3), 16, 12, 7, torch.float32)
    w1.requires_grad_()
    with Operations() as operations, torch.autocast("cpu", torch.bfloat16):
        first = [ops.linear(x, w1, b1), ops.feed_forward(x, w1, b1, w2, b2)]
        second = [ops.linear(x, w1, b1), ops.feed_forward(x, w1, b1, w2, b2)]
    cast = [args[0] for function, args in operations.calls if function is torch.ops.aten._to_copy.default]
    assert sum(x is w1 for x in cast) == 1
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# ---- Errors


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
    ({"input": torch.tensor(1.0)}, ValueError, "input has no dimensions"),
    ({"weight": torch.ones(8)}, ValueError, r"weight has shape \[8\]; \(out_features, 8\) is needed"),
    ({"weight": torch.ones(8, 5)}, ValueError, r"weight has shape \[8, 5\]"),
    ({"weight": torch.ones(5, 8, dtype=torch.float64)}, TypeError, "weight has dtype torch.float64"),
    ({"weight": torch.ones(5, 8, device="meta")}, ValueError, "weight is on meta"),
    ({"bias": torch.ones(8)}, ValueError, r"bias has shape \[8\]; \[5\] is needed"),
    ({"bias": torch.ones(5, dtype=torch.bfloat16)}, TypeError, "bias has dtype torch.bfloat16"),
    ({"residual": torch.ones(1, 5)}, ValueError, r"residual has shape \[1, 5\]; \[4, 5\] is needed"),
    ({"residual": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "residual has dtype torch.int64"),
    ({"activation": "tanh"}, ValueError, "activation is 'tanh'; one of none, relu, gelu, gelu_tanh, silu is needed"),
])  # fmt: skip
def test_bad_input(change, error, says):
    arguments = {"input": torch.ones(4, 8), "weight": torch.ones(5, 8), "bias": torch.ones(5)} | change
    with pytest.raises(error, match=says):
        ops.linear(**arguments)


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"weight1": torch.ones(6, 7)}, ValueError, r"weight1 has shape \[6, 7\]; \(out_features, 8\) is needed"),
    ({"bias1": torch.ones(5)}, ValueError, r"bias1 has shape \[5\]; \[6\] is needed"),
    ({"weight2": torch.ones(5, 7)}, ValueError, r"weight2 has shape \[5, 7\]; \(out_features, 6\) is needed"),
    ({"bias2": torch.ones(5).half()}, TypeError, "bias2 has dtype torch.float16"),
    ({"residual": torch.ones(4, 6)}, ValueError, r"residual has shape \[4, 6\]; \[4, 5\] is needed"),
    ({"activation": None}, ValueError, "activation is None"),
])  # fmt: skip
def test_bad_input_of_feed_forward(change, error, says):
    names = ("input", "weight1", "bias1", "weight2", "bias2")
    arguments = dict(zip(names, map(torch.ones, [(4, 8), (6, 8), (6,), (5, 6), (5,)]), strict=True)) | change
    with pytest.raises(error, match=says):
        ops.feed_forward(**arguments)


def test_a_raw_call_with_bad_shapes_is_refused():
    raw, x = torch.ops.tinyllm, torch.ones(4, 8)
    bad = (ValueError, RuntimeError)
    with pytest.raises(bad, match="weight has shape"):
        raw.linear_fwd(x, torch.ones(5, 7), None, None, "none", False)
    with pytest.raises(bad, match="residual has shape"):
        raw.linear_fwd(x, torch.ones(5, 8), None, torch.ones(3, 5), "none", False)
    with pytest.raises(bad, match="activation is 'tanh'"):
        raw.linear_fwd(x, torch.ones(5, 8), None, None, "tanh", False)
    with pytest.raises(bad, match="grad has shape"):
        raw.linear_bwd(torch.ones(4, 4), x, torch.ones(5, 8), None, "none", True, True, True)
    with pytest.raises(bad, match="gate has shape"):
        raw.linear_bwd(torch.ones(4, 5), x, torch.ones(5, 8), torch.ones(4), "relu", True, True, True)
    with pytest.raises(bad, match="weight2 has shape"):
        raw.feed_forward_fwd(x, torch.ones(5, 8), None, torch.ones(5, 4), None, None, "none", False)
    w, g = torch.ones(8, 8), torch.ones(4, 8)
    with pytest.raises(bad, match="hidden has shape"):
        raw.feed_forward_bwd(g, x, w, w, torch.ones(4, 7), g, "relu", True, True, True, True)


# ---- PyTorch's products or ours


def test_the_setting_chooses(unforced, monkeypatch):
    x, weight = torch.ones(4, 8), torch.ones(5, 8)
    for setting, taken in (("cpp", "cpp"), ("torch", "reference")):
        monkeypatch.setattr(_products, "_setting", setting)
        for call in (lambda: ops.linear(x, weight), lambda: ops.feed_forward(x, weight, None, weight.T, None)):
            call()
            assert ops.last_backend() == taken
    with ops.backend("cpp"), pytest.raises(RuntimeError, match="cpp: TINYLLM_LINEAR=torch"):
        ops.linear(x, weight)
    monkeypatch.setenv("TINYLLM_LINEAR", "fast")
    monkeypatch.setattr(_products, "_setting", None)
    with pytest.raises(ValueError, match="TINYLLM_LINEAR is 'fast'; auto, cpp or torch is needed"):
        ops.linear(x, weight)
