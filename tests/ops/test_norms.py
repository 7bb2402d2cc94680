"""layer_norm, rms_norm and both after a sum."""

import functools

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import cases, each_dtype, on, with_dtypes
from tests.ops.parity import assert_equal, assert_same_bits, check_parity, outputs_and_gradients
from tinyllm import ops, reference


def eps(tail):
    """Return a usual eps; a large one for rows of one element, whose gradients are rounding alone but for it."""
    return 0.1 if tail == [1] else 1e-5


# Name -> ours, PyTorch's and the reference.
NORMS = {
    "layer_norm": (
        lambda tail, x, w=None, b=None: ops.layer_norm(x, tail, w, b, eps(tail)),
        lambda tail, x, w=None, b=None: F.layer_norm(x, tail, w, b, eps(tail)),
        lambda tail, x, w=None, b=None: reference.layer_norm(x, tail, w, b, eps(tail)),
    ),
    "add_layer_norm": (
        lambda tail, x, r, w=None, b=None: ops.add_layer_norm(x, r, tail, w, b, eps(tail)),
        lambda tail, x, r, w=None, b=None: (F.layer_norm(x + r, tail, w, b, eps(tail)), x + r),
        lambda tail, x, r, w=None, b=None: reference.add_layer_norm(x, r, tail, w, b, eps(tail)),
    ),
    "rms_norm": (
        lambda tail, x, w=None: ops.rms_norm(x, tail, w, eps(tail)),
        lambda tail, x, w=None: F.rms_norm(x, tail, w, eps(tail)),
        lambda tail, x, w=None: reference.rms_norm(x, tail, w, eps(tail)),
    ),
    "add_rms_norm": (
        lambda tail, x, r, w=None: ops.add_rms_norm(x, r, tail, w, eps(tail)),
        lambda tail, x, r, w=None: (F.rms_norm(x + r, tail, w, eps(tail)), x + r),
        lambda tail, x, r, w=None: reference.add_rms_norm(x, r, tail, w, eps(tail)),
    ),
}
# What a norm does not take.
LEFT_OUT = {
    "layer_norm": ("residual",), "add_layer_norm": (), "rms_norm": ("residual", "bias"), "add_rms_norm": ("bias",),
}  # fmt: skip
each_norm = pytest.mark.parametrize("norm", NORMS)

# The shape and how many of its dimensions are normalized.
SHAPES = {
    "cpp": [
        ((5, 1), 1), ((3, 7), 1), ((2, 3, 16), 1), ((1, 1, 31), 1), ((4, 33), 1), ((129, 64), 1), ((2, 5, 3, 8), 2),
        ((17, 1000), 1), ((3, 1021), 1), ((700, 24), 1),
    ],
    # The last is beyond what a program of backward's holds in registers.
    "triton": [
        ((5, 1), 1), ((3, 7), 1), ((1, 1, 31), 1), ((129, 64), 1), ((2, 5, 3, 8), 2), ((17, 1000), 1), ((2, 8200), 1),
    ],
    # Parts of a warp, a warp, several, a cluster of two and of four; elements one by one where the width is odd. More
    # rows than run at a time, of the first widths, so that loops wrap.
    "cuda": [
        ((5, 1), 1), ((600, 3), 1), ((150, 31), 1), ((130, 64), 1), ((67, 127), 1), ((2, 5, 3, 8), 2), ((69, 768), 1),
        ((7, 1000), 1), ((13, 1096), 1), ((3, 4096), 1), ((1, 8192), 1),
    ],
}  # fmt: skip
PARITY = with_dtypes(SHAPES)
# Beyond what a program of forward's holds. It takes seconds in the interpreter, and every dtype its same way.
PARITY["triton"] += [((2, 16_401), 1, torch.float32), ((2, 16_401), 1, torch.bfloat16)]
PLAIN = {
    "cpp": PARITY["cpp"],
    "triton": [((4, 33), 1, torch.float32), ((4, 8300), 1, torch.float32)],
    "cuda": [((9, 33), 1, torch.float32), ((9, 2048), 1, torch.float32)],
}


def make(backend, norm, shape, dims, dtype):
    """Return the normalized shape and a norm's tensors."""
    tail = shape[len(shape) - dims :]
    sizes = {"input": shape, "residual": shape, "weight": tail, "bias": tail}
    inputs = [
        backend.draw(*size, dtype=dtype, seed=seed)
        for seed, (name, size) in enumerate(sizes.items(), 1)
        if name not in LEFT_OUT[norm]
    ]
    return list(tail), inputs


def for_backend(backend, norm):
    """Skip a norm that the CUDA C++ kernels leave to Triton's."""
    if backend.name == "cuda" and norm == "add_rms_norm":
        pytest.skip("Triton's kernel serves it")


def check(backend, norm, tail, inputs, monkeypatch):
    for_backend(backend, norm)
    if backend.name == "triton" and backend.device == "cpu" and tail[-1] >= 1000:
        # In the interpreter a program takes milliseconds, whatever its size. Narrower rows are summed by their own.
        monkeypatch.setattr("tinyllm.kernels.layer_norm.SUM_COLUMNS", 256)
    check_parity(*(functools.partial(function, tail) for function in NORMS[norm]), inputs)
    assert ops.last_backend() == backend.name


@each_norm
@cases("shape dims dtype", **PARITY)
def test_parity(backend, norm, shape, dims, dtype, monkeypatch):
    check(backend, norm, *make(backend, norm, shape, dims, dtype), monkeypatch)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@cases("shape dims dtype", **PLAIN)
def test_without_parameters(backend, norm, shape, dims, dtype, monkeypatch):
    tail, (x, *_) = make(backend, norm, shape, dims, dtype)
    check(backend, norm, tail, [x], monkeypatch)


@pytest.mark.any_build
def test_the_reference_is_pytorchs_layer_norm():
    x, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((7, 33), (33,), (33,)))
    torch.testing.assert_close(reference.layer_norm(x, [33], weight, bias), F.layer_norm(x, (33,), weight, bias))


@each_dtype()
def test_the_default_eps_is_pytorchs(backend, dtype):
    x = torch.full((2, 8), 1e-3, dtype=dtype, device=backend.device)  # so small that eps shows
    theirs = F.rms_norm(x, (8,))
    torch.testing.assert_close(ops.rms_norm(x, 8), theirs)
    torch.testing.assert_close(reference.rms_norm(x, [8]), theirs)


@pytest.mark.parametrize("norm", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("which", [0, 1], ids=["normed", "sum"])
def test_a_norm_after_a_sum_with_one_output_used(backend, norm, which):
    for_backend(backend, norm)
    tail, inputs = make(backend, norm, (6, 20), 1, backend.dtypes[0])
    leaves = [x.requires_grad_() for x in inputs]
    ours, _, exact = NORMS[norm]
    grads = [
        torch.autograd.grad(f(tail, *leaves)[which].pow(2).sum(), leaves, allow_unused=True) for f in (ours, exact)
    ]
    torch.testing.assert_close(*grads)


@each_norm
@each_dtype(cpp=[torch.float64], triton=[torch.float64], cuda=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_view", [
    lambda x: x[:, 1:], lambda x: x[:, 8:], lambda x: x[::3, :96], lambda x: x[::2, 1:], lambda x: x.transpose(0, 1),
    lambda x: x[:1].expand(7, -1), lambda x: x[:, :1].expand(-1, 12), lambda x: x[:1, :1].expand(6, 20),
    lambda x: x.flip(0), lambda x: x[:1, 1:97], lambda x: x.view(4, 4, 104).transpose(0, 1),
    lambda x: x.view(4, 4, 104)[:, :3, :64],
], ids=lambda f: "")  # fmt: skip
def test_any_strides(backend, norm, make_view, dtype):
    """Memory between the elements, of gradients too, is not read."""
    views = [make_view(backend.draw(16, 104, dtype=dtype, seed=seed)) for seed in range(4)]
    size = views[0].size(-1)
    weight, bias = backend.draw(2 * size, dtype=dtype, seed=5)[::2], backend.draw(size + 1, dtype=dtype, seed=6)[1:]
    for_backend(backend, norm)
    given = {"input": views[0], "residual": views[1], "weight": weight, "bias": bias}
    inputs = [tensor for name, tensor in given.items() if name not in LEFT_OUT[norm]]
    ours, torchs, _ = (functools.partial(function, [size]) for function in NORMS[norm])
    grads = views[2 : 4 if norm.startswith("add") else 3]
    found = outputs_and_gradients(ours, *inputs, grads=grads)
    plain = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
    torch.testing.assert_close(found, outputs_and_gradients(ours, *plain, grads=[g.contiguous() for g in grads]))
    if dtype == torch.float64:
        torch.testing.assert_close(found, outputs_and_gradients(torchs, *plain, grads=grads))


@each_norm
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0, 0)], ids=str)
def test_empty(backend, norm, shape):
    for_backend(backend, norm)
    tail, (x, *more) = make(backend, norm, shape, 1, torch.float32)
    sizes = [shape] * (2 if norm.startswith("add") else 1)
    *outputs, grad_x = outputs_and_gradients(lambda x: NORMS[norm][0](tail, x, *more), x)
    assert [list(y.shape) for y in (*outputs, grad_x)] == [list(size) for size in (*sizes, shape)]
    found = outputs_and_gradients(functools.partial(NORMS[norm][0], tail), x, *more)
    # Of what follows the input, which may be a residual, too, whose gradient is empty.
    assert_equal(found[-len(more) :], [torch.zeros_like(parameter) for parameter in more])


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_parameters_in_float32_beside_a_16_bit_input(backend, norm):
    tail, (x, *parameters) = make(backend, norm, (9, 40), 1, torch.bfloat16)
    ours = functools.partial(NORMS[norm][0], tail)
    y, grad_x, *grads = outputs_and_gradients(ours, x, *parameters)
    assert y.dtype == torch.bfloat16
    for wide in ([p.float() for p in parameters], [parameters[0].float(), *parameters[1:]]):
        also_y, also_grad_x, *also_grads = outputs_and_gradients(ours, x, *wide)
        assert_equal([y, grad_x], [also_y, also_grad_x])
        assert [grad.dtype for grad in also_grads] == [p.dtype for p in wide]
        assert_equal(grads, [grad.bfloat16() for grad in also_grads])


def test_large_offsets_do_not_cancel(backend):
    # Two passes: a variance from E[x^2] - E[x]^2 would be noise here.
    x = 1e4 + backend.draw(8, 512)
    exact = reference.layer_norm(x.double(), [512])
    ours, torchs = ops.layer_norm(x, 512), F.layer_norm(x, (512,))
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinity minus infinity
@cases("columns", cpp=[33], triton=[33], cuda=[32, 33, 1100])
def test_nan_and_infinity_stay_in_their_row(backend, columns):
    x = backend.draw(40, columns).requires_grad_()
    with torch.no_grad():
        x[1, 5], x[2, 7] = float("nan"), float("inf")
    y = ops.layer_norm(x, columns)
    assert y[1:3].isnan().all()
    finite = [0, *range(3, 40)]
    torch.testing.assert_close(y[finite], F.layer_norm(x[finite], (columns,)))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad[1:3].isnan().all()
    assert grad[finite].isfinite().all()


@each_norm
@cases(
    "rows columns dtype",
    cpp=[(700, 72, torch.float32), (40_000, 72, torch.float32)],
    triton=[(30, 40, torch.bfloat16)],
    cuda=[(150, columns, torch.bfloat16) for columns in (5, 40, 776)],
)
def test_the_same_bits_each_time(backend, norm, rows, columns, dtype):
    for_backend(backend, norm)
    tail, inputs = make(backend, norm, (rows, columns), 1, dtype)
    assert_same_bits(backend.threads, lambda: outputs_and_gradients(functools.partial(NORMS[norm][0], tail), *inputs))


@on("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_larger_than_the_caches(backend, dtype):
    # Written past the caches by another kind of store.
    x, grad = torch.randn(2, 9000, 1024).to(dtype)
    few = slice(4000, 4100)  # these rows alone stay in the caches
    found, found_few = (
        outputs_and_gradients(lambda x: ops.layer_norm(x, 1024), x[rows], grads=[grad[rows]])
        for rows in (slice(None), few)
    )
    assert_equal([y[few] for y in found], found_few)
    normed, total = ops.add_layer_norm(x, grad, 1024)
    assert torch.equal(total, x + grad)
    assert torch.equal(normed[few], ops.add_layer_norm(x[few], grad[few], 1024)[0])


@on("cpp", "triton")
@each_norm
def test_gradcheck_and_double_backward(backend, norm):
    tail, inputs = make(backend, norm, (3, 5), 1, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(functools.partial(NORMS[norm][0], tail), leaves)
    assert torch.autograd.gradgradcheck(functools.partial(NORMS[norm][0], tail), leaves)


def test_opcheck(backend):
    tail, (x, residual, weight, bias) = make(backend, "add_layer_norm", (6, 10), 1, torch.float32)
    raw = backend.raw
    torch.library.opcheck(raw.layer_norm_fwd, (x, tail, weight, bias, 1e-5))
    torch.library.opcheck(raw.layer_norm_fwd, (x.bfloat16(), tail, None, None, 1e-5))
    torch.library.opcheck(raw.add_layer_norm_fwd, (x, residual, tail, weight, bias, 1e-5))
    torch.library.opcheck(raw.rms_norm_fwd, (x, tail, weight, 1e-5))
    torch.library.opcheck(raw.rms_norm_fwd, (x.bfloat16(), tail, None, 1e-5))
    _, total, mean, rstd = raw.add_layer_norm_fwd(x, residual, tail, weight, bias, 1e-5)
    torch.library.opcheck(raw.layer_norm_bwd, (x, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw.layer_norm_bwd, (x, total, tail, None, mean, rstd, False))
    torch.library.opcheck(raw.add_layer_norm_bwd, (x, residual, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw.add_layer_norm_bwd, (x, None, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw.rms_norm_bwd, (x, total, tail, weight, rstd, True))
    torch.library.opcheck(raw.rms_norm_bwd, (x, total, tail, None, rstd, False))
    if backend.name != "cuda":
        torch.library.opcheck(raw.add_rms_norm_fwd, (x, residual, tail, weight, 1e-5))
        torch.library.opcheck(raw.add_rms_norm_bwd, (x, residual, total, tail, weight, rstd, True))
        torch.library.opcheck(raw.add_rms_norm_bwd, (x, None, total, tail, None, rstd, False))


def test_compile_fullgraph(backend):
    tail, inputs = make(backend, "add_layer_norm", (6, 10), 1, torch.float32)

    def f(x, r, w, b):
        normed, total = ops.add_layer_norm(x, r, tail, w, b)
        return ops.rms_norm(ops.layer_norm(normed * 2, tail, w) + total, tail, w) + 1

    torch.testing.assert_close(outputs_and_gradients(backend.compile(f), *inputs), outputs_and_gradients(f, *inputs))


@on("cpp")
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_export(backend, norm):
    class Norm(torch.nn.Module):
        def forward(self, x):
            return NORMS[norm][0]([10], x)

    x = torch.randn(4, 10)
    with torch.no_grad():
        program = torch.export.export(Norm(), (x,))
    assert any(f"{norm}_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), NORMS[norm][1]([10], x))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_autocast_keeps_the_dtype_as_pytorch_does(backend, norm):
    ours, torchs, _ = NORMS[norm]
    x = backend.draw(4, 16)
    with torch.autocast(backend.device, torch.bfloat16):
        for t in (x, x.bfloat16()):
            assert ours([16], t).dtype == torchs([16], t).dtype


@on("cpp")
@pytest.mark.parametrize("function", [ops.add_layer_norm, ops.rms_norm])
@pytest.mark.parametrize(("change", "error", "says"), [
    ({"normalized_shape": 9}, ValueError, r"normalized_shape is \[9\]"),
    ({"normalized_shape": []}, ValueError, "normalized_shape"),
    ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
    ({"weight": torch.ones(7)}, ValueError, r"weight has shape \[7\]"),
    ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta"),
    ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, "bias has dtype torch.int32"),
    ({"residual": torch.ones(4, 1)}, ValueError, r"residual has shape \[4, 1\]"),
    ({"residual": torch.ones(4, 8, dtype=torch.float64)}, TypeError, "residual has dtype torch.float64"),
])  # fmt: skip
def test_bad_input(backend, function, change, error, says):
    arguments = {"input": torch.ones(4, 8), "normalized_shape": 8} | change
    if function is ops.add_layer_norm:
        arguments.setdefault("residual", torch.ones(4, 8))
    elif change.keys() & {"bias", "residual"}:
        pytest.skip("rms_norm has no such argument")
    with pytest.raises(error, match=says):
        function(**arguments)


@on("cpp")
def test_a_raw_call_with_bad_shapes_is_refused(backend):
    x, raw = torch.ones(4, 8), backend.raw
    for call, says in (
        (lambda: raw.layer_norm_fwd(x, [8], torch.ones(3), None, 1e-5), "weight has shape"),
        (lambda: raw.rms_norm_fwd(x, [8], torch.ones(3), 1e-5), "weight has shape"),
        (
            lambda: raw.layer_norm_bwd(x, x, [8], None, torch.ones(3), torch.ones(4), True),
            "mean must be contiguous with one element for each row",
        ),
        (
            lambda: raw.rms_norm_bwd(x, x, [8], None, torch.ones(3), True),
            "rstd must be contiguous with one element for each row",
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match=says):
            call()
