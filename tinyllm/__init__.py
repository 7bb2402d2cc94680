"""Fused language-model kernels for PyTorch, and `SimpleLLM`, a model built on them."""

__version__ = "0.1.0"

from tinyllm import nn, ops
from tinyllm.allocator import tune_allocator
from tinyllm.info import info
from tinyllm.model import SimpleLLM, SimpleLLMConfig

__all__ = ["SimpleLLM", "SimpleLLMConfig", "__version__", "info", "nn", "ops", "tune_allocator"]
