"""Models with weights in 16, 8 or 4 bits, for generation: smaller, and faster where reading the weights takes the time.

In a state_dict a matrix that is stored so has no `weight`, but `data` and, of int8 and int4, `scales`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tinyllm import ops
from tinyllm._internal.checks import check_choice
from tinyllm._internal.huge_pages import HugePages
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.nn import QuantizedEmbedding, QuantizedLinear
from tinyllm.ops.quantized_linear import KINDS, QuantizedWeight
from tinyllm.pretrained.modules import without_weights

if TYPE_CHECKING:
    from tinyllm.model import SimpleLLM

WEIGHTS = ("float32", *KINDS)

_TABLE, _OUTPUT = "embedding.embedding", "output"
_Model = TypeVar("_Model", bound="SimpleLLM")


def check_weights(weights: str) -> None:
    """Raise ValueError if there is no such way to store weights."""
    check_choice("weights", weights, WEIGHTS)


def _kind(layer: str, weights: str) -> str:
    """Return how a layer's weight is stored: with 4 bits in all others, the embedding and the output have 8. A logit is
    a single sum over a row of the latter, whose errors no other layer evens out."""
    return "int8" if weights == "int4" and layer in (_TABLE, _OUTPUT) else weights


def quantize(model: _Model, weights: str, *, group_size: int = 64) -> _Model:
    """Store the weights of a model's embedding and linear layers in fewer bits, in place.

    With "int4" the embedding and the output are stored in 8 bits. Norms, biases and positions stay as they are. Weights
    that are tied stay so. What is quantised is not trained any more.

    Args:
        model: any SimpleLLM whose linear layers and embedding are PyTorch's own.
        weights: "bf16", "int8" or "int4"; "float32" leaves the model as it is.
        group_size: see `ops.quantize_weight`.

    Returns:
        model.

    Raises:
        ValueError: another name, a group_size that does not fit, or layers that have been replaced.
    """
    check_weights(weights)
    found = weights_of(model)
    if weights == found:
        return model
    if found != "float32":
        raise ValueError(f"model has its weights as {found!r} already; one with float32 weights is needed")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    others = [name for name, module in layers.items() if type(module) not in (nn.Linear, nn.Embedding)]
    if others or not {_TABLE, _OUTPUT} <= layers.keys():
        raise ValueError(f"model has layers that are not PyTorch's own: {', '.join(others) or 'embedding or output'}")
    done: dict[int, QuantizedWeight] = {}  # by the weight, which several layers may share
    for name, layer in layers.items():
        if id(layer.weight) not in done:
            try:
                found_weight = ops.quantize_weight(layer.weight, _kind(name, weights), group_size=group_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            done[id(layer.weight)] = found_weight
    for name, layer in layers.items():  # only now, so that an error leaves the model as it was
        _replace(model, name, done[id(layer.weight)], cast("nn.Parameter | None", getattr(layer, "bias", None)))
    return model


def _replace(model: SimpleLLM, name: str, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
    parent, _, child = name.rpartition(".")
    made = QuantizedEmbedding(weight) if name == _TABLE else QuantizedLinear(weight, bias)
    setattr(model.get_submodule(parent), child, made)


def stored(name: str, tensor: Tensor, weights: str, pages: HugePages) -> dict[str, Tensor]:
    """Return copies of what a state_dict holds for a parameter whose model stores its weights so."""
    layer, _, kind = name.rpartition(".")
    if weights == "float32" or kind != "weight" or tensor.dim() != 2 or layer == "positional_encoding":
        return {name: pages.copy(tensor, torch.float32)}
    quantized = ops.quantize_weight(tensor, _kind(layer, weights))
    tensors = {f"{layer}.data": pages.copy(quantized.data)}
    return tensors if quantized.scales is None else tensors | {f"{layer}.scales": pages.copy(quantized.scales)}


def weights_of(model: SimpleLLM) -> str:
    """Return how a model's weights are stored: "float32", "bf16", "int8" or "int4"."""
    kinds = {module.weight.kind for module in model.modules() if isinstance(module, QuantizedLinear)}
    return "int4" if "int4" in kinds else kinds.pop() if kinds else "float32"


def group_size_of(model: SimpleLLM) -> int | None:
    """Return how many weights of a model share a scale; None where they have none, as those of 32 and 16 bits."""
    sizes = (module.weight.group_size for module in model.modules() if isinstance(module, QuantizedLinear))
    return max((size for size in sizes if size is not None), default=None)


def model_of(kind: type[_Model], config: SimpleLLMConfig, state: Mapping[str, Tensor]) -> _Model:
    """Return a model with the tensors of a state_dict themselves, stored as they are there.

    Args:
        kind: SimpleLLM, or a subclass.
        config: what the model is.
        state: its tensors; of a tied embedding and output either may be left out.

    Raises:
        ValueError: data and scales that are not of one weight, or not of the config's.
        RuntimeError: the tensors are not those of the config, as `load_state_dict` says it.
    """
    with without_weights():
        model = kind(**config.to_dict())
    state = dict(state)
    names = ("weight", "data", "scales")
    if config.tie_embeddings:
        for name in names:
            for there, other in ((_OUTPUT, _TABLE), (_TABLE, _OUTPUT)):
                if f"{there}.{name}" in state:
                    state.setdefault(f"{other}.{name}", state[f"{there}.{name}"])
    for key in [key for key in state if key.endswith(".data")]:
        layer = key.removesuffix(".data")
        try:
            old = model.get_submodule(layer)
        except AttributeError:
            continue  # load_state_dict will say that it is unknown
        if isinstance(old, (nn.Linear, nn.Embedding)):
            shape = tuple(old.weight.shape)
            try:
                weight = QuantizedWeight(state[key], state.get(f"{layer}.scales"), shape[1])
            except ValueError as error:
                raise ValueError(f"{layer}: {error}") from error
            if weight.shape != shape:
                raise ValueError(f"{layer} has the shape {weight.shape}; the config says {shape}")
            _replace(model, layer, weight, cast("nn.Parameter | None", getattr(old, "bias", None)))
    expected = model.state_dict()
    if wrong := [name for name, x in state.items() if name in expected and x.dtype != expected[name].dtype]:
        raise ValueError(f"{wrong[0]} is {state[wrong[0]].dtype}; {expected[wrong[0]].dtype} is needed")
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        table, output = cast(Any, model.embedding.embedding), cast(Any, model.output)
        if isinstance(output, QuantizedLinear):
            table.data, table.scales = output.data, output.scales
        else:
            table.weight = output.weight
    return model
