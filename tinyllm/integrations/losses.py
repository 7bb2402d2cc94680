"""The losses of transformers' language models on our cross-entropy, as a model's own `loss_function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import ops

Loss = Callable[..., Tensor]


def causal_lm(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute transformers' ForCausalLMLoss: logits (B, T, V) against the labels (B, T) of the tokens that follow.

    The mean, or with num_items_in_batch the sum divided by that.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return masked_lm(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """Compute transformers' ForMaskedLMLoss: logits (B, T, V) against labels (B, T)."""
    rows, target = logits.float().view(-1, vocab_size), labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return ops.cross_entropy(rows, target, ignore_index=ignore_index)
    total = ops.cross_entropy(rows, target, ignore_index=ignore_index, reduction="sum")
    items = num_items_in_batch
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def loss_of(model: nn.Module) -> Loss | None:
    """Return what replaces a model's `loss_function`; None where it has none that we compute."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if not isinstance(model, PreTrainedModel) or "loss_function" not in getattr(code, "co_names", ()):
        return None
    if "_loss_function" in model.__dict__:  # one that somebody has set
        return None
    mapping: dict[Any, Any] = LOSS_MAPPING
    theirs = mapping.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    known: dict[Any, Loss] = {ForCausalLMLoss: causal_lm, ForMaskedLMLoss: masked_lm}
    ours = known.get(theirs)
    return ours if ours is not None and _agree(ours, theirs) else None


def _agree(ours: Loss, theirs: Loss) -> bool:
    """Return whether both losses, of random logits, are the same, as they are in the versions that we know."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[0, :2] = -100
    for options in ({}, {"num_items_in_batch": 3}):
        try:
            expected = theirs(logits, labels, 7, **options)
        except Exception:  # whatever another version makes of these arguments
            return False
        if not torch.allclose(ours(logits, labels, 7, **options), expected, rtol=1e-5, atol=1e-6):
            return False
    return True
