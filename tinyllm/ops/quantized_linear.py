"""quantized_linear: weights of linear layers in 16, 8 or 4 bits, their products with activations, declarations, checks,
shapes for the compiler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import reference
from tinyllm._internal.checks import check_choice, check_int
from tinyllm._internal.finite import not_finite
from tinyllm.ops._context import autocast_dtype, needs_grad
from tinyllm.ops.dispatch import NOT_DOUBLE, Kernels, Operator, choose, kernels, register_fake, serves
from tinyllm.reference import ACTIVATIONS
from tinyllm.reference.quantized import BITS, BLOCK, padded_columns

KINDS = ("bf16", "int8", "int4")


def _refuses(input: Tensor, *others: Tensor | None) -> str | None:
    return "gradients are wanted" if needs_grad(input, *others) else None


_QUANTIZE = Operator(
    "quantize_weight", cpp=Kernels((torch.float32,)), cuda="PyTorch quantises it", triton="PyTorch quantises it"
)
_LINEAR = Operator(
    "quantized_linear",
    cpp=Kernels((torch.float32,)),
    cuda="Triton's kernel serves it",
    triton=Kernels(NOT_DOUBLE),
    refuses=_refuses,
    raw=("quantized_linear",),
)
_EMBEDDING = Operator(
    "quantized_embedding",
    cpp=Kernels((torch.float32,)),
    cuda="Triton's kernel serves it",
    triton=Kernels(NOT_DOUBLE, source="quantized_linear"),
    raw=("quantized_embedding",),
)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of a linear layer in fewer bits; made by `quantize_weight`.

    Attributes:
        data: bfloat16 (out_features, in_features), or uint8 (out_features, columns / 1 or 2), where columns is
            in_features padded to a multiple of 64; `tinyllm.reference.quantized` describes the layout.
        scales: bfloat16 (out_features, columns / group_size); None for bfloat16.
        in_features: the columns of the weight itself.

    Raises:
        ValueError: the tensors are not of one weight.
    """

    data: Tensor
    scales: Tensor | None
    in_features: int

    def __post_init__(self) -> None:
        columns = padded_columns(check_int("in_features", self.in_features, 1))
        data, scales = self.data, self.scales
        if data.dim() != 2:
            raise ValueError(f"data has shape {tuple(data.shape)}; it must have 2 dimensions")
        if data.dtype == torch.bfloat16 and scales is None and data.size(1) == self.in_features:
            return
        if data.dtype != torch.uint8 or scales is None or data.size(1) not in (columns, columns // 2):
            raise ValueError(
                f"data is {data.dtype} {tuple(data.shape)}; a weight with in_features {self.in_features} is bfloat16 "
                f"with as many columns, or uint8 with {columns} (int8) or {columns // 2} (int4), and has scales"
            )
        groups = scales.size(1) if scales.dim() == 2 else 0
        whole = groups > 0 and columns % groups == 0 and columns // groups % BLOCK == 0
        if scales.dtype != torch.bfloat16 or not whole or scales.size(0) != data.size(0):
            raise ValueError(
                f"scales are {scales.dtype} {tuple(scales.shape)}; bfloat16 is needed, with {data.size(0)} rows and a "
                f"column for each group of a multiple of {BLOCK} of the weight's {columns} columns"
            )

    @property
    def kind(self) -> str:
        """ "bf16", "int8" or "int4"."""
        if self.scales is None:
            return "bf16"
        return "int8" if self.data.size(1) == padded_columns(self.in_features) else "int4"

    @property
    def group_size(self) -> int | None:
        """How many weights share a scale; None for bfloat16."""
        return None if self.scales is None else padded_columns(self.in_features) // self.scales.size(1)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.data.size(0), self.in_features

    def dequantize(self) -> Tensor:
        """Return the weight that is meant: float32 (out_features, in_features)."""
        if choose(_QUANTIZE, self.data.new_empty(0, dtype=torch.float32)) == "reference":
            return reference.dequantize_weight(self.data, self.scales, self.in_features)
        out: Tensor = torch.ops.tinyllm.dequantize_weight(self.data, self.scales, self.in_features)
        return out


def quantize_weight(weight: Tensor, kind: str, *, group_size: int = BLOCK) -> QuantizedWeight:
    """Return the weight of a linear layer in fewer bits.

    Each group of weights has a scale of its own, the best of some candidates for the squared error.

    Args:
        weight: (out_features, in_features), floating and finite; in_features at least 1.
        kind: "bf16", "int8" or "int4".
        group_size: how many weights along in_features share a scale; a multiple of 64 that divides in_features,
            rounded up to a multiple of 64. Not used for "bf16".

    Returns:
        The quantised weight, on weight's device, without gradients.

    Raises:
        TypeError: weight is not floating.
        ValueError: weight is not 2-D or not finite, another kind, or a group_size that does not fit.
    """
    check_choice("kind", kind, KINDS)
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; it must be floating")
    if weight.dim() != 2 or weight.size(1) < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; (out_features, in_features) is needed")
    if check_int("group_size", group_size, BLOCK) % BLOCK or padded_columns(weight.size(1)) % group_size:
        raise ValueError(
            f"group_size is {group_size}; it must be a multiple of {BLOCK} that divides the columns, padded to "
            f"{padded_columns(weight.size(1))}"
        )
    weight, in_features = weight.detach().float(), weight.size(1)
    quantize = reference.quantize_weight
    if choose(_QUANTIZE, weight) != "reference":
        quantize = torch.ops.tinyllm.quantize_weight
    narrow = weight.to(torch.bfloat16, memory_format=torch.contiguous_format) if kind == "bf16" else weight
    if (wrong := not_finite(narrow)) is not None:
        raise ValueError(f"weight holds {wrong} as {narrow.dtype}; it must be finite")
    if kind == "bf16":
        return QuantizedWeight(narrow, None, in_features)
    return QuantizedWeight(*quantize(weight, BITS[kind], group_size), in_features)


def quantized_linear(
    input: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute activation(input weight^T + bias) + residual with a weight in fewer bits.

    On a CPU up to 8 rows of input are multiplied with int8 and int4 weights as integers: each block of 64 activations
    of a row is rounded to 8 bits with a scale of its own, and the products of a block are exact. More rows, and
    gradients, meet the weight unpacked to float32, with the activations as they are.

    On a GPU activations always stay as they are. Up to 16 rows meet the exact weights; for more, these are unpacked in
    input's dtype, and multiplied as PyTorch does it in that.

    Args:
        input: (*, in_features), floating. Sums are float32, float64 if it is that.
        weight: (out_features, in_features), see `quantize_weight`. It has no gradient.
        bias: (out_features), or None.
        activation: "none", "relu", "gelu" (with erf), "gelu_tanh" or "silu".
        residual: of the result's shape, added last; or None.

    Returns:
        (*, out_features), of input's dtype, or autocast's.

    Raises:
        TypeError: input is not floating.
        ValueError: shapes that do not fit, or an unknown activation.
    """
    if not input.is_floating_point():
        raise TypeError(f"input has dtype {input.dtype}; it must be floating")
    check_choice("activation", activation, tuple(ACTIVATIONS))
    out_features, in_features = weight.shape
    if input.dim() == 0 or input.size(-1) != in_features:
        raise ValueError(f"input has shape {tuple(input.shape)}; its last dimension must be in_features, {in_features}")
    for name, tensor, shape in (
        ("bias", bias, (out_features,)),
        ("residual", residual, (*input.shape[:-1], out_features)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {shape} is needed")
    dtype = autocast_dtype(input) or input.dtype
    keeps_dtype = serves("triton", _LINEAR, input, bias, residual)  # its kernel widens what it has loaded
    compute = input.dtype if keeps_dtype else torch.promote_types(input.dtype, torch.float32)
    input = input.to(compute)
    bias, residual = (None if x is None else x.to(compute) for x in (bias, residual))
    backend = choose(_LINEAR, input, bias, residual)
    if backend != "reference":
        operator = kernels(backend).quantized_linear
        out: Tensor = operator(input, weight.data, weight.scales, bias, residual, activation)
        return out.to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        whole = weight.dequantize().to(input.dtype)
        return reference.linear(input, whole, bias, activation=activation, residual=residual).to(dtype)


def quantized_embedding(input: Tensor, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Look up rows of a weight in fewer bits: ids (*), int32 or int64, to (*, in_features) of a floating dtype.

    Raises:
        TypeError: input has another dtype.
        IndexError: an id is out of range. Not on a GPU: the id's row is NaN there.
    """
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input has dtype {input.dtype}; ids are int32 or int64")
    backend = choose(_EMBEDDING, weight.data.new_empty(0, dtype=dtype))
    if backend == "triton":
        operator = kernels(backend).quantized_embedding
        out: Tensor = operator(input, weight.data, weight.scales, weight.in_features, dtype)
        return out
    rows = QuantizedWeight(
        F.embedding(input.flatten(), weight.data),
        None if weight.scales is None else F.embedding(input.flatten(), weight.scales),
        weight.in_features,
    )
    return rows.dequantize().view(*input.shape, weight.in_features).to(dtype)


@register_fake("quantize_weight")
def _(weight, bits, group_size):  # type: ignore[no-untyped-def]
    columns = padded_columns(weight.size(1))
    data = weight.new_empty(weight.size(0), columns * bits // 8, dtype=torch.uint8)
    return data, weight.new_empty(weight.size(0), columns // group_size, dtype=torch.bfloat16)


@register_fake("dequantize_weight")
def _(data, scales, inputs):  # type: ignore[no-untyped-def]
    return data.new_empty(data.size(0), inputs, dtype=torch.float32)


@register_fake("quantized_embedding")
def _(input, data, scales, inputs, dtype):  # type: ignore[no-untyped-def]
    return data.new_empty(*input.shape, inputs, dtype=dtype)


@register_fake("quantized_linear")
def _(input, data, scales, bias, residual, activation):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], data.size(0))
