"""The forwards that stand in for single layers of any model: norms, linear layers and activations.

Each is a function of the module and its inputs, and reads what it needs from the module at every call, so that the
module stays what it is: its parameters may be trained, loaded and moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import ops
from tinyllm.ops import _products
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
        if input.dim() == 0 or not _products.worth_a_call(input.numel() // max(1, input.size(-1)) * weight.numel()):
            return cast(Tensor, type(module).forward(module, input))
    return apply_linear(module, input)


def apply_linear(
    module: nn.Module, input: Tensor, *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return activation(module(input)) + residual; activations are those of `ops.linear`."""
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    stored = module.__dict__.get(STORED)
    if stored is not None and not weight.requires_grad:
        found = stored.of(module, input)
        return ops.quantized_linear(input, found, bias, activation=activation, residual=residual)
    if not isinstance(module, nn.Linear):
        weight = weight.t()
    return ops.linear(input, weight, bias, activation=activation, residual=residual)


# ---- Weights in fewer bits beside the modules' own


@dataclass(eq=False)
class Stored:
    """A linear layer's weight in fewer bits, and what tells whether that is still the layer's weight.

    Attributes:
        kind: how it is stored, see `ops.quantize_weight`.
        weight: the weight.
        state: where the layer's own weight was and how often it had been written to.
        sample: some of its elements. A tensor that is written to through `.data` keeps its state.
    """

    kind: str
    weight: QuantizedWeight
    state: tuple[Any, ...]
    sample: Tensor

    @classmethod
    def make(cls, module: nn.Module, kind: str) -> Stored:
        weight = cast(Tensor, module.weight).detach()
        by_outputs = weight if isinstance(module, nn.Linear) else weight.t()
        return cls(kind, ops.quantize_weight(by_outputs, kind), _state(weight), _sample(weight))

    def of(self, module: nn.Module, input: Tensor) -> QuantizedWeight:
        """Return the weight, made anew if the layer's own has changed; a call with many rows looks at the sample."""
        if not torch.compiler.is_compiling():
            weight = cast(Tensor, module.weight).detach()
            moved = _state(weight) != self.state
            if moved or input.numel() > 8 * input.size(-1):
                if _same(self.sample, _sample(weight)) and self.weight.data.device == weight.device:
                    self.state = _state(weight)
                else:
                    self.__dict__.update(Stored.make(module, self.kind).__dict__)
        return self.weight


def _state(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype


def _sample(weight: Tensor) -> Tensor:
    flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)
    return flat[:: max(1, flat.numel() // 61)].clone()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
