import pytest
import torch
import torch.nn.functional as F

from tests.cuda.device import DEVICE, DTYPES, ON_GPU, draw, raw
from tests.ops.parity import check_parity
from tinyllm import ops, reference
from tinyllm.ops.backends import cuda

# Rows and columns: parts of a warp, a warp, several, a cluster of two and of four; elements one by one where the width
# is odd. More rows than run at a time, of the first widths, so that loops wrap.
SHAPES = [
    (5, 1), (600, 3), (150, 31), (130, 64), (67, 127), (69, 768), (7, 1000), (13, 1096), (3, 4096), (1, 8192),
]  # fmt: skip
WIDE = [(1, 16_384), (2, 12_001), (1, 16_403), (1, 20_000), (1, 33_024)]


def make(rows, columns, dtype):
    weights = draw(columns, dtype=dtype, seed=3), draw(columns, dtype=dtype, seed=4)
    return draw(rows, columns, dtype=dtype, seed=1), draw(rows, columns, dtype=dtype, seed=2), *weights


def has_clusters():
    return cuda.most_columns(torch.empty(0, device=DEVICE)) > 16_384


def check_layer_norm(x, weight, bias):
    size = x.shape[-1]
    check_parity(
        lambda x, w, b: ops.layer_norm(x, size, w, b),
        lambda x, w, b: F.layer_norm(x, (size,), w, b),
        lambda x, w, b: reference.layer_norm(x, [size], w, b),
        (x, weight, bias),
    )
    assert ops.last_backend() == "cuda"


def check_add_layer_norm(x, residual, weight, bias):
    size = x.shape[-1]
    check_parity(
        lambda x, r, w, b: ops.add_layer_norm(x, r, size, w, b),
        lambda x, r, w, b: (F.layer_norm(x + r, (size,), w, b), x + r),
        lambda x, r, w, b: reference.add_layer_norm(x, r, [size], w, b),
        (x, residual, weight, bias),
    )
    assert ops.last_backend() == "cuda"


def check_rms_norm(x, weight):
    size = x.shape[-1]
    check_parity(
        lambda x, w: ops.rms_norm(x, size, w, 1e-5),
        lambda x, w: F.rms_norm(x, (size,), w, 1e-5),
        lambda x, w: reference.rms_norm(x, [size], w, 1e-5),
        (x, weight),
    )
    assert ops.last_backend() == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
def test_layer_norm_parity(rows, columns, dtype):
    x, _, weight, bias = make(rows, columns, dtype)
    check_layer_norm(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
def test_add_layer_norm_parity(rows, columns, dtype):
    check_add_layer_norm(*make(rows, columns, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES[1:], ids=str)  # of one column the gradient is rounding alone
def test_rms_norm_parity(rows, columns, dtype):
    x, _, weight, _ = make(rows, columns, dtype)
    check_rms_norm(x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), WIDE, ids=str)
def test_wide_rows(rows, columns, dtype):
    if columns > 16_384 and not has_clusters():
        pytest.skip("this GPU's code has no clusters")
    check_add_layer_norm(*make(rows, columns, dtype))


def test_the_widest_rows():
    if not has_clusters():
        pytest.skip("this GPU's code has no clusters")
    x = draw(1, 131_072, dtype=torch.bfloat16)
    torch.testing.assert_close(
        ops.rms_norm(x, 131_072), F.rms_norm(x.float(), (131_072,), eps=2**-7).bfloat16(), rtol=0.01, atol=0.01
    )
    with pytest.raises(RuntimeError, match="the kernel takes rows up to 16,384 wide"):
        ops.layer_norm(draw(1, 131_073), 131_073)
    with pytest.raises(ValueError, match="at most 131072"):
        raw().layer_norm_fwd(draw(1, 131_073), [131_073], None, None, 1e-5)


@pytest.mark.skipif(ON_GPU, reason="a GPU has the code that it has")
def test_a_later_gpu_that_runs_code_for_an_earlier_one_refuses_rows_that_it_would_not_compute(monkeypatch):
    monkeypatch.setenv("TINYLLM_EMULATED_CAPABILITY", "120")
    for code, columns in (("80", 16_384), ("90", 131_072)):
        monkeypatch.setenv("TINYLLM_EMULATED_CODE", code)
        cuda._norm_columns.cache_clear()
        assert cuda.most_columns(draw(1)) == columns
        with pytest.raises(RuntimeError, match=f"has {columns + 1} elements; the kernel takes rows up to 16,384 wide"):
            ops.layer_norm(draw(1, columns + 1), columns + 1)
        with pytest.raises(ValueError, match=f"at most {columns}"):
            raw().layer_norm_fwd(draw(1, columns + 1), [columns + 1], None, None, 1e-5)
    cuda._norm_columns.cache_clear()


@pytest.mark.parametrize("columns", [33, 2048], ids=str)
def test_without_parameters(columns):
    x = draw(9, columns)
    check_parity(
        lambda x: (ops.layer_norm(x, columns), ops.rms_norm(x, columns)),
        lambda x: (F.layer_norm(x, (columns,)), F.rms_norm(x, (columns,))),
        lambda x: (reference.layer_norm(x, [columns]), reference.rms_norm(x, [columns], eps=2**-23)),
        (x,),
    )


def test_several_normalized_dimensions():
    x, weight, bias = draw(2, 5, 3, 8), draw(3, 8, seed=3), draw(3, 8, seed=4)
    check_parity(
        lambda x, w, b: ops.layer_norm(x, (3, 8), w, b),
        lambda x, w, b: F.layer_norm(x, (3, 8), w, b),
        lambda x, w, b: reference.layer_norm(x, [3, 8], w, b),
        (x, weight, bias),
    )


@pytest.mark.parametrize("which", ["normed", "sum"])
def test_add_layer_norm_with_one_output_used(which):
    leaves = [t.requires_grad_() for t in make(6, 20, torch.float32)]
    x, residual, weight, bias = leaves
    grads = []
    for f, shape in ((ops.add_layer_norm, 20), (reference.add_layer_norm, [20])):
        normed, total = f(x, residual, shape, weight, bias)
        loss = (normed if which == "normed" else total).pow(2).sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for ours, theirs in zip(*grads, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make_view", [
    lambda x: x[:, 1:], lambda x: x[:, 8:], lambda x: x[::3, :96], lambda x: x.transpose(0, 1),
    lambda x: x[:1].expand(7, -1), lambda x: x[:, :1].expand(-1, 12), lambda x: x.flip(0), lambda x: x[:1, 1:97],
    lambda x: x.view(4, 4, 104).transpose(0, 1), lambda x: x.view(4, 4, 104)[:, :3, :64],
], ids=lambda f: "")  # fmt: skip
def test_any_strides(make_view, dtype):
    base, more = draw(16, 104, dtype=dtype), draw(16, 104, dtype=dtype, seed=1)
    x, residual = make_view(base), make_view(more)
    size = x.shape[-1]
    weight, bias = draw(2 * size, dtype=dtype, seed=2)[::2], draw(size + 1, dtype=dtype, seed=3)[1:]
    got = ops.add_layer_norm(x, residual, size, weight, bias)
    same = ops.add_layer_norm(x.contiguous(), residual.contiguous(), size, weight.contiguous(), bias.clone())
    torch.testing.assert_close(got, same)
    _, _, mean, rstd = raw().add_layer_norm_fwd(x, residual, [size], weight, bias, 1e-5)
    ours = raw().add_layer_norm_bwd(x, residual, x, [size], weight, mean, rstd, True)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    for a, b in zip(ours, raw().add_layer_norm_bwd(x, residual, x, [size], weight, mean, rstd, True), strict=True):
        torch.testing.assert_close(a, b)


def test_strided_rows_are_not_copied():
    # A copy would read what lies between the rows, or nothing: the result is the same. That none is made shows in
    # rows that overlap, which only a view can have.
    base = draw(40)
    x = base.as_strided((5, 16), (4, 1))
    torch.testing.assert_close(ops.layer_norm(x, 16), F.layer_norm(x.contiguous(), (16,)))


def test_an_expanded_gradient():
    x = draw(6, 20).requires_grad_()
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
    assert ops.rms_norm(x, shape[-1:], weight).shape == x.shape


def test_weight_in_float32_beside_a_16_bit_input():
    x, _, weight, bias = make(9, 40, torch.bfloat16)
    ours = ops.layer_norm(x, 40, weight.float(), bias.float())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, ops.layer_norm(x, 40, weight, bias))
    assert torch.equal(ours, ops.layer_norm(x, 40, weight.float(), bias))
    leaf = weight.float().requires_grad_()
    (grad,) = torch.autograd.grad(ops.layer_norm(x, 40, leaf).sum(), leaf)
    assert grad.dtype == torch.float32
    _, mean, rstd = raw().layer_norm_fwd(x, [40], weight, bias, 1e-5)
    grads = [raw().layer_norm_bwd(x, x, [40], w, mean, rstd, True) for w in (weight, weight.float())]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_large_offsets_do_not_cancel():
    # Two passes: a variance from E[x^2] - E[x]^2 would be noise here.
    x = 1e4 + draw(8, 512)
    exact = reference.layer_norm(x.double(), [512])
    ours, torchs = ops.layer_norm(x, 512), F.layer_norm(x, (512,))
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6


@pytest.mark.parametrize("columns", [32, 33, 1100], ids=str)
def test_nan_and_infinity_stay_in_their_row(columns):
    x = draw(40, columns).requires_grad_()
    with torch.no_grad():
        x[1, 5], x[2, 7] = float("nan"), float("inf")
    y = ops.layer_norm(x, columns)
    assert y[1:3].isnan().all()
    finite = [0, *range(3, 40)]
    torch.testing.assert_close(y[finite], F.layer_norm(x[finite], (columns,)))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad[1:3].isnan().all()
    assert grad[finite].isfinite().all()


@pytest.mark.parametrize("columns", [5, 40, 776], ids=str)
def test_the_same_bits_each_time(columns):
    x, grad, weight, bias = make(150, columns, torch.bfloat16)
    results = []
    for _ in range(2):
        normed, mean, rstd = raw().layer_norm_fwd(x, [columns], weight, bias, 1e-5)
        results.append((normed, mean, rstd, *raw().layer_norm_bwd(grad, x, [columns], weight, mean, rstd, True)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("columns", [40, 41], ids=str)
def test_without_parameter_grads(columns):
    x, grad, weight, _ = make(9, columns, torch.float32)
    _, mean, rstd = raw().layer_norm_fwd(x, [columns], weight, None, 1e-5)
    with_grads = raw().layer_norm_bwd(grad, x, [columns], weight, mean, rstd, True)
    without = raw().layer_norm_bwd(grad, x, [columns], weight, mean, rstd, False)
    assert torch.equal(with_grads[0], without[0])
    assert without[1].numel() == without[2].numel() == 0


def test_what_is_refused():
    x, weight = draw(3, 8), draw(8)
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        raw().layer_norm_fwd(x.double(), [8], None, None, 1e-5)
    with pytest.raises(ValueError, match="weight has dtype Half; input's, Float, or float32 is needed"):
        raw().rms_norm_fwd(x, [8], weight.half(), 1e-5)
    with pytest.raises(ValueError, match="must have 8 elements"):
        raw().layer_norm_fwd(x, [8], weight[:7], None, 1e-5)
    with pytest.raises(ValueError, match="must equal normalized_shape"):
        raw().layer_norm_fwd(x, [7], None, None, 1e-5)
    with pytest.raises(ValueError, match="residual has shape"):
        raw().add_layer_norm_fwd(x, x[:2], [8], None, None, 1e-5)
    with pytest.raises(ValueError, match="one element for each row"):
        raw().rms_norm_bwd(x, x, [8], None, weight[:2], True)


def test_opcheck():
    x, residual, weight, bias = make(6, 10, torch.float32)
    tail = [10]
    torch.library.opcheck(raw().layer_norm_fwd, (x, tail, weight, bias, 1e-5))
    torch.library.opcheck(raw().layer_norm_fwd, (x.bfloat16(), tail, None, None, 1e-5))
    torch.library.opcheck(raw().add_layer_norm_fwd, (x, residual, tail, weight, bias, 1e-5))
    torch.library.opcheck(raw().rms_norm_fwd, (x, tail, weight, 1e-5))
    _, total, mean, rstd = raw().add_layer_norm_fwd(x, residual, tail, weight, bias, 1e-5)
    torch.library.opcheck(raw().layer_norm_bwd, (x, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw().layer_norm_bwd, (x, total, tail, None, mean, rstd, False))
    torch.library.opcheck(raw().add_layer_norm_bwd, (x, None, total, tail, weight, mean, rstd, True))
    torch.library.opcheck(raw().rms_norm_bwd, (x, total, tail, weight, rstd, True))


@pytest.mark.skipif(not ON_GPU, reason="graphs are for GPUs")
def test_in_a_graph():
    x, grad, weight, bias = make(64, 768, torch.bfloat16)

    def step():
        normed, mean, rstd = raw().layer_norm_fwd(x, [768], weight, bias, 1e-5)
        return normed, *raw().layer_norm_bwd(grad, x, [768], weight, mean, rstd, True)

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)
