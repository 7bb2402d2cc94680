"""Weights in fewer bits on the Triton kernels: against float64 over what the numbers mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.backends import BACKENDS, Backend, on
from tests.ops.parity import assert_accurate, assert_same_in_a_graph
from tinyllm import ops, reference
from tinyllm.kernels import quantized_linear as launchers
from tinyllm.ops.quantized_linear import KINDS, QuantizedWeight
from tinyllm.reference.quantized import BITS

pytestmark = [on("triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy's, of infinities
draw, DEVICE = BACKENDS["triton"].draw, BACKENDS["triton"].device
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FEW = launchers.FEW_ROWS


def stored(kind: str, rows: int, columns: int, group_size: int = 64) -> QuantizedWeight:
    weight = draw(rows, columns, seed=9) * draw(rows, 1, seed=8).abs()
    if kind == "bf16":
        return QuantizedWeight(weight.bfloat16(), None, columns)
    return QuantizedWeight(*reference.quantize_weight(weight, BITS[kind], group_size), columns)


def meant(weight: QuantizedWeight) -> Tensor:
    return reference.dequantize_weight(weight.data, weight.scales, weight.in_features)


def check(weight: QuantizedWeight, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    """Compare with PyTorch in the same dtype and in float64, over the weight that is meant."""

    def torchs(dtype: torch.dtype) -> Tensor:
        operands = (None if t is None else t.to(dtype) for t in (bias, residual))
        bias_of, residual_of = operands
        whole = meant(weight).to(dtype)
        return reference.linear(x.to(dtype), whole, bias_of, activation=activation, residual=residual_of)

    found = ops.quantized_linear(x, weight, bias, activation=activation, residual=residual)
    # In float32 sums of some hundred products in another order than PyTorch's; in 16 bits none of that shows.
    assert_accurate("output", found, torchs(x.dtype), torchs(torch.float64), 2 if x.dtype != F32 else 16)
    assert ops.last_backend() == "triton"


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(1, F32), (2, F32), (5, F32), (FEW + 1, F32), (1, BF16), (3, F16), (FEW + 1, BF16), (FEW + 1, F16)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_numbers_that_are_meant(
    backend: Backend, kind: str, rows: int, dtype: torch.dtype
) -> None:
    # Whole and partial blocks of 64, columns that a piece does not fill, weights wider than a program loads at once.
    # And several rows of a weight in a program.
    for out_features, columns in ((1, 1), (5, 31), (3, 130), (2, 2100), (130 if rows == 1 else 1, 64)):
        weight, x = stored(kind, out_features, columns), draw(rows, columns, dtype=dtype, seed=1)
        check(weight, x, None, None, "none")


@pytest.mark.parametrize("kind", KINDS)
def test_every_second_row_of_a_weight(backend: Backend, kind: str) -> None:
    whole = stored(kind, 6, 130)
    weight = QuantizedWeight(whole.data[::2], None if whole.scales is None else whole.scales[::2], 130)
    for rows in (3, FEW + 1):
        check(weight, draw(rows, 130, seed=1), None, None, "none")
    ids = torch.tensor([2, 0], device=DEVICE)
    assert torch.equal(ops.quantized_embedding(ids, weight), meant(weight)[ids])


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("rows", [3, FEW + 1])
def test_bias_activation_and_residual(backend: Backend, rows: int, activation: str) -> None:
    weight, x = stored("int4", 5, 130), 2 * draw(rows, 130, seed=1)
    check(weight, x, draw(5, seed=2), draw(rows, 5, seed=3), activation)
    check(weight, x, None, draw(rows, 5, seed=3), activation)


@pytest.mark.parametrize("group_size", [64, 128, 192, 384])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_group_sizes(backend: Backend, kind: str, group_size: int) -> None:
    weight = stored(kind, 5, 384, group_size)
    for rows in (2, FEW + 1):
        check(weight, draw(rows, 384, seed=1), None, None, "none")


def test_any_strides_and_shapes(backend: Backend) -> None:
    weight, bias = stored("int8", 6, 70), draw(12, seed=2)[::2]
    check(weight, draw(70, seed=1), bias, None, "none")
    check(weight, draw(2, 3, 70, seed=1).transpose(0, 1), bias, draw(6, 2, 3, seed=3).permute(2, 1, 0), "none")
    check(weight, draw(70, 4, seed=1).T, bias, draw(4, 12, seed=3)[:, ::2], "relu")
    check(weight, draw(4, 100, seed=1)[:, 7:77], bias, None, "none")
    assert ops.quantized_linear(draw(2, 0, 70), weight).shape == (2, 0, 6)


@pytest.mark.parametrize("rows", [3, FEW + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_row(backend: Backend, kind: str, rows: int) -> None:
    weight, x = stored(kind, 5, 130), draw(rows, 130, seed=1)
    x[0, 7], x[1, 129] = torch.nan, torch.inf
    for activation in reference.ACTIVATIONS:
        found = ops.quantized_linear(x, weight, activation=activation)
        assert found[0].isnan().all()
        assert not found[1].isfinite().all()
        assert found[2:].isfinite().all()


def test_under_autocast(backend: Backend) -> None:
    for rows in (2, FEW + 1):
        x, weight = draw(rows, 70, seed=1), stored("int8", 5, 70)
        with torch.autocast(DEVICE, BF16):
            found = ops.quantized_linear(x, weight)
        assert torch.equal(found, ops.quantized_linear(x, weight).to(BF16))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up(backend: Backend, kind: str) -> None:
    for columns in (1, 31, 64, 1500):
        weight = stored(kind, 7, columns)
        for ids in (backend.tensor([[6, 0, 3], [3, 1, 1]]), backend.tensor([5, 2], torch.int32), backend.tensor(4)):
            for dtype in (F32, BF16):
                found = ops.quantized_embedding(ids, weight, dtype=dtype)
                assert ops.last_backend() == "triton"
                rtol = 0 if dtype == F32 else torch.finfo(dtype).eps  # the interpreter cuts off digits
                torch.testing.assert_close(found, meant(weight)[ids.long()].to(dtype), rtol=rtol, atol=0)
        assert ops.quantized_embedding(backend.tensor([[0, 2], [4, 6]]).T[:, :1], weight).shape == (2, 1, columns)
        assert ops.quantized_embedding(torch.empty(0, dtype=torch.int64, device=DEVICE), weight).shape == (0, columns)
        found = ops.quantized_embedding(backend.tensor([0, -1, 7]), weight)  # as embedding: the host must not wait
        assert found[0].isfinite().all()
        assert found[1:].isnan().all()


def test_what_wants_gradients_is_not_served(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="triton: gradients are wanted"):
        ops.quantized_linear(draw(2, 70).requires_grad_(), stored("int8", 5, 70))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_checked_by_pytorch(backend: Backend, kind: str) -> None:
    weight, x = stored(kind, 5, 70), draw(3, 70, seed=1)
    raw = torch.ops.tinyllm_triton
    torch.library.opcheck(raw.quantized_linear, (x, weight.data, weight.scales, None, None, "relu"))
    torch.library.opcheck(raw.quantized_embedding, (backend.tensor([[4, 2]]), weight.data, weight.scales, 70, F16))
    found = backend.compile(lambda x: ops.quantized_linear(x, weight, activation="gelu"))(x)
    torch.testing.assert_close(found, ops.quantized_linear(x, weight, activation="gelu"))


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rows", [2, FEW + 1])
def test_in_a_cuda_graph(backend: Backend, rows: int) -> None:
    weight, ids = stored("int8", 96, 70), backend.tensor([3, 5])
    x = draw(rows, 70, seed=1)
    assert_same_in_a_graph(lambda: [ops.quantized_linear(x, weight), ops.quantized_embedding(ids, weight)])
