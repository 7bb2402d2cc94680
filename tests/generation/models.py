"""Stand-ins for models, which say what is drawn, and small models that write."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.model import SimpleLLM

VOCAB = 11


def small_model(**changes: Any) -> SimpleLLM:
    """Return a random causal model of VOCAB ids, whose logits are far enough apart for greedy texts to be the same
    whichever way they are computed."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_heads": 2, "causal": True, "max_seq_len": 24, "position": "learned", **changes}
    return SimpleLLM(VOCAB, 16, 32, 2, **options).eval()


class Scripted(nn.Module):
    """Stands in for a model: certain of a given next token, and remembers what it was shown."""

    def __init__(self, script: list[int], vocab_size: int, max_seq_len: int = 64) -> None:
        super().__init__()
        self.config = SimpleLLMConfig(vocab_size, 1, 1, 1, max_seq_len=max_seq_len)
        self.weight = nn.Parameter(torch.zeros(()))
        self.script = iter(script)
        self.shown: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.shown.append(ids)
        logits = torch.full((*ids.shape, self.config.vocab_size), -math.inf)
        logits[:, -1, next(self.script)] = 0.0
        return logits


class Rows(Scripted):
    """A model with a script for each row, in which the length of the text says the place."""

    def __init__(self, scripts: list[list[int]], vocab_size: int) -> None:
        super().__init__([], vocab_size)
        self.scripts = scripts

    def forward(self, ids: Tensor) -> Tensor:
        logits = torch.full((len(self.scripts), ids.shape[1], self.config.vocab_size), -math.inf)
        for row, script in enumerate(self.scripts):
            logits[row, -1, script[ids.shape[1] - 1]] = 0.0
        return logits


class Fixed(Scripted):
    """Stands in for a model that always gives the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__([], len(logits))
        self.logits = torch.tensor(logits)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


class Interrupted(Scripted):
    """A model during whose call after so many others Ctrl-C comes. Its script is for all rows."""

    def __init__(self, script: list[int], vocab_size: int, calls: int) -> None:
        super().__init__(script, vocab_size)
        self.calls = calls

    def forward(self, ids: Tensor) -> Tensor:
        if len(self.shown) == self.calls:
            raise KeyboardInterrupt
        return super().forward(ids)
