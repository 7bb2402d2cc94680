"""The modules that `tinyllm.SimpleLLM` is made of, on the fused operators of `tinyllm.ops`.

Each has the constructor, attributes and state_dict of the module it stands in for (the article's,
or `torch.nn.LayerNorm`) and keyword-only options, off by default, that scale it up.

Shapes: B sequences of T tokens, D = embedding_dim, H = num_heads, D = H * head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast, overload

import torch
from torch import Tensor, nn

from tinyllm import _fused, ops
from tinyllm._internal.checks import check_choice, check_heads, check_int, check_positive, check_probability
from tinyllm.ops.embedding import raise_for_ids
from tinyllm.reference import sinusoidal_table

__all__ = [
    "ACTIVATIONS",
    "Embedding",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "PositionalEncoding",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "SelfAttention",
    "TransformerBlock",
]

# "gelu" is the exact one (erf), as "gelu" means in torch.nn; "gelu_tanh" is its approximation, GPT-2's "gelu_new".
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


@_fused.known("eps")
class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on the fused kernel, which can add a residual on the way.

    Same constructor and state_dict as `torch.nn.LayerNorm`.

    Args of `norm(input, residual=None)`:
        input: (..., *normalized_shape).
        residual: of input's shape, or None. Where its dtype differs, both are promoted.

    Returns:
        layer_norm(input), like `input`; with a residual the pair (layer_norm(sum), sum) where
        sum = input + residual: one pass over memory for both.
    """

    @overload
    def forward(self, input: Tensor) -> Tensor: ...
    @overload
    def forward(self, input: Tensor, residual: None) -> Tensor: ...
    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if input.dtype != residual.dtype:  # as input + residual would; autocast's branches are bfloat16
            dtype = torch.promote_types(input.dtype, residual.dtype)
            input, residual = input.to(dtype), residual.to(dtype)
        return ops.add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` on the fused kernel: same constructor and state_dict."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)


@_fused.known()
class Embedding(nn.Module):
    """Token ids (...), int32 or int64, to vectors (..., embedding_dim): one learned row per word.

    Raises:
        IndexError: an id is negative or not below vocab_size. Eager CPU only, where torch looks at
            every id anyway; on a GPU such an id stops the device (a device-side assert).
    """

    def __init__(self, vocab_size: int, embedding_dim: int) -> None:
        super().__init__()
        vocab_size = check_int("vocab_size", vocab_size, 1)
        self.embedding = nn.Embedding(vocab_size, check_int("embedding_dim", embedding_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        try:
            vectors: Tensor = self.embedding(x)
        except IndexError:  # torch's own message tells neither the id nor the range
            raise_for_ids(x, self.embedding.num_embeddings)
            raise
        return vectors


class Quantized(nn.Module):
    """A module whose weight is an `ops.QuantizedWeight`: its tensors are buffers, which move and are saved with it."""

    data: Tensor
    scales: Tensor | None

    def __init__(self, weight: ops.QuantizedWeight) -> None:
        super().__init__()
        self.in_features = weight.in_features
        self.register_buffer("data", weight.data)
        self.register_buffer("scales", weight.scales)

    @property
    def weight(self) -> ops.QuantizedWeight:
        """The weight, (out_features, in_features)."""
        return ops.QuantizedWeight(self.data, self.scales, self.in_features)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """Move the tensors, as `nn.Module` does; but their dtypes stay, whatever dtype a model is cast to."""
        before = dict(self._buffers)
        super()._apply(function, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        groups = "" if self.scales is None else f", group_size={self.weight.group_size}"
        return f"{out_features}, {in_features}, {self.weight.kind}{groups}"


@_fused.known()
class QuantizedLinear(Quantized):
    """A linear layer with a weight in 16, 8 or 4 bits: (*, in_features) to (*, out_features); see
    `ops.quantized_linear`. The weight is not trained; gradients of the input and the bias are computed.

    Args:
        weight: see `ops.quantize_weight`.
        bias: (out_features), or None.

    Attributes:
        data, scales: buffers, the weight's tensors.
        weight: the `ops.QuantizedWeight`.
        bias: parameter, or None.
    """

    def __init__(self, weight: ops.QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features = weight.shape[0]
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: str, *, group_size: int = 64) -> QuantizedLinear:
        """Return a layer with linear's weight in fewer bits, and linear's own bias; arguments as
        `ops.quantize_weight`."""
        return cls(ops.quantize_weight(linear.weight, kind, group_size=group_size), linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        return ops.quantized_linear(input, self.weight, self.bias)


@_fused.known()
class QuantizedEmbedding(Quantized):
    """Token ids (...) to float32 vectors (..., embedding_dim), from a table in 16, 8 or 4 bits.

    Args:
        weight: (vocab_size, embedding_dim), see `ops.quantize_weight`; one that a `QuantizedLinear` has too is shared.
    """

    def forward(self, input: Tensor) -> Tensor:
        try:
            return ops.quantized_embedding(input, self.weight)
        except IndexError:
            raise_for_ids(input, self.data.size(0))
            raise


@_fused.known()
class PositionalEncoding(nn.Module):
    """Add a fixed sinusoidal position signal: (B, T, D) to (B, T, D), T at most max_seq_len.

    The article's module of this name takes (T, B, D) and is called between two transposes; this one
    takes the batch first. The buffer is the same.

    Attributes:
        pe: buffer (max_seq_len, 1, D), in the state_dict; see `tinyllm.reference.sinusoidal_table`.

    Raises:
        ValueError: T is above max_seq_len.
    """

    pe: Tensor

    def __init__(self, embedding_dim: int, max_seq_len: int = 5000) -> None:
        super().__init__()
        self.embedding_dim = check_int("embedding_dim", embedding_dim, 1)
        self.max_seq_len = check_int("max_seq_len", max_seq_len, 1)
        self.register_buffer("pe", sinusoidal_table(max_seq_len, embedding_dim).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows(x.size(1))

    def rows(self, seq_len: int) -> Tensor:
        """Return what is added to the tokens of a sequence, (seq_len, D). ValueError above max_seq_len."""
        _check_seq_len(seq_len, self.max_seq_len)
        return self.pe[:seq_len, 0]

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, max_seq_len={self.max_seq_len}"


@_fused.known()
class LearnedPositionalEncoding(nn.Module):
    """Add a learned vector for each position, as GPT-2 does: (B, T, D) to (B, T, D).

    Attributes:
        weight: parameter (max_seq_len, D), drawn from N(0, 1) like the rows of `nn.Embedding`.

    Raises:
        ValueError: T is above max_seq_len.
    """

    def __init__(self, embedding_dim: int, max_seq_len: int = 5000) -> None:
        super().__init__()
        self.embedding_dim = check_int("embedding_dim", embedding_dim, 1)
        self.max_seq_len = check_int("max_seq_len", max_seq_len, 1)
        self.weight = nn.Parameter(torch.empty(max_seq_len, embedding_dim))
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows(x.size(1))

    def rows(self, seq_len: int) -> Tensor:
        """Return what is added to the tokens of a sequence, (seq_len, D). ValueError above max_seq_len."""
        _check_seq_len(seq_len, self.max_seq_len)
        return self.weight[:seq_len]

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, max_seq_len={self.max_seq_len}"


@_fused.known("num_heads", "causal", "dropout", "training")
class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V: (B, T, D) to (B, T, D).

    With one head this is the article's module: no output projection, and head_dim = D. With more
    it is multi-head attention ("Attention Is All You Need", Vaswani et al., 2017, section 3.2),
    equal to `nn.MultiheadAttention` whose in_proj_weight is query, key and value stacked.

    Args:
        embedding_dim: D.
        num_heads: heads that attend side by side, each to its own D / num_heads columns. More than
            one adds the output projection `out_proj`.
        causal: a token sees itself and earlier ones only.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have one.

    Raises:
        ValueError: embedding_dim is not divisible by num_heads, or an argument is out of range; at
            the call: x is not (B, T, D).
    """

    out_proj: nn.Linear | None

    def __init__(
        self,
        embedding_dim: int,
        *,
        num_heads: int = 1,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_heads(embedding_dim, num_heads)
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = check_probability("dropout", dropout)
        self.query = nn.Linear(embedding_dim, embedding_dim, bias=bias)
        self.key = nn.Linear(embedding_dim, embedding_dim, bias=bias)
        self.value = nn.Linear(embedding_dim, embedding_dim, bias=bias)
        self.out_proj = None
        if num_heads > 1:
            self.out_proj = nn.Linear(embedding_dim, embedding_dim, bias=bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """attn_mask: as scaled_dot_product_attention takes it, instead of `causal`: it has to hide the future, too.
        attend: computes the attention of queries, keys and values, (B, H, T, head_dim) each, in its place."""
        if x.dim() != 3 or x.size(-1) != self.embedding_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, T, {self.embedding_dim})")
        if attend is not None:
            return self.join(attend(*self.heads(x)))
        is_causal = self.causal and attn_mask is None
        dropout_p = self.dropout if self.training else 0.0
        if self.out_proj is None:
            mask = None if attn_mask is None else attn_mask.squeeze(1)
            operands = self._project(x)
            return ops.scaled_dot_product_attention(*operands, mask, dropout_p=dropout_p, is_causal=is_causal)
        heads = self.heads(x)
        return self.join(ops.scaled_dot_product_attention(*heads, attn_mask, dropout_p=dropout_p, is_causal=is_causal))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _fused.call_linear(self.query, x), _fused.call_linear(self.key, x), _fused.call_linear(self.value, x)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of x (B, T, D), each (B, H, T, head_dim), also of one head."""
        query, key, value = self._project(x)
        return self._split_heads(query), self._split_heads(key), self._split_heads(value)

    def join(self, attended: Tensor) -> Tensor:
        """Return what the heads give, (B, H, T, head_dim), as the module's output (B, T, D)."""
        joined = attended.transpose(1, 2).flatten(2)
        return joined if self.out_proj is None else _fused.call_linear(self.out_proj, joined)

    def _split_heads(self, x: Tensor) -> Tensor:
        """Return (B, T, D) as (B, H, T, head_dim): a view, since kernels take any strides."""
        head_dim = self.embedding_dim // self.num_heads
        return x.view(x.size(0), x.size(1), self.num_heads, head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, dropout={self.dropout}"


@_fused.known("norm_first", "activation")
class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each on a branch: (B, T, D) to (B, T, D).

        post-norm (the article's)               pre-norm (norm_first, as in GPT-2)
        x = norm1(x + attention(x))             x = x + attention(norm1(x))
        x = norm2(x + feed_forward(x))          x = x + feed_forward(norm2(x))

    Every add runs inside the norm that follows it. In a stack of pre-norm blocks that norm is the
    next block's, so a block with `defer_add` returns the pair (x, branch), whose sum is its output.
    Pre-norm blocks take such a pair as well as a tensor.

    Where one operator serves the whole block (`ops.transformer_block`) it is taken, and the output
    is a tensor. Not under autocast, unless 16-bit products are no faster on this processor, with frozen
    parameters, with another probability of dropout in `attention` than in `dropout`, or when one of the
    modules has been replaced, hooked or parametrized: then each module is called by itself.

    Args:
        embedding_dim: D.
        hidden_dim: the width between the two layers of `feed_forward`.
        num_heads, causal: see `SelfAttention`.
        dropout: probability of dropping an attention weight or an element of a branch, in training.
        activation: "relu", "gelu" or "gelu_tanh".
        norm_first: pre-norm.
        bias: whether the linear layers and the norms have one.
        norm_eps: added to the variance by both norms.
        defer_add: return the pair (x, branch) and leave its sum to the next norm; norm_first only.

    Raises:
        ValueError: an argument is out of range, not one of the choices, or does not fit another.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_dim: int,
        *,
        num_heads: int = 1,
        causal: bool = False,
        dropout: float = 0.0,
        activation: str = "relu",
        norm_first: bool = False,
        bias: bool = True,
        norm_eps: float = 1e-5,
        defer_add: bool = False,
    ) -> None:
        super().__init__()
        check_int("hidden_dim", hidden_dim, 1)
        check_choice("activation", activation, ACTIVATIONS)
        norm_eps = check_positive("norm_eps", norm_eps)
        if defer_add and not norm_first:
            raise ValueError("defer_add is True; it needs norm_first=True: post-norm blocks end in a norm")
        self.norm_first = norm_first
        self.defer_add = defer_add
        self.activation = activation
        self.attention = SelfAttention(embedding_dim, num_heads=num_heads, causal=causal, dropout=dropout, bias=bias)
        self.feed_forward = nn.Sequential(
            nn.Linear(embedding_dim, hidden_dim, bias=bias),
            ACTIVATIONS[activation](),
            nn.Linear(hidden_dim, embedding_dim, bias=bias),
        )
        self.norm1 = LayerNorm(embedding_dim, norm_eps, bias=bias)
        self.norm2 = LayerNorm(embedding_dim, norm_eps, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        attn_mask: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """attn_mask: (B, 1, T, T); attend: see `SelfAttention`."""
        if attend is not None:
            return self.compose(x, lambda normed: self.attention(normed, None, attend))
        if attn_mask is None and isinstance(x, Tensor):
            out = _fused.call_block(self, x)
            if out is not None:
                return out
        return self.compose(x, lambda normed: self._attend(normed, attn_mask))

    def compose(
        self, x: Tensor | tuple[Tensor, Tensor], attend: Callable[[Tensor], Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the block module by module, with `attend`, (B, T, D) to (B, T, D), in the place of `attention`.

        Where keys and values come from a cache, that is what differs from `forward`.
        """
        if not self.norm_first:
            x = cast(Tensor, x)
            normed, _ = self.norm1(x, self.dropout(attend(x)))
            normed, _ = self.norm2(normed, self.dropout(self._network(normed)))
            return cast(Tensor, normed)
        normed, stream = self.norm1(*x) if isinstance(x, tuple) else (self.norm1(x), x)
        normed, stream = self.norm2(stream, self.dropout(attend(normed)))
        branch = self.dropout(self._network(normed))
        return (stream, branch) if self.defer_add else stream + branch

    def _attend(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        # A module that somebody put in attention's place need not know of masks.
        return cast(Tensor, self.attention(x) if attn_mask is None else self.attention(x, attn_mask))

    def _network(self, x: Tensor) -> Tensor:
        return _fused.call_network(self.feed_forward, x, self.activation)

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}"


def _check_seq_len(seq_len: int, max_seq_len: int) -> None:
    if seq_len > max_seq_len:
        raise ValueError(f"x has {seq_len} tokens in a sequence; max_seq_len is {max_seq_len}")
