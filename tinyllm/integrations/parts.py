"""The parts of a pre-norm block of transformers, which its children's names tell, as they do in most of its models."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tinyllm.integrations.layers import activation_of
from tinyllm.integrations.networks import Shape, shape_of

NAME = "tinyllm"  # of our attention, in configs of transformers


@dataclass(frozen=True)
class Block:
    """The parts of a block, as names of modules and attributes.

    Attributes:
        was: what the block, its attention module and its network module were made of.
        names: the parameters of its class's forward, in order.
        norm1, norm2, attention: its modules.
        projections: of the attention module: those of queries, keys and values, or one for all three.
        interleaved: a single projection has the three of a head next to each other.
        norms: the attention module's norms of queries and keys; or none.
        out: the attention module's last layer.
        rotary: queries and keys are rotated by `position_embeddings`.
        network: the module that has the network's layers; None: the block itself.
        layers: the network's layers: two, or the three of a gated one, the last one last.
        act, activation: the activation's module in there, and its name.
        parallel: the attribute that says whether both branches start from the block's input; or None.
    """

    was: tuple[Shape, Shape, Shape]
    names: tuple[str, ...]
    norm1: str
    norm2: str
    attention: str
    projections: tuple[str, ...]
    interleaved: bool
    norms: tuple[str, ...]
    out: str
    rotary: bool
    network: str | None
    layers: tuple[str, ...]
    act: str
    activation: str
    parallel: str | None


# What stands first in a block, and what stands second.
_NORMS = (
    ("ln_1", "ln_2"),
    ("input_layernorm", "post_attention_layernorm"),
    ("self_attn_layer_norm", "final_layer_norm"),
    ("layernorm_before", "layernorm_after"),
)
_ATTENTIONS = ("attn", "self_attn", "attention")
# Projections of queries, keys and values, and the last layer; and whether a single one is interleaved.
_PROJECTIONS = (
    (("c_attn",), "c_proj", False),
    (("query_key_value",), "dense", True),
    (("q_proj", "k_proj", "v_proj"), "o_proj", False),
    (("q_proj", "k_proj", "v_proj"), "out_proj", False),
)
_NETWORKS = (
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc1", "fc2"),
    ("gate_proj", "up_proj", "down_proj"),
)


def find(block: nn.Module) -> Block | None:
    """Return the parts of a block; None where it has other children than such blocks have."""
    names = tuple(inspect.signature(type(block).forward).parameters)[1:]
    norms = _having(block, _NORMS)
    attention = next((name for name in _ATTENTIONS if name in block._modules), None)
    if norms is None or attention is None or "hidden_states" not in names:
        return None
    inside = cast(nn.Module, block._modules[attention])
    projections = next((found for found in _PROJECTIONS if _has(inside, (*found[0], found[1]))), None)
    network_name = "mlp" if "mlp" in block._modules else None
    network = block if network_name is None else cast(nn.Module, block._modules[network_name])
    layers = _having(network, _NETWORKS)
    if projections is None or layers is None:
        return None
    head_norms = ("q_norm", "k_norm") if _has(inside, ("q_norm", "k_norm")) else ()
    acts = [name for name, child in network._modules.items() if child is not None and activation_of(child) is not None]
    if len(acts) != 1:
        return None
    of_block = {*norms, attention, *((*layers, acts[0]) if network_name is None else (network_name,))}
    known = (
        (block, of_block),
        (inside, {*projections[0], projections[1], *head_norms}),
        (network, of_block if network_name is None else {*layers, acts[0]}),
    )
    if any(_others(module, expected) for module, expected in known):
        return None
    parallel = "use_parallel_residual"
    return Block(
        was=(shape_of(block), shape_of(inside), shape_of(network)),
        names=names,
        norm1=norms[0],
        norm2=norms[1],
        attention=attention,
        projections=projections[0],
        interleaved=projections[2],
        norms=head_norms,
        out=projections[1],
        rotary="position_embeddings" in names,
        network=network_name,
        layers=layers,
        act=acts[0],
        activation=cast(str, activation_of(cast(nn.Module, network._modules[acts[0]]))),
        parallel=parallel if parallel in block.__dict__ else None,
    )


def head_dim_of(attention: nn.Module) -> int | None:
    """Return the columns of a head."""
    found = attention.__dict__.get("head_dim", attention.__dict__.get("head_size"))
    return found if isinstance(found, int) else None


def _has(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(module._modules.get(name) is not None for name in names)


def _having(module: nn.Module, choices: tuple[tuple[str, ...], ...]) -> tuple[str, ...] | None:
    return next((names for names in choices if _has(module, names)), None)


def _others(module: nn.Module, expected: set[Any]) -> bool:
    """Return whether a module has other children than these, dropout aside, or tensors of its own."""
    children = {name for name, child in module._modules.items() if child is not None and type(child) is not nn.Dropout}
    return children != expected or any(True for _ in module.parameters(recurse=False))
