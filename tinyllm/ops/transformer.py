"""transformer and transformer_block: a whole language model, or one block of it, in one call, for sizes at which the
calls of its parts would cost more than the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops import _products
from tinyllm.ops._context import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops._random import draw_rng, dropout_factors
from tinyllm.ops.attention import MOST_HEAD_DIM, scaled_dot_product_attention
from tinyllm.ops.cross_entropy import cross_entropy
from tinyllm.ops.dispatch import Kernels, Limit, Operator, choose, forced_backend, register_fake
from tinyllm.ops.dispatch import serves as dispatch_serves
from tinyllm.ops.embedding import embedding, raise_for_ids
from tinyllm.ops.layer_norm import layer_norm
from tinyllm.ops.linear import feed_forward, linear, products_refuse
from tinyllm.reference import ACTIVATIONS, BLOCK_PARAMETERS

_ONE_HEAD = tuple(name for name in BLOCK_PARAMETERS if name != "out_proj")
_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "none")


def _refuses(operator: str, like: Tensor, rows: int, width: int, hidden: int, num_heads: int) -> str | None:
    if autocast_dtype(like) is not None:
        return "autocast wants some of the parts in another dtype"
    if _products.saved_calls_outweigh(rows * width * hidden):
        return None
    return products_refuse(operator, like, rows)


def _too_wide(like: Tensor, rows: int, width: int, hidden: int, num_heads: int) -> str | None:
    return f"head_dim is {width // num_heads}" if width // num_heads > MOST_HEAD_DIM else None


def _declare(name: str) -> Operator:
    in_parts = "the modules call its parts one by one"
    heads = Limit(f"heads up to {MOST_HEAD_DIM} wide", _too_wide)
    refuses = partial(_refuses, name)
    return Operator(
        name, cpp=Kernels((torch.float32, torch.float64), (heads,)), cuda=in_parts, triton=in_parts, refuses=refuses
    )


_OPERATORS = {name: _declare(name) for name in ("transformer_block", "transformer")}


class Settings(NamedTuple):
    """Arguments of the kernel besides tensors, in its order."""

    num_layers: int
    num_heads: int
    causal: bool
    norm_first: bool
    activation: str
    eps1: float
    eps2: float
    dropout_p: float


def transformer_block(
    input: Tensor,
    parameters: Sequence[Tensor],
    *,
    num_heads: int = 1,
    causal: bool = False,
    norm_first: bool = False,
    activation: str = "relu",
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention and a two-layer network, each on a branch with its norm: see `tinyllm.nn.TransformerBlock`,
    which calls the parts one by one where no kernel serves this, as this does then.

    Args:
        input: (B, T, D).
        parameters: the weights of query, key, value, out_proj (D, D), linear1 (hidden_dim, D), linear2 (D, hidden_dim),
            norm1, norm2 (D), then, if there are biases, those of each in the same order. With one head there is no
            out_proj. All of input's dtype and device.
        num_heads: heads of D / num_heads columns each.
        causal: whether a token sees itself and earlier ones only.
        norm_first: whether to normalise before each branch instead of after each sum.
        activation: "relu", "gelu" (with erf), "gelu_tanh" or "silu".
        eps1, eps2: added to the variance by the two norms.
        dropout_p: probability of dropping an attention weight or an element of a branch, in [0, 1]; applied whenever it
            is above 0.

    Returns:
        (B, T, D), like input.

    Raises:
        ValueError: parameters whose number, shape, dtype or device does not fit, num_heads that does not divide D,
            another activation, dropout_p outside [0, 1].
    """
    settings = Settings(1, num_heads, causal, norm_first, activation, eps1, eps2, dropout_p)
    return _call("transformer_block", input, parameters, None, None, settings)


def transformer(
    input: Tensor,
    parameters: Sequence[Tensor],
    *,
    num_layers: int,
    positions: Tensor | None = None,
    target: Tensor | None = None,
    num_heads: int = 1,
    causal: bool = False,
    norm_first: bool = False,
    activation: str = "relu",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute token embeddings + positions, transformer blocks, the final norm of pre-norm models, and the projection
    to logits; with a target, their mean cross-entropy. See `tinyllm.SimpleLLM`, which calls the parts one by one where
    no kernel serves this, as this does then.

    Args:
        input: ids (B, T), int32 or int64.
        parameters: the embedding's weight (V, D); for each block what `transformer_block` lists; if norm_first, the
            final norm's weight (D) and, where the blocks have biases, its bias; the output's weight (classes, D) and,
            where the blocks have biases, its bias or none. All of one dtype and device.
        num_layers: the number of blocks.
        positions: (T, D), added to every sequence; or None.
        target: the class of each logit row, int64 (B, T); -100 where there is none.
        num_heads, causal, norm_first, activation: as for `transformer_block`, all blocks alike.
        eps: added to the variance by every norm.
        dropout_p: as for `transformer_block`; the embedded input is dropped, too.

    Returns:
        Logits (B, T, classes); with a target, a scalar.

    Raises:
        IndexError: an id, or a target, is out of range.
        TypeError: ids that are neither int32 nor int64, a target that is not int64.
        ValueError: parameters whose number, shape, dtype or device does not fit, num_heads that does not divide D,
            another activation, dropout_p outside [0, 1].
    """
    settings = Settings(num_layers, num_heads, causal, norm_first, activation, eps, eps, dropout_p)
    return _call("transformer", input, parameters, positions, target, settings)


def _call(
    operator: str,
    input: Tensor,
    parameters: Sequence[Tensor],
    positions: Tensor | None,
    target: Tensor | None,
    settings: Settings,
) -> Tensor:
    reason = misfit(operator, input, parameters, positions, settings)
    if reason is None and settings.activation not in _ACTIVATIONS:
        reason = f"activation is {settings.activation!r}; one of {', '.join(_ACTIVATIONS)} is needed"
    if reason is None and not 0.0 <= settings.dropout_p <= 1.0:
        reason = f"dropout_p is {settings.dropout_p}; a probability in [0, 1] is needed"
    if reason is None and target is not None and target.shape != input.shape:
        reason = f"target has shape {list(target.shape)}; it must have input's, {list(input.shape)}"
    if reason is not None:
        raise ValueError(reason)
    if operator == "transformer" and input.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input has dtype {input.dtype}; int64 or int32 is needed")
    if target is not None and target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; int64 is needed")
    if choose(_OPERATORS[operator], parameters[0], *_sizes(operator, input, parameters, settings)) != "reference":
        return run(input, parameters, positions, target, settings)
    if forced_backend(operator) is not None:
        return _by_reference(input, parameters, positions, target, settings)
    if operator == "transformer":
        return _model_by_parts(input, parameters, positions, target, settings)
    return _block_by_parts(input, parameters, settings)


def _by_reference(
    input: Tensor,
    parameters: Sequence[Tensor],
    positions: Tensor | None,
    target: Tensor | None,
    settings: Settings,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    options = settings._asdict() | {"factors": factors}
    if input.is_floating_point():
        del options["num_layers"]
        return reference.transformer_block(input, parameters, **options)
    del options["eps2"]
    eps = options.pop("eps1")
    return reference.transformer(input, parameters, positions=positions, target=target, eps=eps, **options)


def all_factors(input: Tensor, like: Tensor, settings: Settings, rng: Tensor) -> list[Tensor]:
    """Return what the kernel's dropout with this state multiplies by, in the order in which `reference` takes it.

    like: a parameter (..., D), whose dtype is that of the model.
    """
    (batch, tokens), width, kept = input.shape[:2], like.size(-1), 1.0 - settings.dropout_p
    vectors, weights = (batch, tokens, width), (batch, settings.num_heads, tokens, tokens)
    found = []
    for index in range(1 + 3 * settings.num_layers):
        # The embedding's, then of each block the softmax's and both branches'.
        shape = weights if index % 3 == 1 else vectors
        own = torch.stack([rng[0], rng[1] + index])
        factors = dropout_factors("cpp", own, math.prod(shape[:-1]), shape[-1], settings.dropout_p)
        # In the model's own dtype, in which the kernel divides by what is kept.
        found.append((factors != 0).to(like.dtype).div(kept if kept > 0 else 1.0).view(shape))
    return found[1:] if input.is_floating_point() else found


# ---- The parts one by one, each on the backend that serves it


def _block_by_parts(input: Tensor, parameters: Sequence[Tensor], settings: Settings) -> Tensor:
    names, heads = _names(settings), settings.num_heads
    weights = dict(zip(names, parameters, strict=False))
    biases = dict.fromkeys(names) | dict(zip(names, parameters[len(names) :], strict=False))

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[name], biases[name], eps)

    def add_attention(x: Tensor) -> Tensor:
        query, key, value = (
            linear(x, weights[name], biases[name]).unflatten(-1, (heads, -1)).transpose(-2, -3)
            for name in ("query", "key", "value")
        )
        dropout_p = settings.dropout_p
        attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=settings.causal)
        attended = attended.transpose(-2, -3).flatten(-2)
        if heads == 1:
            return input + drop(attended)
        if dropout_p > 0.0:
            return input + drop(linear(attended, weights["out_proj"], biases["out_proj"]))
        return linear(attended, weights["out_proj"], biases["out_proj"], residual=input)

    def add_network(x: Tensor, residual: Tensor) -> Tensor:
        layers = (weights["linear1"], biases["linear1"], weights["linear2"], biases["linear2"])
        if settings.dropout_p > 0.0:
            return residual + drop(feed_forward(x, *layers, activation=settings.activation))
        return feed_forward(x, *layers, activation=settings.activation, residual=residual)

    def drop(x: Tensor) -> Tensor:
        return torch.dropout(x, settings.dropout_p, settings.dropout_p > 0.0)

    if settings.norm_first:
        middle = add_attention(norm("norm1", input, settings.eps1))
        return add_network(norm("norm2", middle, settings.eps2), middle)
    middle = norm("norm1", add_attention(input), settings.eps1)
    return norm("norm2", add_network(middle, middle), settings.eps2)


def _model_by_parts(
    ids: Tensor, parameters: Sequence[Tensor], positions: Tensor | None, target: Tensor | None, settings: Settings
) -> Tensor:
    table, *others = parameters
    without = settings.num_layers * len(_names(settings)) + 1 + settings.norm_first
    copies = 1 + (len(others) > without)  # 2 with biases
    each = copies * len(_names(settings))
    end = settings.num_layers * each
    x = embedding(ids, table, positions=positions, dropout_p=settings.dropout_p)
    for first in range(0, end, each):
        x = _block_by_parts(x, others[first : first + each], settings)
    if settings.norm_first:
        weight, *bias = others[end : end + copies]
        x = layer_norm(x, x.shape[-1:], weight, bias[0] if bias else None, settings.eps1)
        end += copies
    logits = linear(x, *others[end:])
    return logits if target is None else cross_entropy(logits.flatten(0, 1), target.flatten())


# ---- For modules that stand on these operators


def serves(operator: str, input: Tensor, parameters: Sequence[Tensor], settings: Settings) -> bool:
    """Return whether the kernel serves such a call, in which all fits together: else the parts are faster."""
    return dispatch_serves("cpp", _OPERATORS[operator], parameters[0], *_sizes(operator, input, parameters, settings))


def run(
    input: Tensor,
    parameters: Sequence[Tensor],
    positions: Tensor | None,
    target: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Call the kernel, with arguments that fit together and that it serves: `input` are ids, or a block's input."""
    if target is not None:
        target = target.flatten()
    rng = draw_rng(input.device) if settings.dropout_p > 0.0 else None
    try:
        if needs_grad(input, positions, *parameters):
            return record(_Transformer, input, positions, target, settings, rng, *parameters)
        return torch.ops.tinyllm.transformer_fwd(input, parameters, positions, target, *settings, rng, False)[0]
    except (IndexError, RuntimeError, ValueError):
        if not torch.compiler.is_compiling() and not input.is_floating_point():
            raise_for_ids(input, parameters[0].size(0))
        raise


def misfit(
    operator: str, input: Tensor, parameters: Sequence[Tensor], positions: Tensor | None, settings: Settings
) -> str | None:
    """Return what does not fit together, if anything; the modules one by one may still make sense of it."""
    whole = operator == "transformer"
    if input.dim() != (2 if whole else 3):
        return f"input has shape {list(input.shape)}; {'(B, T)' if whole else '(B, T, D)'} is needed"
    if whole and (not parameters or parameters[0].dim() != 2):
        return "parameters: the first is the embedding's weight; (V, D) is needed"
    like = parameters[0] if whole else input
    width = like.size(-1)
    if settings.num_heads < 1 or width % settings.num_heads:
        return f"num_heads is {settings.num_heads}; it must be a divisor of D, {width}"
    if input.device != like.device:
        return f"input is on {input.device}; it must be on the parameters' device, {like.device}"
    without = settings.num_layers * len(_names(settings)) + whole * (1 + settings.norm_first)
    plain, biased = whole + without, whole + 2 * without
    bias = len(parameters) != plain  # of the blocks; the output may lack one
    if len(parameters) not in (plain, biased - whole, biased):
        but = f", {biased - 1} with all but the output's," if whole else ","
        return f"parameters has {len(parameters)} tensors; {plain}, or {biased} with biases{but} are needed"
    expected = _expected(like, parameters, settings, whole, bias, len(parameters) == biased)
    found: list[Tensor] = [*parameters]
    if positions is not None:
        expected.append((("positions",), (input.size(1), width)))
        found.append(positions)
    for tensor, (name, shape) in zip(found, expected, strict=True):
        if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
            has = f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            return f"{''.join(name)} is {has}; {list(shape)}, {like.dtype} on {like.device}, is needed"
    return None


def _names(settings: Settings) -> tuple[str, ...]:
    return BLOCK_PARAMETERS if settings.num_heads > 1 else _ONE_HEAD


def _hidden(parameters: Sequence[Tensor], settings: Settings, first: int) -> int:
    """Return the hidden_dim of the block whose parameters begin at `first`: linear1's first size."""
    return _rows(parameters[first + len(_names(settings)) - 4])


def _rows(tensor: Tensor) -> int:
    return tensor.size(0) if tensor.dim() > 0 else 0


def _expected(
    like: Tensor, parameters: Sequence[Tensor], settings: Settings, whole: bool, bias: bool, output_bias: bool
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return the name, in pieces, and the shape that each parameter must have."""
    width, parts = like.size(-1), ("'s weight", "'s bias")[: 1 + bias]
    found: list[tuple[tuple[str, ...], tuple[int, ...]]] = [(("",), (like.size(0), width))] if whole else []
    for block in range(settings.num_layers):
        hidden = _hidden(parameters, settings, len(found))
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_names(settings), (width, width))
        shapes |= {"linear1": (hidden, width), "linear2": (width, hidden), "norm1": (width,), "norm2": (width,)}
        prefix = f"block {block}: parameters: " if whole else "parameters: "
        for part in parts:
            found += [
                ((prefix, name, part), shape if part == parts[0] else shape[:1]) for name, shape in shapes.items()
            ]
    if whole:
        output = parts[: 1 + output_bias]
        classes = _rows(parameters[len(parameters) - len(output)])
        if settings.norm_first:
            found += [(("parameters: the final norm", part), (width,)) for part in parts]
        shapes = {"'s weight": (classes, width), "'s bias": (classes,)}
        found += [(("parameters: the output", part), shapes[part]) for part in output]
    return found


def _sizes(operator: str, input: Tensor, parameters: Sequence[Tensor], settings: Settings) -> tuple[int, ...]:
    """Return what the limits look at: rows, width, hidden_dim, num_heads."""
    hidden = _hidden(parameters, settings, operator == "transformer") if settings.num_layers > 0 else 0
    return input.size(0) * input.size(1), parameters[0].size(1), hidden, settings.num_heads


# ---- Autograd


class _Transformer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        positions: Tensor | None,
        target: Tensor | None,
        settings: Settings,
        rng: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        out, saved = torch.ops.tinyllm.transformer_fwd(input, parameters, positions, target, *settings, rng, True)
        ctx.save_for_backward(input, positions, target, rng, saved, *parameters)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, positions, target, rng, saved, *parameters = ctx.saved_tensors
        block = input.is_floating_point()
        wanted = ctx.needs_input_grad
        want_added = wanted[0 if block else 1]
        if differs_from_kernels(grad):
            factors = None if rng is None else all_factors(input, parameters[0], ctx.settings, rng)

            def function(added: Tensor, *parameters: Tensor) -> Tensor:
                x, positions = (added, None) if block else (input, added)
                return _by_reference(x, parameters, positions, target, ctx.settings, factors)

            grad_added, *found = grads_by_reference(
                function, (input if block else positions, *parameters), (want_added, *wanted[5:]), (grad,)
            )
        else:
            found, grad_added = torch.ops.tinyllm.transformer_bwd(
                grad, input, parameters, positions, target, saved, *ctx.settings, rng, want_added
            )
            if not all(wanted[5:]):
                found = [grad if want else None for grad, want in zip(found, wanted[5:], strict=True)]
        grad_added = grad_added if want_added else None
        return *((grad_added, None) if block else (None, grad_added)), None, None, None, *found


@register_fake("transformer_fwd")
def _(input, parameters, positions, target, num_layers, num_heads, causal, norm_first, activation, *others):  # type: ignore[no-untyped-def]
    first, save = parameters[0], others[-1]
    (batch, tokens), width, whole = input.shape[:2], first.size(1), not input.is_floating_point()
    squares, rows = 4 if num_heads > 1 else 3, batch * tokens
    bias = len(parameters) - whole > num_layers * (squares + 4) + whole * (1 + norm_first)
    classes = parameters[-1].size(0)  # of the output's bias, or of its weight
    size = 0
    if save:  # the numbers that csrc/cpu/transformer.cpp keeps for backward
        streams = num_layers + (1 if whole else -1)
        size = rows * (streams * width + (width + 2 if whole and norm_first else 0))
        size += 0 if target is None else rows * classes
        for i in range(num_layers):
            hidden = parameters[whole + i * (squares + 4) * (1 + bias) + squares].size(0)
            size += rows * (7 * width + (1 if activation == "relu" else 2) * hidden + num_heads + 4)
    shape = () if target is not None else (batch, tokens, classes if whole else width)
    return first.new_empty(shape), first.new_empty(size)


@register_fake("transformer_bwd")
def _(grad, input, parameters, positions, target, saved, *settings):  # type: ignore[no-untyped-def]
    shape = input.shape if input.is_floating_point() else (input.size(1), parameters[0].size(1))
    if not settings[-1]:
        shape = (0,)
    return [p.new_empty(p.shape) for p in parameters], parameters[0].new_empty(shape)
