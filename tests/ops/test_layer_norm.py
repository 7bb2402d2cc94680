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


def make(shape, dims, dtype, affine=True):
    generator = torch.Generator().manual_seed(hash((shape, dims)) % 2**31)
    tail = shape[len(shape) - dims :]
    draw = lambda s: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(shape), draw(shape), draw(tail) if affine else None, draw(tail) if affine else None, list(tail)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm_parity(shape, dims, dtype, affine):
    x, _, weight, bias, tail = make(shape, dims, dtype, affine)
    check_parity(
        lambda x, w, b: ops.layer_norm(x, tail, w, b),
        lambda x, w, b: F.layer_norm(x, tail, w, b),
        lambda x, w, b: reference.layer_norm(x, tail, w, b),
        (x, weight, bias) if affine else (x, None, None),
    ) if affine else check_parity(
        lambda x: ops.layer_norm(x, tail),
        lambda x: F.layer_norm(x, tail),
        lambda x: reference.layer_norm(x, tail),
        (x,),
    )
    assert ops.last_backend() == "cpp"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
def test_add_layer_norm_parity(shape, dims, dtype):
    x, residual, weight, bias, tail = make(shape, dims, dtype)

    def torchs(x, r, w, b):
        return F.layer_norm(x + r, tail, w, b), x + r

    check_parity(
        lambda x, r, w, b: ops.add_layer_norm(x, r, tail, w, b),
        torchs,
        lambda x, r, w, b: reference.add_layer_norm(x, r, tail, w, b),
        (x, residual, weight, bias),
    )
    assert ops.last_backend() == "cpp"


def test_the_reference_is_pytorchs_layer_norm():
    x, _, weight, bias, tail = make((7, 33), 1, torch.float64)
    torch.testing.assert_close(reference.layer_norm(x, tail, weight, bias), F.layer_norm(x, tail, weight, bias))


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
    base = torch.randn(16, 24, dtype=torch.float64)
    x, residual = make_view(base), make_view(base * 2)
    size = x.shape[-1]
    weight = torch.randn(2 * size, dtype=torch.float64)[::2]
    ours = ops.add_layer_norm(x, residual, size, weight)
    theirs = reference.add_layer_norm(x, residual, [size], weight)
    torch.testing.assert_close(ours, theirs)


def test_an_expanded_gradient():
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(ops.layer_norm(x, 20).sum(), x)  # sum's gradient is one element, expanded
    (theirs,) = torch.autograd.grad(F.layer_norm(x, (20,)).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0, 0)], ids=str)
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[-1:], requires_grad=True)
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
    x = 1e4 + torch.randn(8, 512)
    exact = reference.layer_norm(x.double(), [512])
    ours, torchs = ops.layer_norm(x, 512), F.layer_norm(x, (512,))
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6


def test_nan_and_infinity_stay_in_their_row():
    x = torch.randn(4, 33)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    y = ops.layer_norm(x, 33)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[[0, 3]], F.layer_norm(x[[0, 3]], (33,)))


@pytest.mark.parametrize("rows", [700, 40_000])
def test_bits_do_not_depend_on_threads(rows):
    x, residual, weight, bias, tail = make((rows, 72), 1, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
            normed, total = ops.add_layer_norm(leaves[0], leaves[1], tail, leaves[2], leaves[3])
            results.append([normed, total, *torch.autograd.grad((normed * normed + total).sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_larger_than_the_caches(dtype):
    # Written past the caches by another kind of store.
    x, grad = torch.randn(2, 9000, 1024).to(dtype)
    few = slice(4000, 4100)  # these rows alone stay in the caches
    leaf, leaf_of_few = x.clone().requires_grad_(), x[few].clone().requires_grad_()
    normed, normed_few = ops.layer_norm(leaf, 1024), ops.layer_norm(leaf_of_few, 1024)
    assert torch.equal(normed[few], normed_few)
    (ours,), (ours_few,) = (
        torch.autograd.grad(normed, leaf, grad),
        torch.autograd.grad(normed_few, leaf_of_few, grad[few]),
    )
    assert torch.equal(ours[few], ours_few)
    normed, total = ops.add_layer_norm(x, grad, 1024)
    assert torch.equal(total, x + grad)
    assert torch.equal(normed[few], ops.add_layer_norm(x[few], grad[few], 1024)[0])


def test_gradcheck():
    x, residual, weight, bias, tail = make((3, 7), 1, torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, r, w, b: ops.layer_norm(x + r, tail, w, b), leaves)
    assert torch.autograd.gradcheck(lambda x, r, w, b: ops.add_layer_norm(x, r, tail, w, b), leaves)


def test_double_backward_goes_through_the_reference():
    x, residual, weight, bias, tail = make((2, 5), 1, torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    assert torch.autograd.gradgradcheck(lambda x, r, w, b: ops.layer_norm(x + r, tail, w, b), leaves)
    assert torch.autograd.gradgradcheck(lambda x, r, w, b: ops.add_layer_norm(x, r, tail, w, b), leaves)


def test_opcheck():
    x, residual, weight, bias, tail = make((6, 10), 1, torch.float32)
    raw = torch.ops.tinyllm
    torch.library.opcheck(raw.layer_norm_fwd, (x, tail, weight, bias, 1e-5))
    torch.library.opcheck(raw.layer_norm_fwd, (x.bfloat16(), tail, None, None, 1e-5))
    torch.library.opcheck(raw.add_layer_norm_fwd, (x, residual, tail, weight, bias, 1e-5))
    _, total, mean, rstd = raw.add_layer_norm_fwd(x, residual, tail, weight, bias, 1e-5)
    torch.library.opcheck(raw.layer_norm_bwd, (x, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw.layer_norm_bwd, (x, total, tail, None, mean, rstd, False))
    torch.library.opcheck(raw.add_layer_norm_bwd, (x, residual, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw.add_layer_norm_bwd, (x, None, total, tail, weight, mean, rstd, True))


def test_compile_fullgraph():
    x, residual, weight, bias, tail = make((6, 10), 1, torch.float32)

    def f(x, r, w, b):
        normed, total = ops.add_layer_norm(x, r, tail, w, b)
        return ops.layer_norm(normed * 2, tail, w) + total

    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    eager = f(*leaves)
    compiled = torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return ops.layer_norm(x, 10)

    x = torch.randn(4, 10)
    with torch.no_grad():
        program = torch.export.export(Norm(), (x,))
    assert any("layer_norm_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), F.layer_norm(x, (10,)))


def test_autocast_keeps_the_dtype_as_pytorch_does():
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for t in (x, x.bfloat16()):
            assert ops.layer_norm(t, 16).dtype == F.layer_norm(t, (16,)).dtype


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"normalized_shape": 9}, ValueError, r"normalized_shape is \[9\]"),
    ({"normalized_shape": []}, ValueError, "normalized_shape"),
    ({"input": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
    ({"weight": torch.ones(7)}, ValueError, r"weight has shape \[7\]"),
    ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, "bias has dtype torch.int32"),
    ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta"),
    ({"residual": torch.ones(4, 1)}, ValueError, r"residual has shape \[4, 1\]"),
    ({"residual": torch.ones(4, 8, dtype=torch.float64)}, TypeError, "residual has dtype torch.float64"),
])  # fmt: skip
def test_bad_input(change, error, says):
    arguments = {"input": torch.ones(4, 8), "residual": torch.ones(4, 8), "normalized_shape": 8} | change
    with pytest.raises(error, match=says):
        ops.add_layer_norm(**arguments)


def test_a_raw_call_with_bad_shapes_is_refused():
    x = torch.ones(4, 8)
    with pytest.raises((ValueError, RuntimeError), match="weight has shape"):
        torch.ops.tinyllm.layer_norm_fwd(x, [8], torch.ones(3), None, 1e-5)
    with pytest.raises((ValueError, RuntimeError), match="mean must be contiguous with one element for each row"):
        torch.ops.tinyllm.layer_norm_bwd(x, x, [8], None, torch.ones(3), torch.ones(4), True)
