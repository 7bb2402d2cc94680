"""The choice among decoders."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import nn

from tinyllm.generation.cuda_graph import GraphedCache
from tinyllm.generation.decoder import Cached, Decoder, Recompute, check_cache_dtype
from tinyllm.generation.engine import Engine
from tinyllm.model import SimpleLLM


def make_decoder(model: nn.Module, batch_size: int, max_len: int, *, cache_dtype: torch.dtype | None = None) -> Decoder:
    """Return the fastest decoder that serves a model.

    Args:
        model: a SimpleLLM, or anything that `Recompute` takes.
        batch_size: how many sequences are written together.
        max_len: how long they get at most, the prompt included; above the model's max_seq_len it counts as that.
        cache_dtype: see `Cached` and `Engine`.

    For a SimpleLLM that is not causal, as the article's is, a warning says once a process that nothing can be kept.

    Raises:
        ValueError: cache_dtype is no floating dtype.
    """
    check_cache_dtype(cache_dtype)
    # In order of speed: the first that serves the model is taken.
    if cache_dtype in (None, torch.float32, torch.bfloat16) and not isinstance(found := Engine.operands(model), str):
        model = cast(SimpleLLM, model)
        length = min(max_len, model.config.max_seq_len)
        return Engine(model, batch_size, length, cache_dtype=cache_dtype, operands=found)
    if Cached.refuses(model) is None:
        model = cast(SimpleLLM, model)
        kind = GraphedCache if next(model.parameters()).is_cuda else Cached
        return kind(model, batch_size, min(max_len, model.config.max_seq_len), cache_dtype=cache_dtype)
    if isinstance(model, SimpleLLM) and not model.config.causal:
        _warn_once()
    return Recompute(model, batch_size)


_has_warned = False


def _warn_once() -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            "the model is not causal: each new token changes what it makes of the whole text, which is therefore "
            "computed again for each one. A model made with causal=True writes much faster",
            stacklevel=3,
        )
