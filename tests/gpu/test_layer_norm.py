import pytest
import torch
import torch.nn.functional as F

from tests.gpu.device import DEVICE, draw
from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference

# The last two are beyond what a program holds in registers: backward's limit, and forward's.
SHAPES = [
    ((5, 1), 1), ((3, 7), 1), ((1, 1, 31), 1), ((129, 64), 1), ((2, 5, 3, 8), 2), ((17, 1000), 1), ((2, 8200), 1),
    ((2, 16_401), 1),
]  # fmt: skip
# The widest takes seconds in the interpreter, and every dtype its same way.
CASES = [
    (shape, dims, dtype)
    for shape, dims in SHAPES
    for dtype in (DTYPES if shape[-1] < 10_000 else (torch.float32, torch.bfloat16))
]


def make(shape, dims, dtype, affine=True):
    tail = shape[len(shape) - dims :]
    parameters = (draw(*tail, dtype=dtype, seed=3), draw(*tail, dtype=dtype, seed=4)) if affine else (None, None)
    return draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2), *parameters, list(tail)


@pytest.mark.parametrize(("shape", "dims", "dtype"), CASES, ids=str)
def test_layer_norm_parity(shape, dims, dtype):
    x, _, weight, bias, tail = make(shape, dims, dtype)
    check_parity(
        lambda x, w, b: ops.layer_norm(x, tail, w, b),
        lambda x, w, b: F.layer_norm(x, tail, w, b),
        lambda x, w, b: reference.layer_norm(x, tail, w, b),
        (x, weight, bias),
    )
    assert ops.last_backend() == "triton"


@pytest.mark.parametrize(("shape", "dims", "dtype"), CASES, ids=str)
def test_add_layer_norm_parity(shape, dims, dtype):
    x, residual, weight, bias, tail = make(shape, dims, dtype)
    check_parity(
        lambda x, r, w, b: ops.add_layer_norm(x, r, tail, w, b),
        lambda x, r, w, b: (F.layer_norm(x + r, tail, w, b), x + r),
        lambda x, r, w, b: reference.add_layer_norm(x, r, tail, w, b),
        (x, residual, weight, bias),
    )
    assert ops.last_backend() == "triton"


# Of one column the gradient is rounding alone.
@pytest.mark.parametrize(("shape", "dims", "dtype"), [case for case in CASES if case[0] != (5, 1)], ids=str)
def test_rms_norm_parity(shape, dims, dtype):
    x, _, weight, _, tail = make(shape, dims, dtype)
    check_parity(
        lambda x, w: ops.rms_norm(x, tail, w, 1e-5),
        lambda x, w: F.rms_norm(x, tail, w, 1e-5),
        lambda x, w: reference.rms_norm(x, tail, w, 1e-5),
        (x, weight),
    )
    assert ops.last_backend() == "triton"


@pytest.mark.parametrize("columns", [33, 8300], ids=str)
def test_without_parameters(columns):
    x = draw(4, columns)
    check_parity(
        lambda x: (ops.layer_norm(x, columns), ops.rms_norm(x, columns)),
        lambda x: (F.layer_norm(x, (columns,)), F.rms_norm(x, (columns,))),
        lambda x: (reference.layer_norm(x, [columns]), reference.rms_norm(x, [columns], eps=2**-23)),
        (x,),
    )


@pytest.mark.parametrize("which", ["normed", "sum"])
def test_add_layer_norm_with_one_output_used(which):
    x, residual, weight, bias, tail = make((6, 20), 1, torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    grads = []
    for f in (ops.add_layer_norm, reference.add_layer_norm):
        normed, total = f(x, residual, tail, weight, bias)
        loss = (normed if which == "normed" else total).pow(2).sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for ours, theirs in zip(*grads, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make_view", [
    lambda x: x.transpose(0, 1), lambda x: x[::2, 1:], lambda x: x[:, :1].expand(-1, 12), lambda x: x.flip(0),
])  # fmt: skip
def test_any_strides(make_view):
    base = draw(16, 24, dtype=torch.float64)
    x, residual = make_view(base), make_view(base * 2)
    size = x.shape[-1]
    weight = draw(2 * size, dtype=torch.float64)[::2]
    torch.testing.assert_close(
        ops.add_layer_norm(x, residual, size, weight), reference.add_layer_norm(x, residual, [size], weight)
    )


def test_an_expanded_gradient():
    x = draw(6, 20, dtype=torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(ops.layer_norm(x, 20).sum(), x)  # sum's gradient is one element, expanded
    (theirs,) = torch.autograd.grad(F.layer_norm(x, (20,)).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0, 0)], ids=str)
def test_empty(shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    weight = torch.ones(shape[-1:], device=DEVICE, requires_grad=True)
    y = ops.layer_norm(x, shape[-1:], weight)
    assert y.shape == x.shape
    grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    normed, total = ops.add_layer_norm(x, x, shape[-1:], weight)
    assert normed.shape == total.shape == x.shape


def test_weight_in_float32_beside_a_16_bit_input():
    x, _, weight, bias, tail = make((9, 40), 1, torch.bfloat16)
    ours = ops.layer_norm(x, tail, weight.float(), bias.float())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, ops.layer_norm(x, tail, weight, bias))
    leaf = weight.float().requires_grad_()
    (grad,) = torch.autograd.grad(ops.layer_norm(x, tail, leaf).sum(), leaf)
    assert grad.dtype == torch.float32


def test_large_offsets_do_not_cancel():
    # Two passes: a variance from E[x^2] - E[x]^2 would be noise here.
    x = 1e4 + draw(8, 512)
    exact = reference.layer_norm(x.double(), [512])
    ours, torchs = ops.layer_norm(x, 512), F.layer_norm(x, (512,))
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinity minus infinity
def test_nan_and_infinity_stay_in_their_row():
    x = draw(4, 33)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    y = ops.layer_norm(x, 33)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[[0, 3]], F.layer_norm(x[[0, 3]], (33,)))


def test_gradcheck_and_double_backward():
    x, residual, weight, bias, tail = make((3, 5), 1, torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, r, w, b: ops.add_layer_norm(x, r, tail, w, b), leaves)
    assert torch.autograd.gradgradcheck(lambda x, r, w, b: ops.add_layer_norm(x, r, tail, w, b), leaves)


def test_opcheck():
    x, residual, weight, bias, tail = make((6, 10), 1, torch.float32)
    raw = torch.ops.tinyllm_triton
    torch.library.opcheck(raw.layer_norm_fwd, (x, tail, weight, bias, 1e-5))
    torch.library.opcheck(raw.layer_norm_fwd, (x.bfloat16(), tail, None, None, 1e-5))
    torch.library.opcheck(raw.add_layer_norm_fwd, (x, residual, tail, weight, bias, 1e-5))
    torch.library.opcheck(raw.rms_norm_fwd, (x, tail, weight, 1e-5))
    _, total, mean, rstd = raw.add_layer_norm_fwd(x, residual, tail, weight, bias, 1e-5)
    torch.library.opcheck(raw.layer_norm_bwd, (x, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw.layer_norm_bwd, (x, total, tail, None, mean, rstd, False))
    torch.library.opcheck(raw.add_layer_norm_bwd, (x, None, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw.rms_norm_bwd, (x, total, tail, weight, rstd, True))


def test_compile_fullgraph():
    x, residual, weight, bias, tail = make((6, 10), 1, torch.float32)

    def f(x, r, w, b):
        normed, total = ops.add_layer_norm(x, r, tail, w, b)
        return ops.rms_norm(ops.layer_norm(normed * 2, tail, w) + total, tail, w)

    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    eager = f(*leaves)
    # On the CPU the compiler's own code is not what is tested, and Triton, interpreted, is not there for it.
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
