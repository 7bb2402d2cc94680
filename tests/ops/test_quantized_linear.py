"""quantize_weight and quantized_linear: against float64 over what the numbers mean, and what they promise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.needs import needs_extension
from tinyllm import ops, reference
from tinyllm.nn import QuantizedEmbedding, QuantizedLinear
from tinyllm.ops.quantized_linear import KINDS, QuantizedWeight

BACKENDS = [pytest.param("cpp", marks=needs_extension), "reference"]
# (out_features, in_features): whole and partial blocks of 64, vectors and groups of rows.
SHAPES = [(1, 1), (5, 64), (37, 63), (64, 65), (33, 130), (3, 768), (130, 200)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.backend(request.param):
        yield request.param


def random_weight(*shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape) * torch.rand(shape[0], 1)


def rounded_rows(x: Tensor) -> Tensor:
    """Return rows as few of them meet int8 and int4 weights: float64, each block of 64 in whole numbers of a 127th of
    its largest."""
    padded = nn.functional.pad(x, (0, -x.size(-1) % 64)).unflatten(-1, (-1, 64))
    scale = padded.abs().amax(-1, keepdim=True) / 127.0
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    return ((padded * inverse).round().double() * scale.double()).flatten(-2)[..., : x.size(-1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_rounded_to_its_nearest_numbers(backend: str, shape: tuple[int, int], kind: str) -> None:
    weight = random_weight(*shape)
    stored = ops.quantize_weight(weight, kind)
    assert stored.kind == kind
    assert stored.shape == shape
    error = (stored.dequantize() - weight).abs()
    if stored.scales is None:
        assert torch.equal(stored.data, weight.bfloat16())
        assert stored.group_size is None
        return
    assert stored.group_size == 64
    step = stored.scales.float().abs().repeat_interleave(64, 1)[:, : shape[1]]
    inside = error <= 0.5 * step * (1 + 1e-5)
    assert inside.float().mean() > 0.9  # the others are clipped, which has to pay:
    plain = weight.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 7)
    simple = (weight - (weight / plain).round() * plain).square().sum()
    of_scales = (weight.abs().amax(1) * 2**-8).square().sum()  # which are bfloat16
    assert error.square().sum() <= simple + of_scales


@pytest.mark.parametrize("bits", [8, 4])
@needs_extension
def test_kernel_and_reference_choose_equally_good_scales(bits: int) -> None:
    weight = random_weight(40, 192)
    found = []
    for data, scales in (
        torch.ops.tinyllm.quantize_weight(weight, bits, 64),
        reference.quantize_weight(weight, bits, 64),
    ):
        meant = reference.dequantize_weight(data, scales, 192)
        if data.size(1) == 192 * bits // 8:
            torch.testing.assert_close(torch.ops.tinyllm.dequantize_weight(data, scales, 192), meant, rtol=0, atol=0)
        found.append((meant - weight).square().view(40, 3, 64).sum(-1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-9)  # ties may be chosen otherwise


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 40])
@pytest.mark.parametrize("shape", [(1, 65), (2, 64), (37, 63), (2100, 130), (3, 768)], ids=str)
def test_products_are_those_of_the_numbers_that_are_meant(
    backend: str, shape: tuple[int, int], rows: int, kind: str, activation: str
) -> None:
    stored = ops.quantize_weight(random_weight(*shape), kind)
    x, bias, residual = torch.randn(rows, shape[1]), torch.randn(shape[0]), torch.randn(rows, shape[0])
    found = ops.quantized_linear(x, stored, bias, activation=activation, residual=residual)
    exact = rounded_rows(x) if backend == "cpp" and rows <= 8 and kind != "bf16" else x.double()
    meant = reference.linear(
        exact, stored.dequantize().double(), bias.double(), activation=activation, residual=residual.double()
    )
    # What float32 makes of sums of so many products, each rounded.
    terms = (exact.abs() @ stored.dequantize().double().abs().T + bias.abs() + residual.abs()).max().item()
    torch.testing.assert_close(found.double(), meant, rtol=0, atol=4e-7 * terms)


@pytest.mark.parametrize("group_size", [64, 128, 192, 384])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [2, 20, 100])
def test_group_sizes(backend: str, rows: int, kind: str, group_size: int) -> None:
    weight, x = random_weight(7, 384), torch.randn(rows, 384)
    stored = ops.quantize_weight(weight, kind, group_size=group_size)
    assert stored.group_size == group_size
    assert stored.scales is not None
    assert stored.scales.shape == (7, 384 // group_size)
    exact = rounded_rows(x) if backend == "cpp" and rows == 2 else x.double()
    meant = exact @ stored.dequantize().double().T
    torch.testing.assert_close(ops.quantized_linear(x, stored).double(), meant, rtol=1e-5, atol=1e-4)


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [20, 64, 100])
def test_deep_products_in_chunks(rows: int, kind: str) -> None:
    weight, x = random_weight(37, 4992), torch.randn(rows, 4992)
    stored = ops.quantize_weight(weight, kind, group_size=64 if kind == "bf16" else 128)
    meant = x.double() @ stored.dequantize().double().T
    torch.testing.assert_close(ops.quantized_linear(x, stored).double(), meant, rtol=1e-5, atol=1e-3)


@needs_extension
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_numbers_do_not_saturate(kind: str, rows: int) -> None:
    stored = ops.quantize_weight(torch.ones(5, 128), kind)
    for row, (even, odd) in enumerate([(0, 0), (255, 255), (0, 255), (255, 0), (128, 127)]):  # of the bytes as stored
        stored.data[row, ::2], stored.data[row, 1::2] = even, odd
    x = torch.ones(4, 128)
    x[1], x[2, ::2], x[3, 1::2] = -1.0, -1.0, -1.0
    meant = x.double() @ stored.dequantize().double().T
    found = torch.cat([ops.quantized_linear(part, stored) for part in x.split(rows)])
    torch.testing.assert_close(found.double(), meant, rtol=1e-6, atol=1e-6)


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300, 200), (70, 2900)], ids=str)
@pytest.mark.parametrize(("rows", "parts"), [(8, (1, 3)), (195, (15, 65))])  # as dot products, as matmuls
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(
    rows: int, parts: tuple[int, ...], shape: tuple[int, int], kind: str
) -> None:
    stored, x = ops.quantize_weight(random_weight(*shape), kind), torch.randn(rows, shape[1])
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(ops.quantized_linear(x, stored))
            found += [torch.cat([ops.quantized_linear(some, stored) for some in x.split(size)]) for size in parts]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(backend: str, kind: str) -> None:
    stored = ops.quantize_weight(random_weight(5, 130), kind)
    x = torch.randn(3, 130)
    x[0, 7], x[1, 129] = torch.nan, torch.inf
    found = ops.quantized_linear(x, stored)
    assert not found[:2].isfinite().any()
    assert found[2].isfinite().all()
    assert torch.equal(ops.quantized_linear(torch.zeros(1, 130), stored), torch.zeros(1, 5))


def test_gradients_of_input_and_bias() -> None:
    stored = ops.quantize_weight(random_weight(5, 70), "int8")
    x, bias = torch.randn(2, 70, requires_grad=True), torch.randn(5, requires_grad=True)
    ops.quantized_linear(x, stored, bias).square().sum().backward()
    meant = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    nn.functional.linear(meant[0], stored.dequantize(), meant[1]).square().sum().backward()
    torch.testing.assert_close(x.grad, meant[0].grad)
    torch.testing.assert_close(bias.grad, meant[1].grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_of_the_input(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpp" and dtype == torch.float64:
        return
    stored, x = ops.quantize_weight(random_weight(5, 70), "bf16"), torch.randn(9, 70).to(dtype)
    found = ops.quantized_linear(x, stored)
    assert found.dtype == dtype
    meant = x.double() @ stored.dequantize().double().T
    torch.testing.assert_close(found.double(), meant, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_under_autocast() -> None:
    stored = ops.quantize_weight(random_weight(5, 70), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.quantized_linear(torch.randn(9, 70), stored).dtype == torch.bfloat16


def test_empty_inputs(backend: str) -> None:
    stored = ops.quantize_weight(random_weight(5, 70), "int8")
    assert ops.quantized_linear(torch.randn(2, 0, 70), stored).shape == (2, 0, 5)
    assert ops.quantized_linear(torch.randn(70), stored).shape == (5,)


def test_what_does_not_fit_is_refused() -> None:
    weight = random_weight(5, 70)
    for call, error, words in (
        (lambda: ops.quantize_weight(weight, "int3"), ValueError, "kind is 'int3'"),
        (lambda: ops.quantize_weight(weight, "int8", group_size=100), ValueError, "group_size is 100"),
        (lambda: ops.quantize_weight(weight, "int8", group_size=256), ValueError, "group_size is 256"),
        (lambda: ops.quantize_weight(weight[0], "int8"), ValueError, r"weight has shape \(70,\)"),
        (lambda: ops.quantize_weight(weight.int(), "int8"), TypeError, "weight has dtype torch.int32"),
        (
            lambda: ops.quantize_weight(weight / 0, "int8"),
            ValueError,
            "weight holds -inf as torch.float32",
        ),
    ):
        with pytest.raises(error, match=words):
            call()
    stored = ops.quantize_weight(weight, "int8")
    for arguments, words in (
        ({"input": torch.randn(3, 64)}, r"input has shape \(3, 64\)"),
        ({"input": torch.randn(3, 70), "bias": torch.randn(3)}, r"bias has shape \(3,\)"),
        ({"input": torch.randn(3, 70), "residual": torch.randn(5)}, r"residual has shape \(5,\)"),
        ({"input": torch.randn(3, 70), "activation": "tanh"}, "activation is 'tanh'"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.quantized_linear(weight=stored, **arguments)
    assert stored.scales is not None
    with pytest.raises(ValueError, match=r"data is torch.uint8 \(5, 128\)"):
        QuantizedWeight(stored.data, None, 70)
    with pytest.raises(ValueError, match=r"scales are torch\.float32"):
        QuantizedWeight(stored.data, stored.scales.float(), 70)
    with pytest.raises(ValueError, match=r"data is torch.uint8 \(5, 128\)"):
        QuantizedWeight(stored.data, stored.scales, 300)


@needs_extension
def test_raw_operators_check_their_tensors() -> None:
    stored, x = ops.quantize_weight(random_weight(5, 70), "int8"), torch.randn(3, 70)
    raw = torch.ops.tinyllm.quantized_linear
    for arguments in (
        (x.double(), stored.data, stored.scales, None, None, "none"),
        (x, stored.data, None, None, None, "none"),
        (x, stored.data[:, :100], stored.scales, None, None, "none"),
        (x, stored.data, stored.scales.float(), None, None, "none"),  # type: ignore[union-attr]
        (x, stored.data, stored.scales[:3], None, None, "none"),  # type: ignore[index]
        (x[:, :10], stored.data, stored.scales, None, None, "none"),
        (x, stored.data, stored.scales, torch.randn(4), None, "none"),
    ):
        with pytest.raises((RuntimeError, ValueError), match="quantized_linear: "):
            raw(*arguments)


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_checked_by_pytorch(kind: str) -> None:
    stored, x = ops.quantize_weight(random_weight(5, 70), kind), torch.randn(3, 70)
    torch.library.opcheck(torch.ops.tinyllm.quantized_linear, (x, stored.data, stored.scales, None, None, "relu"))
    torch.library.opcheck(torch.ops.tinyllm.dequantize_weight, (stored.data, stored.scales, 70))
    torch.library.opcheck(torch.ops.tinyllm.quantize_weight, (torch.randn(5, 70), 8, 64))
    layer = QuantizedLinear(stored, torch.randn(5)).requires_grad_(False)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# ---- Modules


@pytest.mark.parametrize("kind", KINDS)
def test_modules_share_save_and_move_their_weights(kind: str) -> None:
    linear = nn.Linear(70, 5)
    layer = QuantizedLinear.from_linear(linear, kind)
    assert layer.bias is linear.bias
    table = QuantizedEmbedding(layer.weight)
    assert table.data is layer.data
    ids = torch.tensor([[0, 4], [2, 2]])
    torch.testing.assert_close(table(ids), layer.weight.dequantize()[ids], rtol=0, atol=0)
    with pytest.raises(IndexError, match="5"):
        table(torch.tensor([5]))
    other = QuantizedLinear(ops.quantize_weight(torch.zeros(5, 70), kind), torch.zeros(5))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 70)
    assert torch.equal(other(x), layer(x))
    before = layer(x)
    layer.half().double().float()
    assert layer.data.dtype == (torch.bfloat16 if kind == "bf16" else torch.uint8)
    torch.testing.assert_close(layer(x), before, rtol=1e-2, atol=1e-2)  # the bias was rounded, the weight not
    assert torch.equal(layer.data, other.data)
    assert kind in repr(layer)
