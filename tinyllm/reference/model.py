"""The article's language model, component by component, in plain PyTorch.

Source: "Building a Large Language Model from Scratch" (Aman Kharwal, AmanXai). Constructor
arguments, attribute names, the order in which parameters are made, and so the state_dict and the
initial weights of a given seed, are the article's. `tinyllm.SimpleLLM` is tested against this file.

Shapes: B sequences of T tokens, each token a vector of D = embedding_dim numbers, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tokenize(text: str, vocab: Mapping[str, int]) -> list[int]:
    """Return the id of each whitespace-separated word of `text`; unknown words get that of "<UNK>".

    Raises:
        KeyError: `vocab` has no "<UNK>".
    """
    if "<UNK>" not in vocab:
        raise KeyError(f'vocab has {len(vocab)} words, but not "<UNK>", the one that stands for unknown words')
    unknown = vocab["<UNK>"]
    return [vocab.get(word, unknown) for word in text.split()]


def sinusoidal_table(max_seq_len: int, embedding_dim: int) -> Tensor:
    """Return the position signal of "Attention Is All You Need" (Vaswani et al., 2017), section 3.5.

    Column 2i is sin(t / 10000^(2i / D)) and column 2i+1 the cosine of the same angle: wavelengths
    from 2 pi to 10000 * 2 pi. An odd D ends with a sine.

    Returns:
        (max_seq_len, embedding_dim), float32.
    """
    position = torch.arange(max_seq_len, dtype=torch.float32).unsqueeze(1)
    even_column = torch.arange(0, embedding_dim, 2, dtype=torch.float32)
    angle = position * torch.exp(even_column * (-math.log(10000.0) / embedding_dim))
    table = torch.empty(max_seq_len, embedding_dim, dtype=torch.float32)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : embedding_dim // 2].cos()
    return table


class Embedding(nn.Module):
    """Token ids (...) to vectors (..., D): a table with one learned row for each word."""

    def __init__(self, vocab_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.embedding(x)
        return vectors


class PositionalEncoding(nn.Module):
    """Add row t of a fixed table to token t. Time comes first here: (T, B, D) to (T, B, D).

    Attributes:
        pe: buffer (max_seq_len, 1, D), `sinusoidal_table` with an axis that stands for the batch.
    """

    pe: Tensor

    def __init__(self, embedding_dim: int, max_seq_len: int = 5000) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.register_buffer("pe", sinusoidal_table(max_seq_len, embedding_dim).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[: x.size(0)]


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V: every token sees every other. (B, T, D) to (B, T, D)."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key = nn.Linear(embedding_dim, embedding_dim)
        self.value = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        scores = query @ key.transpose(1, 2) / math.sqrt(x.size(-1))  # (B, T, T): row = who looks
        weights = scores.softmax(dim=-1)
        attended: Tensor = weights @ value
        return attended


class TransformerBlock(nn.Module):
    """Attention, then a two-layer network for each token: (B, T, D) to (B, T, D).

    Each is added to its input, and the sum is normalised ("post-norm", as in the first transformer).
    """

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.attention = SelfAttention(embedding_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(embedding_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embedding_dim)
        )
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.norm2 = nn.LayerNorm(embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        normed: Tensor = self.norm2(x + self.feed_forward(x))
        return normed


class SimpleLLM(nn.Module):
    """Token ids (B, T) to logits (B, T, V): how likely each word of the vocabulary comes next."""

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocab_size, embedding_dim)
        self.positional_encoding = PositionalEncoding(embedding_dim)
        self.transformer_blocks = nn.Sequential(
            *(TransformerBlock(embedding_dim, hidden_dim) for _ in range(num_layers))
        )
        self.output = nn.Linear(embedding_dim, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.positional_encoding(x.transpose(0, 1)).transpose(0, 1)
        x = self.transformer_blocks(x)
        logits: Tensor = self.output(x)
        return logits
