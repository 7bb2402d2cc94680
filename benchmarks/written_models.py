"""The models of the benchmark of writing: GPT-2s with random weights, as Hugging Face saves them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from .writers import BF16, FLOAT32, INT4, INT8, Provider

BITS = {FLOAT32: 32, BF16: 16, INT8: 8, INT4: 4}


@dataclass(frozen=True)
class Model:
    """Sizes of a GPT-2, and what is written with it.

    Attributes:
        cases: sizes of the batch and lengths of its prompts; None is the longest one that leaves room for the new
            tokens.
        on_one_thread: those that are measured on one thread, too.
    """

    name: str
    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    cases: tuple[tuple[int, int | None], ...]
    on_one_thread: tuple[tuple[int, int | None], ...]
    new_tokens: int

    def step_bytes(self, provider: Provider, batch: int, prompt: int) -> float:
        """Return the fewest bytes that must be read to write a token for each sequence: every weight once, without the
        scales of quantized ones, and the keys and values of all tokens so far, in the mean over the steps. The output
        has at least 8 bits. Norms and biases are float32."""
        bits = BITS[provider.weights]
        matrices = self.layers * 12 * self.width**2 * bits + self.vocab_size * self.width * max(bits, 8)
        vectors = self.layers * 13 * self.width + 2 * self.width
        cached = batch * 2 * self.layers * self.width * (prompt + self.new_tokens / 2)
        return matrices / 8 + 4 * vectors + cached * provider.cache_bytes


GPT2 = Model("GPT-2 124M", 50_257, 1024, 768, 12, 12, ((1, 1), (1, 256), (1, None), (8, 256)), ((1, 256),), 64)
# The sizes of the preset of this name.
TINY = Model("tiny preset", 4096, 64, 128, 4, 4, ((1, 1),), ((1, 1),), 63)
MODELS = (GPT2, TINY)


def make_model(model: Model, folder: Path) -> None:
    """Save a GPT-2 with random weights, and a byte-level BPE of made-up merges, as Hugging Face does.

    The weights are two and a half times as large as GPT-2's first ones, whose text is one token again and again: with
    these hardly a token comes twice in a row, and the likeliest one is as clear as before.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.context,
        n_embd=model.width,
        n_layer=model.layers,
        n_head=model.heads,
        initializer_range=0.05,
        bos_token_id=model.vocab_size - 1,
        eos_token_id=model.vocab_size - 1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in letters for b in letters][: model.vocab_size - len(letters) - 1]
    end = "<|endoftext|>"
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges), end])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end).save_pretrained(
        folder
    )
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_prompts(model: Model, batch: int, length: int) -> list[list[int]]:
    draw = random.Random(length)
    return [[draw.randrange(model.vocab_size - 1) for _ in range(length)] for _ in range(batch)]
