"""The operators: functions named and shaped like PyTorch's, each served by the best backend for its input.

Gradients come from a torch.autograd.Function around raw operators, and not from torch.library.register_autograd, which
adds 40 us to a call where the Function adds 15 and a small kernel takes 5. One Function also serves the namespaces of
all backends, and a second derivative goes through the reference.
"""

from tinyllm.ops import decoder as _decoder  # noqa: F401  # which declares an operator
from tinyllm.ops._context import active_transform
from tinyllm.ops.adamw import adamw_norm, adamw_step
from tinyllm.ops.attention import scaled_dot_product_attention
from tinyllm.ops.cross_entropy import cross_entropy
from tinyllm.ops.dispatch import backend, last_backend
from tinyllm.ops.embedding import embedding
from tinyllm.ops.gated_activation import gated_activation, gated_feed_forward
from tinyllm.ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tinyllm.ops.linear import feed_forward, linear
from tinyllm.ops.linear_cross_entropy import linear_cross_entropy
from tinyllm.ops.quantized_linear import QuantizedWeight, quantize_weight, quantized_embedding, quantized_linear
from tinyllm.ops.rotary_embedding import rotary_embedding
from tinyllm.ops.transformer import transformer, transformer_block

__all__ = [
    "QuantizedWeight",
    "active_transform",
    "adamw_norm",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "gated_activation",
    "gated_feed_forward",
    "last_backend",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "quantize_weight",
    "quantized_embedding",
    "quantized_linear",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "transformer",
    "transformer_block",
]
