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
