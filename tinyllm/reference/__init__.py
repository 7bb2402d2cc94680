"""The specification: what each operator and module computes, in plain PyTorch.

Nothing here is fast, and nothing here needs the compiled kernels. Every kernel is tested against
the function of its own name, and `tinyllm.SimpleLLM` against the model of this package.
"""

from tinyllm.reference.functional import (
    ACTIVATIONS,
    BLOCK_PARAMETERS,
    adamw_norm,
    adamw_step,
    add_layer_norm,
    add_rms_norm,
    cross_entropy,
    embedding,
    feed_forward,
    gated_activation,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary_embedding,
    scaled_dot_product_attention,
    transformer,
    transformer_block,
)
from tinyllm.reference.model import (
    Embedding,
    PositionalEncoding,
    SelfAttention,
    SimpleLLM,
    TransformerBlock,
    sinusoidal_table,
    tokenize,
)
from tinyllm.reference.quantized import dequantize_weight, quantize_weight

__all__ = [
    "ACTIVATIONS",
    "BLOCK_PARAMETERS",
    "Embedding",
    "PositionalEncoding",
    "SelfAttention",
    "SimpleLLM",
    "TransformerBlock",
    "adamw_norm",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "dequantize_weight",
    "embedding",
    "feed_forward",
    "gated_activation",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "quantize_weight",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "sinusoidal_table",
    "tokenize",
    "transformer",
    "transformer_block",
]
