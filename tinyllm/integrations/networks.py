"""The forwards that stand in for modules of several layers: feed-forward networks, and a layer with what follows it.

Each looks at every call whether its layers are still those that were there: one that has been replaced, as by an
adapter, or hooked, is called by the module's own forward.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tinyllm import ops
from tinyllm.integrations.layers import activation_of, apply_linear, layer_norm, linear


def _plain(module: nn.Module, function: Any) -> bool:
    """Return whether calling a module is calling this function of ours, and nothing else."""
    forward = module.__dict__.get("forward")
    return type(forward) is partial and forward.func is function and not hooked(module)


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _drops(module: nn.Module | None) -> bool:
    return module is not None and module.training and cast(nn.Dropout, module).p > 0.0


def _layers(module: nn.Module, names: tuple[str, ...], activation: str, act: str) -> list[nn.Module] | None:
    """Return the linear layers of these names; None where calling them and the activation does more than it says."""
    layers = [cast(nn.Module, module._modules[name]) for name in names]
    plain = all(_plain(layer, linear) for layer in layers) and not _has_any_global_hook()
    between = cast(nn.Module, module._modules[act])
    return layers if plain and activation_of(between) == activation and not hooked(between) else None


class Fallbacks:
    """Counts the calls that modules' own forwards have served, for trials."""

    count = 0


def own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module's own forward, with the replacements of the modules in it."""
    if not torch.compiler.is_compiling():
        Fallbacks.count += 1
    return type(module).forward(module, *args, **kwargs)


def dense_activation(module: nn.Module, input: Tensor, *, layer: str, act: str, activation: str) -> Tensor:
    """Return activation(layer(input))."""
    layers = _layers(module, (layer,), activation, act)
    return cast(Tensor, own(module, input)) if layers is None else apply_linear(layers[0], input, activation=activation)


def dense_add_norm(
    module: nn.Module, input: Tensor, residual: Tensor, *, layer: str, norm: str, dropout: str | None
) -> Tensor:
    """Return norm(dropout(layer(input)) + residual)."""
    dense, last = cast(nn.Module, module._modules[layer]), cast(nn.LayerNorm, module._modules[norm])
    drop = None if dropout is None else module._modules[dropout]
    plain = _plain(dense, linear) and _plain(last, layer_norm) and not _has_any_global_hook()
    if not plain or (drop is not None and hooked(drop)) or input.dtype != residual.dtype:
        return cast(Tensor, own(module, input, residual))
    if _drops(drop):
        return layer_norm(last, cast(nn.Module, drop)(apply_linear(dense, input)) + residual)
    return layer_norm(last, apply_linear(dense, input, residual=residual))


def feed_forward(
    module: nn.Module,
    input: Tensor,
    *,
    layers: tuple[str, str],
    act: str,
    activation: str,
    dropout: str | None,
    dropout_is_last: bool,
) -> Tensor:
    """Return layers[1](activation(layers[0](input))), and where it is last, dropout of that."""
    drop = None if dropout is None else module._modules[dropout]
    found = _layers(module, layers, activation, act)
    if found is None or (drop is not None and (hooked(drop) or (_drops(drop) and not dropout_is_last))):
        return cast(Tensor, own(module, input))
    out = apply_linear(found[1], apply_linear(found[0], input, activation=activation))
    return cast(Tensor, drop(out)) if drop is not None and _drops(drop) else out


def gated_feed_forward(
    module: nn.Module, input: Tensor, *, layers: tuple[str, str, str], act: str, activation: str
) -> Tensor:
    """Return down(activation(gate(input)) * up(input)) of the layers (gate, up, down)."""
    found = _layers(module, layers, activation, act)
    if found is None:
        return cast(Tensor, own(module, input))
    return apply_linear(found[2], gated(found[0], found[1], input, activation))


def gated(gate: nn.Module, up: nn.Module, input: Tensor, activation: str) -> Tensor:
    """Return activation(gate(input)) * up(input)."""
    return ops.gated_activation(apply_linear(gate, input), apply_linear(up, input), activation)
