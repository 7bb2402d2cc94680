"""The forwards that stand in for modules of several layers: feed-forward networks, and a layer with what follows it.

Each looks at every call whether the module is still what it was: where a part of it has been replaced, as by an
adapter, added or hooked, the module's own forward is called.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tinyllm import ops
from tinyllm.integrations.layers import activation_of, apply_linear, layer_norm, linear
from tinyllm.ops._context import autocast_dtype

# A module's class and the names of its children, when it was looked at.
Shape = tuple[type[nn.Module], tuple[str, ...]]


def shape_of(module: nn.Module) -> Shape:
    return type(module), tuple(module._modules)


def is_ours(module: nn.Module | None, functions: tuple[Any, ...]) -> bool:
    """Return whether calling a module is calling one of these functions of ours, and nothing else."""
    forward = None if module is None else module.__dict__.get("forward")
    return type(forward) is partial and forward.func in functions and not hooked(cast(nn.Module, module))


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def drops(module: nn.Module | None) -> bool:
    """Return whether a module, or an nn.Dropout, drops anything in a call: by a probability among its attributes."""
    if module is None or not module.training:
        return False
    if type(module) is nn.Dropout:
        return module.p > 0.0
    return any("drop" in name and isinstance(p, float) and p > 0.0 for name, p in module.__dict__.items())


def _layers(
    module: nn.Module, was: Shape, names: tuple[str, ...], activation: str, act: str, dropout: str | None = None
) -> list[nn.Module] | None:
    """Return the linear layers of these names; None where calling them and the activation does more than it says."""
    if shape_of(module) != was or drops(module) or _has_any_global_hook():
        return None
    layers = [cast(nn.Module, module._modules[name]) for name in names]
    between = cast(nn.Module, module._modules[act])
    if activation_of(between) != activation or hooked(between) or not _is_dropout(module, dropout):
        return None
    return layers if all(is_ours(layer, (linear,)) for layer in layers) else None


def _is_dropout(module: nn.Module, name: str | None) -> bool:
    child = None if name is None else module._modules[name]
    return name is None or (type(child) is nn.Dropout and not hooked(cast(nn.Module, child)))


class Fallbacks:
    """Counts the calls that modules' own forwards have served, for trials."""

    count = 0


def own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module's own forward, with the replacements of the modules in it."""
    if not torch.compiler.is_compiling():
        Fallbacks.count += 1
    return type(module).forward(module, *args, **kwargs)


def dense_activation(module: nn.Module, input: Tensor, *, was: Shape, layer: str, act: str, activation: str) -> Tensor:
    """Return activation(layer(input))."""
    layers = _layers(module, was, (layer,), activation, act)
    return cast(Tensor, own(module, input)) if layers is None else apply_linear(layers[0], input, activation=activation)


def dense_add_norm(
    module: nn.Module, input: Tensor, residual: Tensor, *, was: Shape, layer: str, norm: str, dropout: str | None
) -> Tensor:
    """Return norm(dropout(layer(input)) + residual)."""
    plain = shape_of(module) == was and not drops(module) and not _has_any_global_hook()
    dense, last = module._modules.get(layer), module._modules.get(norm)
    plain = plain and is_ours(dense, (linear,)) and is_ours(last, (layer_norm,)) and _is_dropout(module, dropout)
    # Autocast would round the sum, which otherwise it leaves in float32.
    if not plain or input.dtype != residual.dtype or autocast_dtype(input) is not None:
        return cast(Tensor, own(module, input, residual))
    first, after = cast(nn.Module, dense), cast(nn.LayerNorm, last)
    drop = None if dropout is None else module._modules[dropout]
    if drop is not None and drops(drop):
        return layer_norm(after, drop(apply_linear(first, input)) + residual)
    return layer_norm(after, apply_linear(first, input, residual=residual))


def feed_forward(
    module: nn.Module,
    input: Tensor,
    *,
    was: Shape,
    layers: tuple[str, str],
    act: str,
    activation: str,
    dropout: str | None,
    dropout_is_last: bool,
) -> Tensor:
    """Return layers[1](activation(layers[0](input))), and where it is last, dropout of that."""
    found = _layers(module, was, layers, activation, act, dropout)
    drop = None if dropout is None else module._modules.get(dropout)
    if found is None or (drops(drop) and not dropout_is_last):
        return cast(Tensor, own(module, input))
    out = apply_linear(found[1], apply_linear(found[0], input, activation=activation))
    return cast(Tensor, drop(out)) if drop is not None and drops(drop) else out


def gated_feed_forward(
    module: nn.Module, input: Tensor, *, was: Shape, layers: tuple[str, str, str], act: str, activation: str
) -> Tensor:
    """Return down(activation(gate(input)) * up(input)) of the layers (gate, up, down)."""
    found = _layers(module, was, layers, activation, act)
    if found is None:
        return cast(Tensor, own(module, input))
    return apply_linear(found[2], gated(found[0], found[1], input, activation))


def gated(gate: nn.Module, up: nn.Module, input: Tensor, activation: str) -> Tensor:
    """Return activation(gate(input)) * up(input)."""
    return ops.gated_activation(apply_linear(gate, input), apply_linear(up, input), activation)
