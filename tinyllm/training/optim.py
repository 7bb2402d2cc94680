"""The optimizer and what goes with it: decay groups, learning-rate schedules, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinyllm.config.training import TrainConfig
from tinyllm.optim import AdamW
from tinyllm.training.muon import Muon


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return what `config.optimizer` names: AdamW, or Muon for the blocks' matrices and AdamW for all else."""
    if config.optimizer == "adamw":
        return adamw(model, config)
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if "transformer_blocks." in name and parameter.dim() == 2 and parameter.requires_grad
    ]
    rest = adamw(model, config, without=matrices)
    if not matrices:
        return rest
    return Muon(matrices, rest, lr=config.lr, weight_decay=config.weight_decay, momentum=config.beta1)


def adamw(model: nn.Module, config: TrainConfig, without: Collection[Tensor] = ()) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) in two groups: weight decay for matrices, none for biases and norms.

    Parameters that are in `without` are another optimizer's.
    """
    others = {id(parameter) for parameter in without}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of step 1 .. steps: a linear warmup to `lr`, then what `config.schedule` says.

    "cosine" and "linear" fall to `min_lr_ratio * lr` at the last step; "constant" stays; "wsd" (warmup, stable, decay;
    Hu et al. 2024) stays and falls linearly in the last `decay_fraction` of the steps.
    """
    warmup = config.warmup
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, config.steps - round(config.steps * config.decay_fraction))
    done = min(1.0, max(0, step - start) / max(1, config.steps - start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class AveragedWeights:
    """An exponential moving average of a model's weights, kept beside it (Polyak averaging, as in Tarvainen 2017).

    After t updates the decay is at most (1 + t) / (10 + t), so that the first, random weights are forgotten early.

    Args:
        model: on its device, sharded if it will be: the averages lie as its weights do.
        decay: how much of the average an update keeps, in [0, 1).

    Attributes:
        averages: name -> average, for each parameter.
        updates: how many there were.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = dict(model.named_parameters())
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the weights as they are now."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the averages within; afterwards it has its own weights, bit for bit."""
        own = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._set(list(self.averages.values()))
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)
