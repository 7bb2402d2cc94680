import pytest
import torch
import torch.nn.functional as F

from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference

SHAPES = [
    ((5, 1), 1), ((3, 7), 1), ((2, 3, 16), 1), ((1, 1, 31), 1), ((4, 33), 1), ((129, 64), 1), ((2, 5, 3, 8), 2),
    ((17, 1000), 1), ((3, 1021), 1), ((700, 24), 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_kernel():
    with ops.backend("cpp"):
        yield


def make(shape, dims, dtype):
    generator = torch.Generator().manual_seed(hash((shape, dims)) % 2**31)
    tail = shape[len(shape) - dims :]
    draw = lambda s: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(shape), draw(tail), list(tail)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_parity(shape, dims, dtype, affine):
    x, weight, tail = make(shape, dims, dtype)
    eps = 0.1  # the same in every dtype, and large: rows of one element have no gradient but for it
    check_parity(
        lambda x, *w: ops.rms_norm(x, tail, *(w or [None]), eps),
        lambda x, *w: F.rms_norm(x, tail, *(w or [None]), eps),
        lambda x, *w: reference.rms_norm(x, tail, *(w or [None]), eps),
        (x, weight) if affine else (x,),
    )
    assert ops.last_backend() == "cpp"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_eps_is_pytorchs(dtype):
    x = torch.full((2, 8), 1e-3, dtype=dtype)  # so small that eps shows
    theirs = F.rms_norm(x, (8,))
    torch.testing.assert_close(ops.rms_norm(x, 8), theirs)
    torch.testing.assert_close(reference.rms_norm(x, [8]), theirs)


@pytest.mark.parametrize("make_view", [
    lambda x: x.transpose(0, 1), lambda x: x[::2, 1:], lambda x: x[:, :1].expand(-1, 12), lambda x: x.flip(0),
])  # fmt: skip
def test_any_strides(make_view):
    x = make_view(torch.randn(16, 24, dtype=torch.float64))
    size = x.shape[-1]
    weight = torch.randn(2 * size, dtype=torch.float64)[::2]
    torch.testing.assert_close(ops.rms_norm(x, size, weight), F.rms_norm(x, (size,), weight))


def test_an_expanded_gradient():
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(ops.rms_norm(x, 20).sum(), x)
    (theirs,) = torch.autograd.grad(F.rms_norm(x, (20,)).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0, 0)], ids=str)
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[-1:], requires_grad=True)
    y = ops.rms_norm(x, shape[-1:], weight)
    assert y.shape == x.shape
    grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_weight_in_float32_beside_a_16_bit_input():
    x, weight, tail = make((9, 40), 1, torch.bfloat16)
    leaf = weight.float().requires_grad_()
    ours = ops.rms_norm(x, tail, leaf)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, ops.rms_norm(x, tail, weight))
    (grad,) = torch.autograd.grad(ours.sum(), leaf)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [700, 40_000])
def test_bits_do_not_depend_on_threads(rows):
    x, weight, tail = make((rows, 72), 1, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            y = ops.rms_norm(leaves[0], tail, leaves[1])
            results.append([y, *torch.autograd.grad((y * y).sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_and_double_backward():
    x, weight, tail = make((3, 7), 1, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight)]
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, tail, w), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w: ops.rms_norm(x, tail, w), leaves)


def test_opcheck():
    x, weight, tail = make((6, 10), 1, torch.float32)
    raw = torch.ops.tinyllm
    torch.library.opcheck(raw.rms_norm_fwd, (x, tail, weight, 1e-5))
    torch.library.opcheck(raw.rms_norm_fwd, (x.bfloat16(), tail, None, 1e-5))
    _, rstd = raw.rms_norm_fwd(x, tail, weight, 1e-5)
    torch.library.opcheck(raw.rms_norm_bwd, (x, x, tail, weight, rstd, True))
    torch.library.opcheck(raw.rms_norm_bwd, (x, x, tail, None, rstd, False))


def test_compile_and_export():
    x, weight, tail = make((6, 10), 1, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight)]

    def f(x, w):
        return ops.rms_norm(x * 2, tail, w) + 1

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)

    class Norm(torch.nn.Module):
        def forward(self, x):
            return ops.rms_norm(x, 10)

    with torch.no_grad():
        program = torch.export.export(Norm(), (x,))
    assert any("rms_norm_fwd" in str(node.target) for node in program.graph.nodes)


def test_autocast_keeps_the_dtype_as_pytorch_does():
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for t in (x, x.bfloat16()):
            assert ops.rms_norm(t, 16).dtype == F.rms_norm(t, (16,)).dtype


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"normalized_shape": 9}, ValueError, r"normalized_shape is \[9\]"),
    ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
    ({"weight": torch.ones(7)}, ValueError, r"weight has shape \[7\]"),
])  # fmt: skip
def test_bad_input(change, error, says):
    with pytest.raises(error, match=says):
        ops.rms_norm(**({"input": torch.ones(4, 8), "normalized_shape": 8} | change))


def test_a_raw_call_with_bad_shapes_is_refused():
    x = torch.ones(4, 8)
    with pytest.raises((ValueError, RuntimeError), match="weight has shape"):
        torch.ops.tinyllm.rms_norm_fwd(x, [8], torch.ones(3), 1e-5)
    with pytest.raises((ValueError, RuntimeError), match="rstd must be contiguous with one element for each row"):
        torch.ops.tinyllm.rms_norm_bwd(x, x, [8], None, torch.ones(3), True)
