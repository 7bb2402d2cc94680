"""Random calls of the operators that stand for whole models and blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.check.draw import Case, Draw, Function, both


def _block_parameters(draw: Draw, width: int, hidden: int, heads: int, bias: bool) -> list[Tensor]:
    shapes = [(width, width)] * (4 if heads > 1 else 3) + [(hidden, width), (width, hidden)]
    weights = [draw.floats(*shape, scale=shape[1] ** -0.5) for shape in shapes]
    weights += [draw.floats(width, scale=0.25).add_(1) for _ in range(2)]
    return weights + [draw.floats(weight.size(0)) for weight in weights if bias]


def _block_options(draw: Draw) -> tuple[dict[str, Any], int, int]:
    heads = draw.one_of(1, 1, 2, 3, 4)
    options = {
        "num_heads": heads,
        "causal": draw.chance(0.5),
        "norm_first": draw.chance(0.5),
        "activation": draw.one_of("relu", "gelu", "gelu_tanh"),
    }
    # Not so narrow that the norms' gradients are nothing but rounding.
    return options, heads * (3 + draw.size(21)), draw.size(100)


def transformer_block(draw: Draw) -> Case:
    options, width, hidden = _block_options(draw)
    batch, tokens = draw.size(4), draw.size(70)
    parameters = _block_parameters(draw, width, hidden, options["num_heads"], draw.chance(0.5))
    text = f"{[batch, tokens, width]}, hidden {hidden}, {options}"

    def call(function: Function, x: Tensor, *parameters: Tensor) -> Any:
        return function(x, parameters, **options)

    inputs = [draw.floats(batch, tokens, width), *parameters]
    return both("transformer_block", text, inputs, call, depth=4)


def _model_parameters(
    draw: Draw, options: dict[str, Any], layers: int, words: int, width: int, hidden: int, bias: bool
) -> list[Tensor]:
    parameters = [draw.floats(words, width)]
    for _ in range(layers):
        parameters += _block_parameters(draw, width, hidden, options["num_heads"], bias)
    if options["norm_first"]:
        parameters += [draw.floats(width, scale=0.25).add_(1)] + [draw.floats(width)] * bias
    return parameters + [draw.floats(words, width, scale=width**-0.5)] + [draw.floats(words)] * bias


def transformer(draw: Draw) -> Case:
    options, width, hidden = _block_options(draw)
    batch, tokens, layers, words, bias = (
        draw.size(3),
        draw.size(50),
        draw.one_of(0, 1, 2),
        1 + draw.size(90),
        draw.chance(0.5),
    )
    ids = draw.ints(words, batch, tokens)
    target = draw.ints(words, batch, tokens) if draw.chance(0.6) else None
    parameters = _model_parameters(draw, options, layers, words, width, hidden, bias)
    text = f"{[batch, tokens, width]}, {layers} layers, {words} words, loss {target is not None}, {options}"

    def call(function: Function, positions: Tensor | None, *parameters: Tensor) -> Any:
        return function(ids, parameters, num_layers=layers, positions=positions, target=target, **options)

    inputs = [draw.perhaps(tokens, width), *parameters]
    return both("transformer", text, inputs, call, depth=4 * (layers + 1))


def decoder(draw: Draw) -> Case:
    """Read the beginnings of some texts, then the rest token by token; what follows each token is the result."""
    options, width, hidden = _block_options(draw)
    options["causal"] = True
    batch, tokens, layers, words = draw.size(10), 1 + draw.size(90), draw.one_of(0, 1, 2), 1 + draw.size(300)
    read = max(1, tokens - draw.size(4))
    parameters = _model_parameters(draw, options, layers, words, width, hidden, draw.chance(0.5))
    ids = torch.randint(words, (batch, tokens), generator=draw.numbers)
    heads, norm_first, activation = options["num_heads"], options["norm_first"], options["activation"]
    text = f"{[batch, tokens, width]}, {read} at once, {layers} layers, {words} words, {options}"

    def ours(positions: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        own = [x.detach().clone(memory_format=torch.contiguous_format) for x in weights]
        table = positions.detach().clone(memory_format=torch.contiguous_format)
        cache = table.new_full((layers, 2, batch, heads, tokens, width // heads), float("nan"))
        settings = own, table, cache
        shape = layers, heads, norm_first, activation, 1e-5
        counts = torch.full((batch,), read)
        found = [torch.ops.tinyllm.decoder_read(ids[:, :read], counts, *settings, 0 * counts, *shape)]
        for step in range(read, tokens):
            lengths = torch.full((batch,), step)
            found.append(torch.ops.tinyllm.decoder_step(ids[:, step].contiguous(), *settings, lengths, *shape))
        return tuple(found)

    def theirs(positions: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        out = reference.transformer(ids, weights, num_layers=layers, positions=positions, **options)
        return tuple(out[:, step].detach() for step in range(read - 1, tokens))

    inputs = [draw.floats(tokens, width), *parameters]
    return Case(text, ours, theirs, inputs, depth=4 * (layers + 1), differentiable=False)


def decode_block(draw: Draw) -> Case:
    """Compute a block for the token that follows those in a cache; the cache with its keys and values is a result."""
    kv_heads, group, head_dim = draw.size(4), draw.one_of(1, 1, 2, 3), draw.size(40)
    heads, width, hidden, seen = kv_heads * group, 3 + draw.size(90), draw.size(120), draw.size(700) - 1
    joined = draw.one_of(0, 1, 2) if group == 1 else draw.one_of(0, 1)
    gated, norm, parallel = draw.chance(0.5), draw.one_of(0, 1, 2), draw.chance(0.3)
    batch, activation = draw.size(5), draw.one_of("relu", "gelu", "gelu_tanh", "silu")
    queries, pairs = heads * head_dim, kv_heads * head_dim
    outputs = [queries + 2 * pairs] if joined else [queries, pairs, pairs]
    shapes = [(rows, width) for rows in outputs] + [(width, queries)] + [(hidden, width)] * (1 + gated)
    dense = [draw.floats(*shape, scale=shape[1] ** -0.5) for shape in (*shapes, (width, hidden))]
    biases = [draw.perhaps(matrix.size(0)) for matrix in dense]
    norms = [draw.floats(width, scale=0.25).add_(norm != 2) for _ in range(2)]
    heads_normed = norm > 0 and draw.chance(0.5)
    head_norms = [draw.floats(head_dim, scale=0.25).add_(norm != 2) for _ in range(2)] if heads_normed else []
    norm_biases = [draw.floats(width) if norm == 0 else None for _ in range(2)]
    rotated = 2 * (draw.size(head_dim) // 2) if draw.chance(0.6) else 0
    rows = draw.one_of(1, batch)
    angles = [draw.floats(rows, 1, rotated) for _ in range(2 if rotated else 0)]
    caches = [draw.floats(batch, kv_heads, seen + draw.size(9), head_dim) for _ in range(2)]
    mask = torch.rand(batch, 1, 1, seen + 1, generator=draw.numbers) < 0.7 if draw.chance(0.4) else None
    text = (
        f"{[batch, 1, width]}, {seen} before, heads {heads}/{kv_heads}x{head_dim}, hidden {hidden}, joined {joined}, "
        f"gated {gated}, norm {norm}, parallel {parallel}, rotated {rotated}, {activation}"
    )
    everything: list[list[Any]] = [dense, biases, norms, norm_biases, head_norms, angles, caches]

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        def own(tensor: Tensor | None) -> Tensor:
            none = x.new_empty(0)
            return none if tensor is None else tensor.to(x).clone(memory_format=torch.contiguous_format)

        weights = [own(y) for pair in zip(norms, norm_biases, strict=True) for y in pair]
        weights += [own(y) for y in (head_norms or (None, None))]
        places = [0, *((1, 2) if not joined else ()), 3, 4, *((5,) if gated else ()), 6]
        matrices: list[Tensor | None] = [None] * 7
        added: list[Tensor | None] = [None] * 7
        for place, matrix, bias in zip(places, dense, biases, strict=True):
            matrices[place], added[place] = matrix, bias
        for i in range(7):
            weights += [own(matrices[i]), own(None), own(added[i])]
        keys, values = (own(cache) for cache in caches)
        sizes = [heads, kv_heads, head_dim, joined, int(gated), norm, int(parallel), 0]
        whole = None if mask is None else mask.expand(batch, heads, 1, seen + 1)
        turn: list[Tensor | None] = [*map(own, angles)] if angles else [None, None]
        out = torch.ops.tinyllm.decode_block(
            x.detach(), weights, sizes, keys, values, seen, whole, *turn, activation, 0.3, 1e-5, 1e-3, 1e-4
        )
        return out, keys[:, :, seen], values[:, :, seen]

    def theirs(x: Tensor) -> tuple[Tensor, ...]:
        to: list[list[Any]] = [[None if y is None else y.to(x) for y in group] for group in everything]
        dense, biases, norms, norm_biases, head_norms, angles, caches = to

        def normed(y: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
            if norm == 0:
                return reference.layer_norm(y, y.shape[-1:], weight, bias, eps)
            return reference.rms_norm(y, y.shape[-1:], weight + (norm == 2), eps)

        def layer(index: int, y: Tensor) -> Tensor:
            return torch.nn.functional.linear(y, dense[index], biases[index])

        before = normed(x, norms[0], norm_biases[0], 1e-5)
        if joined == 2:
            split = layer(0, before).view(batch, 1, heads, 3, head_dim).unbind(3)
        elif joined:
            split = layer(0, before).split([queries, pairs, pairs], -1)
        else:
            split = tuple(layer(index, before) for index in range(3))
        query, key, value = (y.reshape(batch, 1, -1, head_dim) for y in split)
        if head_norms:
            query, key = normed(query, head_norms[0], None, 1e-4), normed(key, head_norms[1], None, 1e-4)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        if angles:
            query, key = reference.rotary_embedding(query, key, *angles)
        keys, values = torch.cat([caches[0][:, :, :seen], key], 2), torch.cat([caches[1][:, :, :seen], value], 2)
        attended = reference.scaled_dot_product_attention(query, keys, values, mask, scale=0.3, enable_gqa=True)
        middle = x + layer(len(outputs), attended.transpose(1, 2).reshape(batch, 1, queries))
        inside = normed(x if parallel else middle, norms[1], norm_biases[1], 1e-3)
        first = reference.ACTIVATIONS[activation](layer(len(outputs) + 1, inside))
        if gated:
            first = first * layer(len(outputs) + 2, inside)
        return middle + layer(len(dense) - 1, first), key[:, :, 0], value[:, :, 0]

    return Case(text, ours, theirs, [draw.floats(batch, 1, width)], depth=4, differentiable=False)
