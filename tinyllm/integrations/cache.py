"""Appending to the default cache of transformers without copying all that it has for each new token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

_ROOM = "_tinyllm_room"
MOST_SPARE = 1024  # tokens that memory is taken for in advance


@dataclass(eq=False)
class Room:
    """Memory for more tokens than a layer of a cache has, (B, H, capacity, head_dim) each.

    `filled` tokens have been written. What has been is never written again, so that whoever holds a view of the keys
    or values keeps what they saw.
    """

    keys: Tensor
    values: Tensor
    filled: int


def is_usual(cache: Any) -> bool:
    """Return whether a cache is the default one, all of whose layers grow, and stay where they are."""
    return type(cache).__name__ == "DynamicCache" and not getattr(cache, "offloading", False)


def growing_layer(cache: Any, index: int) -> Any:
    """Return a layer that has tokens, to be given to `room_for`; None where `cache.update` has to do it."""
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if type(layer).__name__ != "DynamicLayer" or not layer.is_initialized or torch.is_grad_enabled():
        return None
    return layer if layer.keys is not None and layer.keys.dim() == 4 else None


def room_for(layer: Any, new: int) -> Room:
    """Return the memory of a layer, with room behind its tokens for `new` more."""
    keys, values = layer.keys, layer.values
    length = keys.size(2)
    room = cast("Room | None", layer.__dict__.get(_ROOM))
    if (
        room is None
        or room.filled != length
        or room.keys.size(2) < length + new
        or keys.data_ptr() != room.keys.data_ptr()
        or values.data_ptr() != room.values.data_ptr()
        or keys.shape[:2] != room.keys.shape[:2]
        or (room.keys.is_inference() and not torch.is_inference_mode_enabled())
    ):
        capacity = length + new + min(MOST_SPARE, max(64, length // 2))
        room = Room(_with_room(keys, capacity), _with_room(values, capacity), length)
        layer.__dict__[_ROOM] = room
    return room


def fill(layer: Any, room: Room, end: int) -> None:
    """Let the layer have the first `end` tokens, which have been written."""
    room.filled = end
    layer.keys, layer.values = room.keys[:, :, :end], room.values[:, :, :end]


def append(cache: Any, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `cache.update` does."""
    layer = growing_layer(cache, index)
    if layer is None or layer.keys.dtype != key.dtype:
        return cast("tuple[Tensor, Tensor]", cache.update(key, value, index))
    room, end = room_for(layer, key.size(2)), layer.keys.size(2) + key.size(2)
    room.keys[:, :, end - key.size(2) : end].copy_(key)
    room.values[:, :, end - key.size(2) : end].copy_(value)
    fill(layer, room, end)
    return layer.keys, layer.values


def _with_room(x: Tensor, capacity: int) -> Tensor:
    batch, heads, length, head_dim = x.shape
    room = x.new_empty(batch, heads, capacity, head_dim)
    room[:, :, :length].copy_(x)
    return room
