"""A block of a model for one token of each of a few sequences, by a single operator, with the default cache.

With one operator for each layer, a token of a small model takes longer in Python than in the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tinyllm.integrations import layers
from tinyllm.integrations.cache import fill, growing_layer, room_for
from tinyllm.integrations.layers import STORED, Stored
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
        own: the parameters among them: where each is in `tensors`, the dictionary that it was found in, its name there.
        linears: where the matrix of each linear layer is in `tensors`, the layer, and whether it is in fewer bits.
        sizes, settings: see csrc/cpu/decode_block.cpp; settings are all from activation on.
    """

    tensors: list[Tensor]
    own: list[tuple[int, dict[str, Any], str]]
    linears: list[tuple[int, nn.Module, bool]]
    sizes: list[int]
    settings: tuple[Any, ...]

    def are_current(self, hidden: Tensor) -> bool:
        """Return whether the parameters are those that were found, and as they were."""
        tensors = self.tensors
        for i, where, name in self.own:
            tensor = tensors[i]
            if where[name] is not tensor or tensor.dtype is not torch.float32 or not tensor.is_contiguous():
                return False
        for i, layer, in_fewer_bits in self.linears:
            stored = _stored(layer)
            if (stored is not None) != in_fewer_bits:
                return False
            if stored is None:
                continue
            weight = stored.of(layer, hidden)
            if weight.data is not tensors[i]:
                tensors[i], tensors[i + 1] = weight.data, _NONE if weight.scales is None else weight.scales
        return True


def _stored(layer: nn.Module) -> Stored | None:
    stored = cast("Stored | None", layer.__dict__.get(STORED))
    return None if stored is None or cast(Tensor, layer._parameters["weight"]).requires_grad else stored


_operands: WeakKeyDictionary[nn.Module, _Operands] = WeakKeyDictionary()


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
    layer = growing_layer(cache, cast(int, attention.__dict__.get("layer_idx", -1)))
    if layer is None or layer.keys.dtype is not torch.float32 or layer.keys.size(0) != batch:
        return None
    if not serves("cpp", DECODE_BLOCK, hidden):
        return None
    operands = _operands.get(block)
    if operands is None or not operands.are_current(hidden):
        operands = _Builder(block, parts).operands()
        if operands is None or not operands.are_current(hidden):
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


@dataclass(eq=False)
class _Builder:
    """Collects the operands of a block."""

    block: nn.Module
    parts: Block
    tensors: list[Tensor] = field(default_factory=list)
    own: list[tuple[int, dict[str, Any], str]] = field(default_factory=list)
    linears: list[tuple[int, nn.Module, bool]] = field(default_factory=list)

    def operands(self) -> _Operands | None:
        """Return the operands; None where the block has what the operator does not take."""
        block, parts = self.block, self.parts
        attention = cast(nn.Module, block._modules[parts.attention])
        network = block if parts.network is None else cast(nn.Module, block._modules[parts.network])
        norms = [cast(nn.Module, block._modules[name]) for name in (parts.norm1, parts.norm2)]
        head_norms = [cast(nn.Module, attention._modules[name]) for name in parts.norms]
        kinds = {_NORM_KINDS[norm.__dict__["forward"].func] for norm in (*norms, *head_norms)}
        if len(kinds) != 1 or (head_norms and 0 in kinds):
            return None
        for norm in norms:
            self._add(norm, "weight")
            self._add(norm, "bias")
        for head_norm in head_norms or (None, None):
            self._add(head_norm, "weight")
        dense = [cast(nn.Module, attention._modules[name]) for name in parts.projections]
        rows = [self._linear(layer) for layer in (*dense, *(None,) * (3 - len(dense)))]
        self._linear(cast(nn.Module, attention._modules[parts.out]))
        found = [cast(nn.Module, network._modules[name]) for name in parts.layers]
        gated = len(found) == 3
        for layer in (found[0], found[1] if gated else None, found[-1]):
            self._linear(layer)
        head_dim = head_dim_of(attention)
        by_inputs = {not isinstance(layer, nn.Linear) for layer in (*dense, *found)}
        if head_dim is None or len(by_inputs) != 1:
            return None
        joined = 0 if len(dense) == 3 else 2 if parts.interleaved else 1
        heads = rows[0] // head_dim // (3 if joined else 1)
        pairs = heads if joined else rows[1] // head_dim
        parallel = parts.parallel is not None and bool(getattr(block, parts.parallel))
        sizes = [heads, pairs, head_dim, joined, gated, kinds.pop(), parallel, by_inputs.pop()]
        epsilons = [_eps(norm) for norm in (*norms, *head_norms[:1])]
        settings = (parts.activation, float(cast(float, attention.scaling)), *epsilons, 0.0)[:5]
        return _Operands(self.tensors, self.own, self.linears, [int(size) for size in sizes], settings)

    def _add(self, module: nn.Module | None, name: str) -> None:
        tensor = None if module is None else module._parameters.get(name)
        if tensor is not None:
            self.own.append((len(self.tensors), cast(nn.Module, module)._parameters, name))
        self.tensors.append(_NONE if tensor is None else tensor)

    def _linear(self, layer: nn.Module | None) -> int:
        """Add a layer's matrix, scales and bias; return the number of its outputs."""
        stored = None if layer is None else _stored(layer)
        if layer is not None:
            self.linears.append((len(self.tensors), layer, stored is not None))
        if stored is not None:
            self.tensors += [stored.weight.data, _NONE if stored.weight.scales is None else stored.weight.scales]
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
