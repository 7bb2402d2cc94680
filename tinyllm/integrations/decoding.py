"""A block of a model for one token of each of a few sequences, by a single operator, with the default cache.

With one operator for each layer, a token of a small model takes longer in Python than in the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tinyllm.integrations import layers
from tinyllm.integrations.cache import fill, growing_layer, room_for
from tinyllm.integrations.layers import stored_of
from tinyllm.integrations.parts import Block, head_dim_of
from tinyllm.ops._context import autocast_dtype
from tinyllm.ops.decoder import DECODE_BLOCK
from tinyllm.ops.dispatch import serves

_MOST_SEQUENCES = 8
_NORM_KINDS = {layers.layer_norm: 0, layers.rms_norm: 1, layers.rms_norm_around_one: 2}
_NONE = torch.empty(0)


@dataclass(eq=False)
class _Operands:
    """The arguments of `decode_block` that stay the same from call to call.

    Attributes:
        tensors: all of its `weights`.
        parts: where each module, and each parameter, was found: the dictionary, its name there, and what was there.
        own: where the parameters are in `tensors`.
        linears: where the matrix of each linear layer is in `tensors`, the layer, and whether it is in fewer bits.
        sizes, settings: see csrc/cpu/decode_block.cpp; settings are all from activation on.
        now: returns sizes and settings as they are now.
    """

    tensors: list[Tensor]
    parts: list[tuple[dict[str, Any], str, Any]]
    own: list[int]
    linears: list[tuple[int, nn.Module, bool]]
    sizes: list[int]
    settings: tuple[Any, ...]
    now: Callable[[], tuple[list[int], tuple[Any, ...]]]

    def are_current(self) -> bool:
        """Return whether modules, parameters and settings are those that were found, and as they were."""
        tensors = self.tensors
        for where, name, found in self.parts:
            if where.get(name) is not found:
                return False
        for i in self.own:
            tensor = tensors[i]
            if tensor.dtype is not torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu:
                return False
        if (self.sizes, self.settings) != self.now():
            return False
        for i, layer, in_fewer_bits in self.linears:
            stored = stored_of(layer)
            if (stored is not None) != in_fewer_bits:
                return False
            if stored is None:
                continue
            weight = stored.of(layer)
            if weight.data is not tensors[i]:
                tensors[i], tensors[i + 1] = weight.data, _NONE if weight.scales is None else weight.scales
        return True


_operands: WeakKeyDictionary[nn.Module, _Operands] = WeakKeyDictionary()


def forget(module: nn.Module) -> None:
    """Let go of what is kept for a block."""
    _operands.pop(module, None)


def decode(
    block: nn.Module,
    parts: Block,
    hidden: Tensor,
    mask: Tensor | None,
    cache: Any,
    angles: tuple[Tensor, Tensor] | None,
) -> Tensor | None:
    """Return what a block makes of hidden (B, 1, D), and append to the cache; None where its modules have to."""
    batch = hidden.size(0)
    if hidden.dtype is not torch.float32 or batch > _MOST_SEQUENCES or autocast_dtype(hidden) is not None:
        return None
    attention = cast(nn.Module, block._modules[parts.attention])
    index = attention.__dict__.get("layer_idx")
    layer = growing_layer(cache, index) if isinstance(index, int) else None
    if layer is None or layer.keys.dtype is not torch.float32 or layer.keys.size(0) != batch:
        return None
    if not serves("cpp", DECODE_BLOCK, hidden):
        return None
    operands = _operands.get(block)
    if operands is None or not operands.are_current():
        operands = _Builder(block, parts).operands()
        if operands is None or not operands.are_current():
            return None
        _operands[block] = operands
    seen = layer.keys.size(2)
    if mask is not None:
        if mask.size(-1) != seen + 1:
            return None
        mask = mask.expand(batch, operands.sizes[0], 1, seen + 1)
    cos, sin = (None, None) if angles is None else angles
    if cos is not None and cos.dtype is not torch.float32:
        return None
    room = room_for(layer, 1)
    out: Tensor = torch.ops.tinyllm.decode_block(
        hidden, operands.tensors, operands.sizes, room.keys, room.values, seen, mask, cos, sin, *operands.settings
    )
    fill(layer, room, seen + 1)
    return out


class _Builder:
    """Collects the operands of a block."""

    def __init__(self, block: nn.Module, parts: Block) -> None:
        self.block, self.parts = block, parts
        self.tensors: list[Tensor] = []
        self.found: list[tuple[dict[str, Any], str, Any]] = []
        self.own: list[int] = []
        self.linears: list[tuple[int, nn.Module, bool]] = []

    def operands(self) -> _Operands | None:
        """Return the operands; None where the block has what the operator does not take."""
        block, parts = self.block, self.parts
        attention = self._child(block, parts.attention)
        network = block if parts.network is None else self._child(block, parts.network)
        norms = [self._child(block, name) for name in (parts.norm1, parts.norm2)]
        head_norms = [self._child(attention, name) for name in parts.norms]
        kinds = {_NORM_KINDS[norm.__dict__["forward"].func] for norm in (*norms, *head_norms)}
        dense = [self._child(attention, name) for name in parts.projections]
        out, layers_of = self._child(attention, parts.out), [self._child(network, name) for name in parts.layers]
        by_inputs = {not isinstance(layer, nn.Linear) for layer in (*dense, out, *layers_of)}
        head_dim = head_dim_of(attention)
        alike = len(kinds) == 1 and len(by_inputs) == 1 and len({_eps(norm) for norm in head_norms}) < 2
        if head_dim is None or not alike or (head_norms and 0 in kinds):
            return None
        # One that is parametrized has none of its own, and a norm of heads is taken by its weight.
        for module in (*dense, out, *layers_of, *head_norms):
            if module._parameters.get("weight") is None:
                return None
        for norm in norms:
            self._add(norm, "weight")
            self._add(norm, "bias")
        for head_norm in head_norms or (None, None):
            self._add(head_norm, "weight")
        rows = [self._linear(layer) for layer in (*dense, *(None,) * (3 - len(dense)))]
        self._linear(out)
        gated = len(layers_of) == 3
        for layer in (layers_of[0], layers_of[1] if gated else None, layers_of[-1]):
            self._linear(layer)
        joined = 0 if len(dense) == 3 else 2 if parts.interleaved else 1
        heads = rows[0] // head_dim // (3 if joined else 1)
        pairs = heads if joined else rows[1] // head_dim
        kind, conv = kinds.pop(), by_inputs.pop()

        def now() -> tuple[list[int], tuple[Any, ...]]:
            parallel = parts.parallel is not None and bool(getattr(block, parts.parallel))
            sizes = [heads, pairs, head_dim, joined, int(gated), kind, int(parallel), int(conv)]
            epsilons = [_eps(norm) for norm in (*norms, *head_norms[:1])]
            return sizes, (parts.activation, float(cast(float, attention.scaling)), *epsilons, 0.0)[:5]

        return _Operands(self.tensors, self.found, self.own, self.linears, *now(), now)

    def _child(self, module: nn.Module, name: str) -> nn.Module:
        child = cast(nn.Module, module._modules[name])
        self.found.append((module._modules, name, child))
        return child

    def _add(self, module: nn.Module | None, name: str) -> None:
        tensor = None
        if module is not None:
            tensor = module._parameters.get(name)
            self.found.append((module._parameters, name, tensor))
        if tensor is not None:
            self.own.append(len(self.tensors))
        self.tensors.append(_NONE if tensor is None else tensor)

    def _linear(self, layer: nn.Module | None) -> int:
        """Add a layer's matrix, scales and bias; return the number of its outputs."""
        stored = None if layer is None else stored_of(layer)
        if layer is not None:
            self.linears.append((len(self.tensors), layer, stored is not None))
        if layer is not None and stored is not None:
            weight = stored.of(layer)
            self.tensors += [weight.data, _NONE if weight.scales is None else weight.scales]
        else:
            self._add(layer, "weight")
            self.tensors.append(_NONE)
        self._add(layer, "bias")
        if layer is None:
            return 0
        return cast(Tensor, layer.weight).size(0 if isinstance(layer, nn.Linear) else 1)


def _eps(norm: nn.Module) -> float:
    name = norm.__dict__["forward"].keywords.get("eps", "eps")
    eps = getattr(norm, name)
    return float(torch.finfo(torch.float32).eps if eps is None else eps)
