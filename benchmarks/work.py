"""Work that counts: the rates in the tables are these numbers divided by the time, so a provider that does more than it
has to gets no credit for it."""

from __future__ import annotations

from .row import BACKWARD, FORWARD, STEP

# How many tensors of the input's size each direction must read and write, and how many rows of parameters and their
# gradients beside them. Statistics of a row (one or two numbers) are not counted.
#                      large tensors                                     parameter rows
_LAYER_NORM = {
    FORWARD: (2, 2),  # input -> normed                                  weight, bias
    BACKWARD: (3, 3),  # grad, input -> grad_input                       weight, grad_weight, grad_bias
}
_ADD_LAYER_NORM = {
    FORWARD: (4, 2),  # input, residual -> normed, sum
    BACKWARD: (4, 3),  # grad_normed, grad_sum, sum -> one gradient for input and residual
}

_RMS_NORM = {
    FORWARD: (2, 1),
    BACKWARD: (3, 2),
}


def layer_norm_bytes(direction: str, rows: int, columns: int, itemsize: int = 4) -> int:
    """Return the least traffic of layer_norm over (rows, columns): every tensor moves once."""
    return _bytes(_LAYER_NORM, direction, rows, columns, itemsize)


def add_layer_norm_bytes(direction: str, rows: int, columns: int, itemsize: int = 4) -> int:
    """Return the least traffic of add_layer_norm, both of whose outputs are used."""
    return _bytes(_ADD_LAYER_NORM, direction, rows, columns, itemsize)


def rms_norm_bytes(direction: str, rows: int, columns: int, itemsize: int = 4) -> int:
    """Return the least traffic of rms_norm over (rows, columns)."""
    return _bytes(_RMS_NORM, direction, rows, columns, itemsize)


def _bytes(table: dict[str, tuple[int, int]], direction: str, rows: int, columns: int, itemsize: int) -> int:
    if direction == STEP:
        return sum(_bytes(table, part, rows, columns, itemsize) for part in (FORWARD, BACKWARD))
    tensors, parameters = table[direction]
    return (tensors * rows + parameters) * columns * itemsize


def embedding_bytes(direction: str, tokens: int, seq_len: int, vocab_size: int, columns: int, itemsize: int = 4) -> int:
    """Return the least traffic of embedding + positions; the gradient of the whole table is written."""
    rows = {FORWARD: 2 * tokens + seq_len, BACKWARD: tokens + seq_len + vocab_size}[direction]
    return rows * columns * itemsize


def adamw_bytes(elements: int, itemsize: int = 4) -> int:
    """Return the least traffic of clipping and a step of AdamW: parameters and both moments are read and written,
    gradients read twice, since their norm must be known before the first one is used."""
    return 8 * elements * itemsize


def linear_flops(direction: str, rows: int, inputs: int, outputs: int) -> int:
    """Return the FLOPs of a linear layer's products: the output; in a step the gradients of both operands, too."""
    return {FORWARD: 1, STEP: 3}[direction] * 2 * rows * inputs * outputs


def linear_bytes(direction: str, rows: int, inputs: int, outputs: int, itemsize: int = 4) -> int:
    """Return the least traffic of a linear forward: input, weight and bias are read once, the output written."""
    assert direction == FORWARD
    return (rows * inputs + outputs * inputs + outputs + rows * outputs) * itemsize


def cross_entropy_bytes(direction: str, rows: int, classes: int, itemsize: int = 4) -> int:
    """Return the least traffic of a cross-entropy: the logits are read once, and with a backward their gradient is
    written once. Whoever reads them again for it gets no credit; targets and losses are not counted."""
    return {FORWARD: 1, STEP: 2}[direction] * rows * classes * itemsize


def linear_cross_entropy_flops(direction: str, rows: int, features: int, classes: int) -> int:
    """Return the FLOPs of the products: the logits, in a step the gradients of input and weight; none for softmax."""
    return {FORWARD: 1, STEP: 3}[direction] * 2 * rows * features * classes


def visible_pairs(queries: int, keys: int, causal: bool) -> int:
    """Return the number of (query, key) pairs that take part; with causal, query i sees keys 0 .. i."""
    return sum(min(i + 1, keys) for i in range(queries)) if causal else queries * keys


def attention_flops(direction: str, pairs: int, head_dim: int) -> int:
    """Useful FLOPs of attention over `pairs` visible pairs in all heads together.

    A pair costs 2 head_dim for each product it takes part in: forward has two (Q K^T and P V), backward five (Q K^T
    again, dV, dP, dQ, dK). Hidden pairs, the softmax and the scale count nothing.
    """
    products = {FORWARD: 2, BACKWARD: 5, STEP: 7}[direction]
    return products * 2 * pairs * head_dim


def model_flops(
    direction: str,
    *,
    batch: int,
    seq_len: int,
    vocab_size: int,
    embedding_dim: int,
    hidden_dim: int,
    num_layers: int,
    out_proj: bool = False,
    causal: bool = False,
) -> int:
    """Return the FLOPs of a SimpleLLM's matrix products.

    A step counts three forwards, as is usual: backward has two products for each of forward's. `out_proj`: whether
    attention has an output projection (it does with more than one head).
    """
    tokens = batch * seq_len
    projections = (4 if out_proj else 3) * embedding_dim * embedding_dim
    layer = 2 * tokens * (projections + 2 * embedding_dim * hidden_dim)
    attention = attention_flops(FORWARD, batch * visible_pairs(seq_len, seq_len, causal), embedding_dim)
    forward = num_layers * (layer + attention) + 2 * tokens * embedding_dim * vocab_size
    return {FORWARD: 1, STEP: 3}[direction] * forward
