"""Models with weights in 16, 8 or 4 bits, for generation: smaller, and faster where reading the weights takes the time."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from tinyllm import ops
from tinyllm._internal.checks import check_choice
from tinyllm.model import SimpleLLM
from tinyllm.nn import QuantizedEmbedding, QuantizedLinear
from tinyllm.ops.quantized_linear import KINDS

WEIGHTS = ("float32", *KINDS)


def quantize(model: SimpleLLM, weights: str, *, group_size: int = 64) -> SimpleLLM:
    """Store the weights of a model's embedding and linear layers in fewer bits, in place.

    With "int4" the embedding and the output are stored in 8 bits: few tokens see much of the former, and each logit is
    a sum over the latter. Norms, biases and positions stay as they are. Weights that are tied stay so. What is
    quantised is not trained any more.

    Args:
        model: any SimpleLLM whose linear layers and embedding have not been replaced.
        weights: "bf16", "int8" or "int4"; "float32" leaves the model as it is.
        group_size: see `ops.quantize_weight`.

    Returns:
        model.

    Raises:
        ValueError: another name, a group_size that does not fit, or a layer that is none of PyTorch's own.
    """
    check_choice("weights", weights, WEIGHTS)
    if weights == "float32":
        return model
    at_ends = "int8" if weights == "int4" else weights
    table = model.embedding.embedding
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = [
        name
        for name, module in (*layers.items(), ("embedding", table))
        if type(module) not in (nn.Linear, nn.Embedding)
    ]
    if others or not isinstance(table, nn.Embedding) or "output" not in layers:
        raise ValueError(f"model has layers that are not PyTorch's own: {', '.join(others) or 'embedding or output'}")
    tied = table.weight is model.output.weight
    for name, layer in layers.items():
        kind = at_ends if name == "output" else weights
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear.from_linear(layer, kind, group_size=group_size))
    shared = (
        cast(Any, model.output).weight if tied else ops.quantize_weight(table.weight, at_ends, group_size=group_size)
    )
    cast(Any, model.embedding).embedding = QuantizedEmbedding(shared)
    return model
