"""transformer_block: a whole block in one call, where the calls between its parts would cost more than the parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops._context import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad
from tinyllm.ops.attention import MOST_HEAD_DIM
from tinyllm.ops.dispatch import Kernels, Limit, Operator, choose, register_fake, serves
from tinyllm.ops.linear import products_refuse
from tinyllm.reference import BLOCK_PARAMETERS

_ONE_HEAD = tuple(name for name in BLOCK_PARAMETERS if name != "out_proj")

# Below so many multiplications the calls saved outweigh whatever PyTorch's products are faster by.
_SMALL = 4_000_000


def _refuses(operator: str, like: Tensor, rows: int, width: int, hidden: int, num_heads: int) -> str | None:
    if autocast_dtype(like.device.type) is not None:
        return "autocast wants some of the parts in another dtype"
    return None if rows * width * hidden <= _SMALL else products_refuse(operator, like)


def _too_wide(like: Tensor, rows: int, width: int, hidden: int, num_heads: int) -> str | None:
    return f"head_dim is {width // num_heads}" if width // num_heads > MOST_HEAD_DIM else None


def declare(name: str) -> Operator:
    """Declare an operator of blocks, whose limits look at rows, width, hidden_dim and num_heads."""
    in_parts = "its parts are served one by one"
    heads = Limit(f"heads up to {MOST_HEAD_DIM} wide", _too_wide)
    return Operator(
        name,
        cpp=Kernels((torch.float32, torch.float64), (heads,)),
        cuda=in_parts,
        triton=in_parts,
        refuses=partial(_refuses, name),
    )


TRANSFORMER_BLOCK = declare("transformer_block")


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
) -> Tensor:
    """Attention and a two-layer network, each on a branch with its norm: see `tinyllm.nn.TransformerBlock`.

    Args:
        input: (B, T, D).
        parameters: the weights of query, key, value, out_proj (D, D), linear1 (hidden_dim, D), linear2 (D, hidden_dim),
            norm1, norm2 (D), then, if there are biases, those of each in the same order. With one head there is no
            out_proj. All of input's dtype and device.
        num_heads: of D / num_heads columns each.
        causal: a token sees itself and earlier ones only.
        norm_first: normalise before each branch instead of after each sum.
        activation: "relu" or "gelu".
        eps1, eps2: of the two norms.

    Returns:
        (B, T, D), like input.

    Raises:
        ValueError: parameters whose number, shape, dtype or device does not fit, num_heads that does not divide D,
            another activation.
    """
    misfit = block_misfit(input, parameters, num_heads)
    if misfit is None and activation not in ("relu", "gelu"):
        misfit = f"activation is {activation!r}; relu or gelu is needed"
    if misfit is not None:
        raise ValueError(misfit)
    settings = (num_heads, causal, norm_first, activation)
    if choose(TRANSFORMER_BLOCK, input, *_sizes(input, parameters, num_heads)) == "reference":
        from tinyllm import ops

        return reference.transformer_block(  # its parts, each on its best backend
            input,
            parameters,
            num_heads=num_heads,
            causal=causal,
            norm_first=norm_first,
            activation=activation,
            eps1=eps1,
            eps2=eps2,
            functions=ops,
        )
    if needs_grad(input, *parameters):
        return _TransformerBlock.apply(input, settings, eps1, eps2, *parameters)
    return torch.ops.tinyllm.transformer_block_fwd(input, parameters, *settings, eps1, eps2, False)[0]


def serves_block(input: Tensor, parameters: Sequence[Tensor], num_heads: int) -> bool:
    """Whether a kernel takes such a block; otherwise it is faster in parts, each on its best backend."""
    return block_misfit(input, parameters, num_heads) is None and serves(
        "cpp", TRANSFORMER_BLOCK, input, *_sizes(input, parameters, num_heads)
    )


def block_misfit(input: Tensor, parameters: Sequence[Tensor], num_heads: int) -> str | None:
    """What does not fit together, if anything; the module-by-module path may still make sense of it."""
    if input.dim() != 3:
        return f"input has shape {list(input.shape)}; (B, T, D) is needed"
    width = input.size(-1)
    if num_heads < 1 or width % num_heads:
        return f"num_heads is {num_heads}; it must be a divisor of D, {width}"
    names = BLOCK_PARAMETERS if num_heads > 1 else _ONE_HEAD
    count = len(names)
    if len(parameters) not in (count, 2 * count):
        return f"parameters has {len(parameters)} tensors; {count}, or {2 * count} with biases, are needed"
    hidden = parameters[count - 4].size(0) if parameters[count - 4].dim() > 0 else 0
    shapes: list[tuple[int, ...]] = [(width, width)] * (count - 4)
    shapes += [(hidden, width), (width, hidden), (width,), (width,)]
    shapes += [shape[:1] for shape in shapes]
    dtype, device = input.dtype, input.device
    for i, (parameter, shape) in enumerate(zip(parameters, shapes, strict=False)):
        if parameter.shape != shape or parameter.dtype != dtype or parameter.device != device:
            name = f"parameters: {names[i % count]}'s {'weight' if i < count else 'bias'}"
            has = f"{list(parameter.shape)}, {parameter.dtype} on {parameter.device}"
            return f"{name} is {has}; {list(shape)}, {dtype} on {device}, is needed"
    return None


def _sizes(input: Tensor, parameters: Sequence[Tensor], num_heads: int) -> tuple[int, int, int, int]:
    """Return what the limits look at: rows, width, hidden_dim, num_heads."""
    width, hidden = input.size(-1), parameters[4 if num_heads > 1 else 3].size(0)
    return input.numel() // max(1, width), width, hidden, num_heads


class _TransformerBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, settings: tuple[int, bool, bool, str], eps1: float, eps2: float, *parameters: Tensor
    ) -> Tensor:
        out, saved = torch.ops.tinyllm.transformer_block_fwd(input, parameters, *settings, eps1, eps2, True)
        ctx.save_for_backward(input, saved, *parameters)
        ctx.settings, ctx.eps = settings, (eps1, eps2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, saved, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if differs_from_kernels(grad):
            names = ("num_heads", "causal", "norm_first", "activation", "eps1", "eps2")
            settings = dict(zip(names, (*ctx.settings, *ctx.eps), strict=True))
            found = grads_by_reference(
                lambda x, *p: reference.transformer_block(x, p, **settings),
                (input, *parameters),
                (wanted[0], *wanted[4:]),
                (grad,),
            )
            return found[0], None, None, None, *found[1:]
        grad_input, grads = torch.ops.tinyllm.transformer_block_bwd(grad, input, parameters, saved, *ctx.settings)
        found = [grad if want else None for grad, want in zip(grads, wanted[4:], strict=True)]
        return grad_input if wanted[0] else None, None, None, None, *found


def saved_by_block(width: int, hidden: int, num_heads: int, activation: str) -> int:
    """The numbers that csrc/cpu/transformer_block.h keeps for backward, for each token."""
    return 7 * width + (1 if activation == "relu" else 2) * hidden + num_heads + 4


@register_fake("transformer_block_fwd")
def _(input, parameters, num_heads, causal, norm_first, activation, eps1, eps2, save):  # type: ignore[no-untyped-def]
    batch, tokens, width = input.shape
    hidden = parameters[4 if num_heads > 1 else 3].size(0)
    size = batch * tokens * saved_by_block(width, hidden, num_heads, activation) if save else 0
    return input.new_empty(input.shape), input.new_empty(size)


@register_fake("transformer_block_bwd")
def _(grad, input, parameters, saved, num_heads, causal, norm_first, activation):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), [p.new_empty(p.shape) for p in parameters]
