"""Attention for the models of transformers, registered there under the name "tinyllm" when this module is imported."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tinyllm import ops
from tinyllm.integrations.parts import NAME

_SERVED = ("sdpa",)  # whose masks are those that we take


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' attention functions do, with the masks of its `sdpa_mask`.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None and there is no mask.
        query: (B, H, T, D), any strides.
        key, value: (B, Hkv, S, D), where Hkv divides H.
        attention_mask: (B or 1, H or 1, T, S): bool, True where a key takes part; or floating, added to the scores.
        dropout: probability of dropping an attention weight.
        scaling: of the scores; default 1 / sqrt(D).
        is_causal: hide later keys, where there is no mask.
        position_bias: broadcastable to (B, H, T, S), added to the scores.

    Returns:
        (B, T, H, D), contiguous; and None, as the attention weights are never stored.

    Raises:
        ValueError: what is computed otherwise is asked for: a soft cap, attention sinks.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is given; attn_implementation='tinyllm' has none, 'eager' does")
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; 4 dimensions are needed")
    queries, keys = query.size(2), key.size(2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = queries > 1 and attention_mask is None and causal
    if causal and keys > queries:  # a cache of a fixed length, of which the first tokens have just been filled
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, query.dtype):
        attention_mask = attention_mask.to(query.dtype)
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias.to(query.dtype))
    out = ops.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=query.size(1) != key.size(1),
    )
    return out.transpose(1, 2).contiguous(), None


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without one, masks would be dropped


class PrivateConfig:
    """The config of one module, which asks for our attention where the model's config asks for PyTorch's.

    The model's own is shared by all its modules, and maybe with other models, so it stays as it is: it says which masks
    are made, and what is saved. Changes there are seen here.
    """

    def __init__(self, config: Any) -> None:
        self._shared = config

    def __getattr__(self, name: str) -> Any:
        if name == "_shared":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._shared, name)

    @property
    def _attn_implementation(self) -> str:
        current: str = self._shared._attn_implementation
        return NAME if current in _SERVED else current


def private_config(module: nn.Module) -> PrivateConfig | str | None:
    """Return the config that has a module's attention computed by `attention`; the reason why it is left although it
    takes such functions, or None where it does not."""
    config = module.__dict__.get("config")
    if config is None or not _takes_functions(module):
        return None
    current = getattr(config, "_attn_implementation", None)
    if current == NAME:
        return "its config asks for it already"
    if hasattr(module, "sinks") or getattr(module, "attn_logit_softcapping", None) is not None:
        return "its scores have sinks or a soft cap"
    if current not in _SERVED:
        return f"its attn_implementation is {current!r}; {' or '.join(map(repr, _SERVED))} is needed"
    return PrivateConfig(config)


def _takes_functions(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())
