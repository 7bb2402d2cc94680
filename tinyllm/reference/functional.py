"""The meaning of each operator, in plain PyTorch: the specification that kernels are tested against, which is also
called where no kernel serves. Signatures are those of `tinyllm.ops`; every function but `adamw_step`, which works in
place, can be differentiated any number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute (input - mean) / sqrt(variance + eps) * weight + bias over the last len(normalized_shape) dimensions."""
    # Statistics in float32 at least: a 16-bit sum over a row would lose most of its digits.
    compute = torch.promote_types(input.dtype, torch.float32)
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(compute)
    if x.numel() == 0:  # of which PyTorch would warn that it has no variance
        variance = mean = x.sum(dims, keepdim=True)
    else:
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    normed = (x - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        normed = normed * weight.to(compute)
    if bias is not None:
        normed = normed + bias.to(compute)
    return normed.to(input.dtype)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return (layer_norm(sum), sum) of `sum = input + residual`."""
    total = input + residual
    return layer_norm(total, normalized_shape, weight, bias, eps), total


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(sum), sum) of `sum = input + residual`."""
    total = input + residual
    return rms_norm(total, normalized_shape, weight, eps), total


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Compute input / sqrt(mean(input^2) + eps) * weight over the last `len(normalized_shape)` dimensions."""
    compute = torch.promote_types(input.dtype, torch.float32)
    x = input.to(compute)
    squares = x.pow(2).mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    normed = x * torch.rsqrt(squares + (torch.finfo(compute).eps if eps is None else eps))
    if weight is not None:
        normed = normed * weight.to(compute)
    return normed.to(input.dtype)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    factors: Tensor | None = None,
) -> Tensor:
    """Compute weight[input] + positions, with dropout; the rest as in `torch.nn.functional.embedding`.

    factors: what the sum is multiplied by, such as a dropout mask that is known already.
    """
    vectors = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if positions is not None:
        vectors = vectors + positions
    if factors is not None:
        vectors = vectors * factors.to(vectors.dtype)
    return torch.dropout(vectors, dropout_p, dropout_p > 0.0)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_offset: int | Tensor = 0,
    weight_factors: Tensor | None = None,
) -> Tensor:
    """Compute softmax(query key^T * scale + mask) value, with the whole (queries x keys) matrix in memory.

    With is_causal, query i sees keys 0 ... causal_offset + i; a tensor has a number for each sequence, or one for all.

    What a query may not see (above the causal diagonal, hidden by a bool mask, or by -inf in an additive one) may hold
    infinities and NaN. A query that sees one of those while others are hidden from it gives NaN, and
    passes no gradient on.

    weight_factors: what the softmax is multiplied by, such as a dropout mask that is known already.
    """
    if enable_gqa:
        group = query.size(-3) // key.size(-3)
        key = key.repeat_interleave(group, -3)
        value = value.repeat_interleave(group, -3)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0
    compute = torch.promote_types(query.dtype, torch.float32)
    key, value = key.to(compute), value.to(compute)
    visible = None
    if is_causal:
        if isinstance(causal_offset, Tensor):
            causal_offset = causal_offset.clamp(0, key.size(-2))
            if causal_offset.dim() > 0:
                causal_offset = causal_offset[..., None, None, None]  # beside (heads, queries, keys)
        query_index, key_index = (torch.arange(x.size(-2), device=x.device) for x in (query, key))
        visible = key_index <= query_index[:, None] + causal_offset
    if attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
        visible = seen if visible is None else seen & visible
    poison = None
    if visible is not None:
        # A product with 0 would make NaN of what is not finite: it is taken out, and put back where it is seen.
        finite_keys, finite_values = key.isfinite(), value.isfinite()
        bad = ~(finite_keys.all(-1, keepdim=True) & finite_values.all(-1, keepdim=True))
        key, value = key.masked_fill(~finite_keys, 0.0), value.masked_fill(~finite_values, 0.0)
        sizes = torch.broadcast_shapes(visible.shape, (query.size(-2), key.size(-2)))
        poison = torch.matmul(visible.expand(sizes).to(compute), bad.to(compute)) > 0
    scores = query.to(compute) @ key.transpose(-2, -1) * scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(compute)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None:
        # A query that sees no key gets 0, where a softmax over nothing but -inf is NaN.
        blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    else:
        weights = torch.softmax(scores, -1)
    weights = torch.dropout(weights, dropout_p, dropout_p > 0.0)
    if weight_factors is not None:
        weights = weights * weight_factors
    out = weights @ value
    if poison is not None:
        out = out.masked_fill(poison, math.nan)
    return out.to(query.dtype)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Return activation(gate) * up."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(compute)) * up.to(compute)).to(gate.dtype)


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R columns of query (B, H, T, D) and key (B, Hkv, T, D); cos and sin are (B or 1, T, R)."""
    compute, rotated = torch.promote_types(query.dtype, torch.float32), cos.size(-1)

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., :rotated].to(compute), x[..., rotated:]
        first, second = turned.chunk(2, -1) if rotated else (turned, turned)
        halves = torch.cat([-second, first], -1) if rotated else turned
        turned = turned * cos.unsqueeze(1).to(compute) + halves * sin.unsqueeze(1).to(compute)
        return torch.cat([turned.to(x.dtype), rest], -1)

    return rotate(query), rotate(key)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute activation(input weight^T + bias) + residual."""
    out = ACTIVATIONS[activation](torch.nn.functional.linear(input, weight, bias))
    return out if residual is None else out + residual


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute activation(input weight1^T + bias1) weight2^T + bias2 + residual."""
    return linear(linear(input, weight1, bias1, activation=activation), weight2, bias2, residual=residual)


BLOCK_PARAMETERS = ("query", "key", "value", "out_proj", "linear1", "linear2", "norm1", "norm2")


def transformer_block(
    input: Tensor,
    parameters: Sequence[Tensor],
    *,
    num_heads: int = 1,
    causal: bool = False,
    norm_first: bool = False,
    activation: str = "relu",
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    dropout_p: float = 0.0,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute a transformer block from the parameters that `tinyllm.ops.transformer_block` lists.

    factors: what the softmax, attention's branch and the network's are multiplied by, such as dropout masks that are
        known already, in place of dropout.
    """
    if factors is not None:
        dropout_p = 0.0
    names = [name for name in BLOCK_PARAMETERS if num_heads > 1 or name != "out_proj"]
    weights = dict(zip(names, parameters, strict=False))
    biases = dict.fromkeys(names) | dict(zip(names, parameters[len(names) :], strict=False))

    def layer(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[name], biases[name])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[name], biases[name], eps)

    def attention(x: Tensor) -> Tensor:
        query, key, value = (
            layer(name, x).unflatten(-1, (num_heads, -1)).transpose(-2, -3) for name in ("query", "key", "value")
        )
        known = None if factors is None else factors[0]
        attended = scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal=causal, weight_factors=known
        )
        attended = attended.transpose(-2, -3).flatten(-2)
        return drop(layer("out_proj", attended) if num_heads > 1 else attended, 1)

    def network(x: Tensor) -> Tensor:
        return drop(layer("linear2", ACTIVATIONS[activation](layer("linear1", x))), 2)

    def drop(x: Tensor, index: int) -> Tensor:
        return x * factors[index] if factors is not None else torch.dropout(x, dropout_p, dropout_p > 0.0)

    if norm_first:
        middle = input + attention(norm("norm1", input, eps1))
        return middle + network(norm("norm2", middle, eps2))
    middle = norm("norm1", input + attention(input), eps1)
    return norm("norm2", middle + network(middle), eps2)


def transformer(
    input: Tensor,
    parameters: Sequence[Tensor],
    *,
    num_layers: int,
    positions: Tensor | None = None,
    target: Tensor | None = None,
    num_heads: int = 1,
    causal: bool = False,
    norm_first: bool = False,
    activation: str = "relu",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute the logits, or their mean loss, of a model whose parameters `tinyllm.ops.transformer` lists.

    factors: those of the embedding, then of each block, in place of dropout; see `transformer_block`.
    """
    if factors is not None:
        dropout_p = 0.0
    names = len(BLOCK_PARAMETERS) - (num_heads <= 1)
    table, *others = parameters
    copies = 1 + (len(others) > num_layers * names + 1 + norm_first)  # 2 with biases, of which the output's may lack
    block = {"num_heads": num_heads, "causal": causal, "norm_first": norm_first, "activation": activation}
    first = None if factors is None else factors[0]
    x = embedding(input, table, positions=positions, dropout_p=dropout_p, factors=first)
    for index in range(num_layers):
        known = None if factors is None else factors[1 + 3 * index : 4 + 3 * index]
        x = transformer_block(
            x,
            others[: copies * names],
            **block,  # type: ignore[arg-type]
            eps1=eps,
            eps2=eps,
            dropout_p=dropout_p,
            factors=known,
        )
        others = others[copies * names :]
    if norm_first:
        x = layer_norm(x, x.shape[-1:], others[0], others[1] if copies == 2 else None, eps)
        others = others[copies:]
    logits = linear(x, *others)
    return logits if target is None else cross_entropy(logits.flatten(0, 1), target.flatten())


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute PyTorch's own cross_entropy, in float32 where input has 16 bits."""
    compute = torch.promote_types(input.dtype, torch.float32)
    loss = F.cross_entropy(
        input.to(compute),
        target.to(compute) if target.is_floating_point() else target,
        None if weight is None else weight.to(compute),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(input.dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute `cross_entropy` of the whole (N, C, ...) logits; linear_weight is (C, ..., D)."""
    compute = torch.promote_types(input.dtype, torch.float32)
    logits = F.linear(
        input.to(compute),
        linear_weight.flatten(0, -2).to(compute),
        None if linear_bias is None else linear_bias.flatten().to(compute),
    ).reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    loss = cross_entropy(
        logits,
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(input.dtype)


def adamw_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all tensors together, in float32 at least."""
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors])
    )


@torch.no_grad()
def adamw_step(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coef: float = 1.0,
) -> None:
    """Update parameters and moments in place, computing in float32 at least."""
    beta1, beta2 = betas
    for *tensors, step in zip(parameters, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        parameter, grad, exp_avg, exp_avg_sq = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
        grad = clip_coef * grad
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
        denominator = exp_avg_sq.sqrt() / math.sqrt(1 - beta2 ** float(step)) + eps
        step_size = lr / (1 - beta1 ** float(step))
        tensors[0].copy_((1 - lr * weight_decay) * parameter - step_size * exp_avg / denominator)
        tensors[2].copy_(exp_avg)
        tensors[3].copy_(exp_avg_sq)
