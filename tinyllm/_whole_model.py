"""A SimpleLLM whose modules are all unchanged, run as the one operator `ops.transformer`.

Looking at every module at every call would take longer than a small model does. `WholeModel.of` looks once and notes
what it saw; `holds` compares that with what is there now, in a few microseconds.
"""

from __future__ import annotations

import operator
from itertools import chain, repeat
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tinyllm import ops
from tinyllm.nn import (
    PLAIN_TENSORS,
    LayerNorm,
    SelfAttention,
    TransformerBlock,
    has_hooks,
    is_plain_linear,
    plain_embedding,
)

if TYPE_CHECKING:
    from tinyllm.model import SimpleLLM

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# What a module computes depends on these, besides its parameters and the modules in it.
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Dropout: ("p", "training"),
    nn.Embedding: ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"),
    nn.GELU: ("approximate",),
    LayerNorm: ("eps",),
    SelfAttention: ("num_heads", "causal", "dropout", "training"),
    TransformerBlock: ("norm_first", "activation"),
}


class WholeModel:
    """The operands and settings of `ops.transformer` for one model, which is not itself kept alive.

    Attributes:
        work: multiplications for each token, those of attention's scores left out.
    """

    def __init__(self, model: SimpleLLM, parameters: list[Tensor], settings: ops.TransformerSettings) -> None:
        self.work = sum(parameter.numel() for parameter in parameters[1:])
        self._settings = settings
        self._operands = parameters
        self._encoding = model.positional_encoding
        self._children = [*model._modules.values()]
        modules = [module for child in self._children if child is not None for module in child.modules()]
        self._modules = modules
        self._types = [*map(type, modules)]
        self._states = [module.__dict__ for module in modules]
        self._hooks = [getattr(module, name) for module in modules for name in _HOOKS]
        self._inner = [(module._modules, [*module._modules.values()]) for module in modules if module._modules]
        self._settled = [(module.__dict__, name) for module in modules for name in _ATTRIBUTES.get(type(module), ())]
        self._attributes = self._all_attributes()
        self._parameters = [module._parameters for module in modules]
        self._found = self._all_parameters()

    @classmethod
    def of(cls, model: SimpleLLM) -> WholeModel | None:
        """None where some module must be called by itself."""
        dropout, blocks, norm, output = model.dropout, model.transformer_blocks, model.final_norm, model.output
        if type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0) or type(blocks) is not nn.Sequential:
            return None
        table = plain_embedding(model.embedding, model.positional_encoding)
        if table is None or table.padding_idx is not None or table.max_norm is not None:
            return None
        if table.scale_grad_by_freq or table.sparse or has_hooks(dropout, blocks):
            return None
        parameters: list[Tensor] = [table.weight]
        settings, eps = set(), set()
        for block in blocks:
            plain = type(block) is TransformerBlock and not has_hooks(block)
            found = cast(TransformerBlock, block).plain_parameters() if plain else None
            if found is None:
                return None
            block = cast(TransformerBlock, block)
            parameters += found
            settings.add((block.attention.num_heads, block.attention.causal, block.norm_first, block.activation))
            eps |= {block.norm1.eps, block.norm2.eps}
        if norm is not None:
            if type(norm) is not LayerNorm or has_hooks(norm):
                return None
            parameters += [parameter for parameter in (norm.weight, norm.bias) if parameter is not None]
            eps.add(norm.eps)
        if not is_plain_linear(output):
            return None
        parameters += [parameter for parameter in (output.weight, output.bias) if parameter is not None]
        plain_tensors = all(type(p) in PLAIN_TENSORS for p in (*parameters, *model.positional_encoding.parameters()))
        if len(settings) != 1 or len(eps) != 1 or not plain_tensors:
            return None  # no layers: there is nothing to gain
        ((num_heads, causal, norm_first, activation),) = settings
        ids = torch.empty((1, 0), dtype=torch.int64, device=table.weight.device)
        misfit = ops.transformer_misfit(ids, parameters, len(blocks), None, num_heads, norm_first)
        if misfit is not None or norm_first != (norm is not None):
            return None
        return cls(model, parameters, (len(blocks), num_heads, causal, norm_first, activation, eps.pop()))

    def holds(self, model: SimpleLLM) -> bool:
        """Whether the model is still made as it was when this was."""
        found = self._all_parameters()
        return (
            [*model._modules.values()] == self._children
            and not any(self._hooks)
            and [*map(type, self._modules)] == self._types
            and all([*now.values()] == then for now, then in self._inner)
            and not any(map(dict.__contains__, self._states, repeat("forward")))
            and self._all_attributes() == self._attributes
            and len(found) == len(self._found)
            and all(map(operator.is_, found, self._found))
            and not _has_any_global_hook()
        )

    def _all_attributes(self) -> list[object]:
        return [state[name] for state, name in self._settled]

    def _all_parameters(self) -> list[Tensor | None]:
        return [*chain.from_iterable([parameters.values() for parameters in self._parameters])]

    def run(self, ids: Tensor, target: Tensor | None) -> Tensor | None:
        """Logits, or the loss; None where no kernel serves the call, or would do work that nobody wants."""
        operands = self._operands
        if torch.is_grad_enabled():
            # Gradients that some parameters do not want would be computed all the same.
            wanted = [parameter.requires_grad for parameter in operands]
            if any(wanted) and not all(wanted):
                return None
        positions = self._encoding.rows(ids.size(1))
        # Positions are a buffer, or a parameter outside the list: nothing says that they were converted with the rest.
        for tensor in (ids, positions):
            if tensor.device != operands[0].device:
                return None
        if positions.dtype != operands[0].dtype or not ops.serves_transformer(ids, operands, *self._settings[:2]):
            return None
        return ops.run_transformer(ids, operands, positions, target, self._settings)
