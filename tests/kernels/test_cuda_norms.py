"""The norms' kernels in CUDA C++: rows that a cluster of blocks shares, and what the raw operators take."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import BACKENDS, ON_GPU, on
from tests.ops.parity import assert_same_in_a_graph, check_parity
from tinyllm import ops, reference
from tinyllm.ops.backends import cuda

pytestmark = [on("cuda"), pytest.mark.usefixtures("backend")]
draw, raw = BACKENDS["cuda"].draw, BACKENDS["cuda"].raw


def needs_clusters():
    if cuda.most_columns(draw(0)) <= 16_384:
        pytest.skip("this GPU's code has no clusters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 16_384), (2, 12_001), (1, 16_403), (1, 20_000), (1, 33_024)], ids=str
)
def test_wide_rows(rows, columns, dtype):
    if columns > 16_384:
        needs_clusters()
    inputs = [draw(*size, dtype=dtype, seed=seed) for seed, size in enumerate([(rows, columns)] * 2 + [(columns,)] * 2)]
    check_parity(
        lambda x, r, w, b: ops.add_layer_norm(x, r, columns, w, b),
        lambda x, r, w, b: (F.layer_norm(x + r, (columns,), w, b), x + r),
        lambda x, r, w, b: reference.add_layer_norm(x, r, [columns], w, b),
        inputs,
    )
    assert ops.last_backend() == "cuda"


def test_the_widest_rows():
    needs_clusters()
    x = draw(1, 131_072, dtype=torch.bfloat16)
    torch.testing.assert_close(
        ops.rms_norm(x, 131_072), F.rms_norm(x.float(), (131_072,), eps=2**-7).bfloat16(), rtol=0.01, atol=0.01
    )
    refuses_more_than(131_072)


def refuses_more_than(columns):
    with pytest.raises(RuntimeError, match=f"has {columns + 1} elements; the kernel takes rows up to 16,384 wide"):
        ops.layer_norm(draw(1, columns + 1), columns + 1)
    with pytest.raises(ValueError, match=f"at most {columns}"):
        raw.layer_norm_fwd(draw(1, columns + 1), [columns + 1], None, None, 1e-5)


@pytest.mark.skipif(ON_GPU, reason="a GPU has the code that it has")
def test_a_later_gpu_that_runs_code_for_an_earlier_one_refuses_rows_that_it_would_not_compute(monkeypatch):
    monkeypatch.setenv("TINYLLM_EMULATED_CAPABILITY", "120")
    for code, columns in (("80", 16_384), ("90", 131_072)):
        monkeypatch.setenv("TINYLLM_EMULATED_CODE", code)
        cuda._norm_columns.cache_clear()
        assert cuda.most_columns(draw(1)) == columns
        refuses_more_than(columns)
    cuda._norm_columns.cache_clear()


def test_strided_rows_are_not_copied():
    # A copy would read what lies between the rows, or nothing: the result is the same. That none is made shows in
    # rows that overlap, which only a view can have.
    x = draw(40).as_strided((5, 16), (4, 1))
    torch.testing.assert_close(ops.layer_norm(x, 16), F.layer_norm(x.contiguous(), (16,)))


@pytest.mark.parametrize("columns", [40, 41], ids=str)
def test_without_parameter_grads(columns):
    x, grad, weight = draw(9, columns), draw(9, columns, seed=1), draw(columns, seed=2)
    _, mean, rstd = raw.layer_norm_fwd(x, [columns], weight, None, 1e-5)
    with_grads = raw.layer_norm_bwd(grad, x, [columns], weight, mean, rstd, True)
    without = raw.layer_norm_bwd(grad, x, [columns], weight, mean, rstd, False)
    assert torch.equal(with_grads[0], without[0])
    assert without[1].numel() == without[2].numel() == 0


def test_what_is_refused():
    x, weight = draw(3, 8), draw(8)
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        raw.layer_norm_fwd(x.double(), [8], None, None, 1e-5)
    with pytest.raises(ValueError, match="weight has dtype Half; input's, Float, or float32 is needed"):
        raw.rms_norm_fwd(x, [8], weight.half(), 1e-5)
    with pytest.raises(ValueError, match="must have 8 elements"):
        raw.layer_norm_fwd(x, [8], weight[:7], None, 1e-5)
    with pytest.raises(ValueError, match="must equal normalized_shape"):
        raw.layer_norm_fwd(x, [7], None, None, 1e-5)
    with pytest.raises(ValueError, match="residual has shape"):
        raw.add_layer_norm_fwd(x, x[:2], [8], None, None, 1e-5)
    with pytest.raises(ValueError, match="one element for each row"):
        raw.rms_norm_bwd(x, x, [8], None, weight[:2], True)


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to capture a graph of")
def test_cuda_graph():
    x, grad = draw(64, 768, dtype=torch.bfloat16), draw(64, 768, dtype=torch.bfloat16, seed=1)
    weight, bias = draw(768, dtype=torch.bfloat16, seed=2), draw(768, dtype=torch.bfloat16, seed=3)

    def step():
        normed, mean, rstd = raw.layer_norm_fwd(x, [768], weight, bias, 1e-5)
        return normed, *raw.layer_norm_bwd(grad, x, [768], weight, mean, rstd, True)

    assert_same_in_a_graph(step)
