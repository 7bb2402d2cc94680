"""decoder: the operators of generation on a CPU, their declaration and shapes for the compiler.

`tinyllm.generation.engine` calls them; csrc/cpu/decoder.cpp says what they take.
"""

from __future__ import annotations

import torch

from tinyllm.ops.dispatch import Kernels, Operator, register_fake

_IN_PARTS = "the modules serve it, with a cache"
DECODER = Operator("decoder", cpp=Kernels((torch.float32,)), cuda=_IN_PARTS, triton=_IN_PARTS)
DECODE_BLOCK = Operator(
    "decode_block", cpp=Kernels((torch.float32,)), cuda=_IN_PARTS, triton=_IN_PARTS, raw=("decode_block",)
)


def _logits(weights, positions, batch):  # type: ignore[no-untyped-def]
    # The output's weight is the last matrix of numbers: what may follow are its scales, and its bias.
    classes = next(x.size(0) for x in reversed(weights) if x.dim() == 2)
    return positions.new_empty(batch, classes)


@register_fake("decoder_read")
def _(ids, counts, weights, positions, *others):  # type: ignore[no-untyped-def]
    return _logits(weights, positions, ids.size(0))


@register_fake("decoder_step")
def _(ids, weights, positions, *others):  # type: ignore[no-untyped-def]
    return _logits(weights, positions, ids.size(0))


@register_fake("decode_block")
def _(input, *others):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape)


@register_fake("decoder_write")
def _(ids, uniforms, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(uniforms, dtype=torch.int64), torch.empty_like(uniforms, dtype=torch.float32)
