"""The forwards that stand in for single layers of any model: norms, linear layers and activations.

Each is a function of the module and its inputs, and reads what it needs from the module at every call, so that the
module stays what it is: its parameters may be trained, loaded and moved.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import ops
from tinyllm.ops import _products
from tinyllm.ops._context import needs_grad
from tinyllm.ops.quantized_linear import QuantizedWeight

STORED = "_tinyllm_stored"  # the attribute of a linear layer that has its weight in fewer bits

_ACTIVATIONS = {
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def activation_of(module: nn.Module) -> str | None:
    """Return the name of a module's activation, as operators take it; None where the module is something else."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module).__name__)


def layer_norm(module: nn.LayerNorm, input: Tensor) -> Tensor:
    return ops.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)


def rms_norm(module: nn.Module, input: Tensor, *, eps: str) -> Tensor:
    """Call an RMSNorm whose attribute of the name `eps` is added to the mean square."""
    weight = cast("Tensor | None", module.weight)
    shape = input.shape[-1:] if weight is None else tuple(weight.shape)
    return ops.rms_norm(input, shape, weight, getattr(module, eps))


def rms_norm_around_one(module: nn.Module, input: Tensor, *, eps: str) -> Tensor:
    """Call an RMSNorm whose weight is what is added to one, as Gemma's."""
    weight = cast(Tensor, module.weight)
    return ops.rms_norm(input, tuple(weight.shape), weight.float() + 1.0, getattr(module, eps))


def gelu_tanh(module: nn.Module, input: Tensor) -> Tensor:
    """Call an activation that PyTorch computes in one pass, and its module in eight."""
    return F.gelu(input, approximate="tanh")


def linear(module: nn.Module, input: Tensor) -> Tensor:
    """Call an nn.Linear or a Conv1D, whose weight is (in_features, out_features)."""
    if STORED not in module.__dict__:
        weight = cast(Tensor, module.weight)
        rows = input.numel() // max(1, input.size(-1)) if input.dim() > 0 else 0
        if not input.is_cpu or not _products.worth_a_call(rows * weight.numel()):
            return cast(Tensor, type(module).forward(module, input))
    return apply_linear(module, input)


def apply_linear(
    module: nn.Module, input: Tensor, *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return activation(module(input)) + residual; activations are those of `ops.linear`."""
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    stored = stored_of(module)
    if stored is not None:
        return ops.quantized_linear(input, stored.of(module), bias, activation=activation, residual=residual)
    if not isinstance(module, nn.Linear):
        weight = weight.t()
    return ops.linear(input, weight, bias, activation=activation, residual=residual)


# ---- Weights in fewer bits beside the modules' own


class Stored:
    """The weight of a linear layer in fewer bits, made anew where the layer's own has changed.

    That is seen by where the weight is and how often it has been written to, which a change through `weight.data` does
    not count. So some of its elements are compared as well, on a CPU. A copy and a pickle have none of it, and make it.

    Args:
        kind: how it is stored, see `ops.quantize_weight`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._weight: QuantizedWeight | None = None
        self._state: tuple[Any, ...] = ()
        self._sample = self._sampled = torch.empty(0)  # the elements as they were, and a view of the weight's

    def __reduce__(self) -> tuple[type[Stored], tuple[str]]:
        return Stored, (self.kind,)

    def of(self, module: nn.Module) -> QuantizedWeight:
        """Return the weight of the layer."""
        if self._weight is None or not torch.compiler.is_compiling():
            weight = cast(Tensor, module.weight)
            if self._state != _state(weight) or (weight.is_cpu and not torch.equal(self._sample, self._sampled)):
                self._make(weight.detach(), isinstance(module, nn.Linear))
        assert self._weight is not None
        return self._weight

    def _make(self, weight: Tensor, by_outputs: bool) -> None:
        self._weight = ops.quantize_weight(weight if by_outputs else weight.t(), self.kind)
        self._state = _state(weight)
        flat = weight.as_strided((weight.numel(),), (1,)) if weight.is_contiguous() else weight[:, 0]
        self._sampled = flat[:: max(1, flat.numel() // 61)]
        self._sample = self._sampled.clone()


def stored_of(module: nn.Module) -> Stored | None:
    """Return what a linear layer multiplies by; None where that is its own weight, as where that gets a gradient."""
    stored = cast("Stored | None", module.__dict__.get(STORED))
    return None if stored is None or needs_grad(cast(Tensor, module.weight)) else stored


def _state(weight: Tensor) -> tuple[Any, ...]:
    version = -1 if weight.is_inference() else weight._version  # which tensors of inference mode do not count
    return weight.data_ptr(), version, weight.dtype, weight.device
