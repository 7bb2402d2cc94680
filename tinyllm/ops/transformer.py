"""transformer: a whole language model in one call, for models so small that Python between the blocks costs most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops._context import differs_from_kernels, grads_by_reference, needs_grad
from tinyllm.ops.dispatch import choose, register_fake, serves
from tinyllm.ops.embedding import raise_for_ids
from tinyllm.ops.transformer_block import block_misfit, declare, saved_by_block
from tinyllm.reference import split_transformer_parameters

TRANSFORMER = declare("transformer")


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
) -> Tensor:
    """Token embeddings + positions, transformer blocks, the final norm of pre-norm models, and the projection to
    logits; with a target, their mean cross-entropy.

    Args:
        input: ids (B, T), int32 or int64.
        parameters: the embedding's weight (V, D); for each block what `transformer_block` lists; if norm_first, the
            final norm's weight (D) and, where the blocks have biases, its bias; the output's weight (classes, D) and,
            where the blocks have biases, its bias. All of one dtype and device.
        num_layers: how many blocks.
        positions: (T, D), added to every sequence; or None.
        target: the class of each logit row, int64 (B, T); -100 where there is none.
        num_heads, causal, norm_first, activation: as for `transformer_block`, all blocks alike.
        eps: of every norm.

    Returns:
        Logits (B, T, classes); with a target, a scalar.

    Raises:
        IndexError: an id, or a target, is out of range.
        TypeError: ids that are neither int32 nor int64, a target that is not int64.
        ValueError: parameters whose number, shape, dtype or device does not fit, num_heads that does not divide D,
            another activation.
    """
    misfit = transformer_misfit(input, parameters, num_layers, positions, num_heads, norm_first)
    if misfit is None and activation not in ("relu", "gelu"):
        misfit = f"activation is {activation!r}; relu or gelu is needed"
    if misfit is None and target is not None and target.shape != input.shape:
        misfit = f"target has shape {list(target.shape)}; it must have input's, {list(input.shape)}"
    if misfit is not None:
        raise ValueError(misfit)
    if input.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input has dtype {input.dtype}; int64 or int32 is needed")
    if target is not None and target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; int64 is needed")
    settings = (num_layers, num_heads, causal, norm_first, activation, eps)
    if choose(TRANSFORMER, parameters[0], *_sizes(input, parameters, num_layers, num_heads)) == "reference":
        from tinyllm import ops

        return reference.transformer(
            input, parameters, positions=positions, target=target, functions=ops, **_named(settings)
        )
    return run_transformer(input, parameters, positions, target, settings)


# num_layers, num_heads, causal, norm_first, activation, eps
TransformerSettings = tuple[int, int, bool, bool, str, float]


def _named(settings: TransformerSettings) -> dict[str, Any]:
    return dict(zip(("num_layers", "num_heads", "causal", "norm_first", "activation", "eps"), settings, strict=True))


def run_transformer(
    input: Tensor,
    parameters: Sequence[Tensor],
    positions: Tensor | None,
    target: Tensor | None,
    settings: TransformerSettings,
) -> Tensor:
    """The kernel, for arguments that fit together and that it serves; `settings`: num_layers and on, as above."""
    if target is not None:
        target = target.flatten()
    if needs_grad(*parameters, positions):
        call = lambda: _Transformer.apply(input, positions, target, settings, *parameters)  # noqa: E731
    else:
        call = lambda: torch.ops.tinyllm.transformer_fwd(  # noqa: E731
            input, parameters, positions, target, *settings, False
        )[0]
    if torch.compiler.is_compiling():
        return call()
    try:
        return call()
    except (IndexError, RuntimeError, ValueError):
        raise_for_ids(input, parameters[0].size(0))
        raise


def serves_transformer(input: Tensor, parameters: Sequence[Tensor], num_layers: int, num_heads: int) -> bool:
    """Whether a kernel takes such a model, its parameters fitting together."""
    return serves("cpp", TRANSFORMER, parameters[0], *_sizes(input, parameters, num_layers, num_heads))


def transformer_misfit(
    input: Tensor,
    parameters: Sequence[Tensor],
    num_layers: int,
    positions: Tensor | None,
    num_heads: int,
    norm_first: bool,
) -> str | None:
    """What does not fit together, if anything."""
    if input.dim() != 2:
        return f"input has shape {list(input.shape)}; (B, T) is needed"
    if not parameters or parameters[0].dim() != 2:
        return "parameters: the first is the embedding's weight; (V, D) is needed"
    parts = split_transformer_parameters(parameters, num_layers, num_heads, norm_first)
    if isinstance(parts, str):
        return parts
    table, blocks, norm, output = parts
    width, dtype, device = table.size(1), table.dtype, table.device
    if input.device != device:
        return f"input is on {input.device}; it must be on the parameters' device, {device}"
    like = table.new_empty((0, 0, width))
    for i, block in enumerate(blocks):
        misfit = block_misfit(like, block, num_heads)
        if misfit is not None:
            return f"block {i}: {misfit}"
    classes = output[0].size(0) if output[0].dim() > 0 else 0
    named: list[tuple[str, Tensor, tuple[int, ...]]] = []
    for name, tensors, first in (("the final norm", norm, (width,)), ("the output", output, (classes, width))):
        shapes = (first, first[:1])
        named += [
            (f"parameters: {name}'s {part}", tensor, shape)
            for part, tensor, shape in zip(("weight", "bias"), tensors, shapes, strict=False)
        ]
    if positions is not None:
        named.append(("positions", positions, (input.size(1), width)))
    for name, tensor, shape in named:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            has = f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            return f"{name} is {has}; {list(shape)}, {dtype} on {device}, is needed"
    return None


def _sizes(input: Tensor, parameters: Sequence[Tensor], num_layers: int, num_heads: int) -> tuple[int, int, int, int]:
    hidden = parameters[1 + (4 if num_heads > 1 else 3)].size(0) if num_layers > 0 else 0
    return input.numel(), parameters[0].size(1), hidden, num_heads


class _Transformer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        positions: Tensor | None,
        target: Tensor | None,
        settings: TransformerSettings,
        *parameters: Tensor,
    ) -> Tensor:
        out, saved = torch.ops.tinyllm.transformer_fwd(input, parameters, positions, target, *settings, True)
        ctx.save_for_backward(input, positions, target, saved, *parameters)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, positions, target, saved, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if differs_from_kernels(grad):
            found = grads_by_reference(
                lambda added, *p: reference.transformer(
                    input,
                    p,
                    positions=added,
                    target=None if target is None else target.view(input.shape),
                    **_named(ctx.settings),
                ),
                (positions, *parameters),
                (wanted[1], *wanted[4:]),
                (grad,),
            )
            return None, found[0], None, None, *found[1:]
        found, grad_positions = torch.ops.tinyllm.transformer_bwd(
            grad, input, parameters, positions, target, saved, *ctx.settings, wanted[1]
        )
        if not all(wanted[4:]):
            found = [grad if want else None for grad, want in zip(found, wanted[4:], strict=True)]
        return None, grad_positions if wanted[1] else None, None, None, *found


@register_fake("transformer_fwd")
def _(input, parameters, positions, target, num_layers, num_heads, causal, norm_first, activation, eps, save):  # type: ignore[no-untyped-def]
    table, *others = parameters
    bias = len(parameters) % 2 == 1 and others[-1].dim() == 1
    output = others[-2 if bias else -1]
    batch, tokens = input.shape
    rows, width, size = batch * tokens, table.size(1), 0
    if save:  # the numbers that csrc/cpu/transformer.cpp keeps for backward
        size = (num_layers + 1) * rows * width + (rows * (width + 2) if norm_first else 0)
        each = (len(others) - (1 + norm_first) * (1 + bias)) // max(1, num_layers)
        for i in range(num_layers):
            hidden = others[i * each + (4 if num_heads > 1 else 3)].size(0)
            size += rows * saved_by_block(width, hidden, num_heads, activation)
        size += 0 if target is None else rows * output.size(0)
    shape = () if target is not None else (batch, tokens, output.size(0))
    return table.new_empty(shape), table.new_empty(size)


@register_fake("transformer_bwd")
def _(grad, input, parameters, positions, target, saved, *settings):  # type: ignore[no-untyped-def]
    table, positions_grad = parameters[0], settings[-1]
    shape = (input.size(1), table.size(1)) if positions_grad else (0,)
    return [p.new_empty(p.shape) for p in parameters], table.new_empty(shape)
