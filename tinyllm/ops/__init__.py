"""The operators: functions named and shaped like PyTorch's, each served by the best backend for its input."""

from tinyllm.ops.attention import scaled_dot_product_attention
from tinyllm.ops.dispatch import backend, last_backend
from tinyllm.ops.layer_norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "backend", "last_backend", "layer_norm", "scaled_dot_product_attention"]
