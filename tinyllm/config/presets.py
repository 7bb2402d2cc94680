"""Presets: models of known sizes, each with the training that suits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model's size, and the training that suits it."""

    embedding_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    seq_len: int
    batch_size: int
    steps: int
    lr: float
    vocab_size: int
    optimizer: str = "adamw"
    beta2: float = 0.95
    with_adamw: Mapping[str, Any] = field(default_factory=dict)  # what differs where AdamW is taken instead of Muon
    dropout: float = 0.0
    modern: bool = True  # a GPT-2, which other programs read; False: the article's model


# tiny: chosen for about a minute on two cores (some 60 ms a step) and the standard library, by one run each, seed 0.
# Bits per byte of validation text, with fewer steps for a larger vocabulary, which were estimated to take equal time:
# 512 tokens, 1500 steps 2.08; 1024, 1400 1.97; 2048, 1200 1.91; 4096, 900 1.90; all with lr 2e-3. With 4096 tokens:
# lr 4e-3 1.87, 6e-3 2.04, so 3e-3 keeps away from the edge; sinusoidal positions 2.86 at 4e-3, as the small first
# embeddings drown in them. All that was with AdamW; Muon's recipe was chosen later, see docs/training.md: twice the
# batch halves what Muon costs, and a decay rate of the squared gradient of 0.99 suits the high learning rate.
# gpt2-medium and larger: the learning rates are those of Brown et al. 2020, table 2.1, for far larger batches; none of
# these has been trained here.
PRESETS: dict[str, Preset] = {
    "tutorial": Preset(16, 32, 2, 1, seq_len=32, batch_size=12, steps=2000, lr=3e-3, vocab_size=512, modern=False),
    "tiny": Preset(
        128,
        512,
        4,
        4,
        seq_len=64,
        batch_size=24,
        steps=500,
        lr=2e-2,
        vocab_size=4096,
        optimizer="muon",
        beta2=0.99,
        with_adamw={"batch_size": 12, "steps": 1000, "lr": 3e-3, "beta2": 0.95},
    ),
    "small": Preset(512, 2048, 12, 8, seq_len=256, batch_size=16, steps=20_000, lr=6e-4, vocab_size=8192),
    "gpt2": Preset(768, 3072, 12, 12, seq_len=1024, batch_size=12, steps=100_000, lr=6e-4, vocab_size=50_257),
    "gpt2-medium": Preset(1024, 4096, 24, 16, seq_len=1024, batch_size=8, steps=100_000, lr=3e-4, vocab_size=50_257),
    "gpt2-large": Preset(1280, 5120, 36, 20, seq_len=1024, batch_size=4, steps=100_000, lr=2.5e-4, vocab_size=50_257),
    "gpt2-xl": Preset(1600, 6400, 48, 25, seq_len=1024, batch_size=2, steps=100_000, lr=2e-4, vocab_size=50_257),
    "gpt3": Preset(12_288, 49_152, 96, 96, seq_len=2048, batch_size=1, steps=100_000, lr=6e-5, vocab_size=50_257),
}


# The model's sizes, which a preset decides and a config may change.
SIZES = ("num_layers", "num_heads", "embedding_dim", "hidden_dim")
