"""Our attention and our models for transformers, registered there when this module is imported.

    import tinyllm.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tinyllm")  # our attention in any model
    model = AutoModelForCausalLM.from_pretrained("exported/tiny")  # a SimpleLLM, see `tinyllm export`

`tinyllm.optimize` needs no such name: it gives it to the attention modules of one model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyllm._internal.extras import from_extra

with from_extra("hf"):
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    from tinyllm.integrations.attention import attention

_OLDEST = (5, 12)  # for our models; our attention is content with older ones

if TYPE_CHECKING or tuple(map(int, __version__.split(".")[:2])) >= _OLDEST:
    from tinyllm.integrations.causal_lm import TinyLLMConfig, TinyLLMForCausalLM

    AutoConfig.register(TinyLLMConfig.model_type, TinyLLMConfig)
    AutoModelForCausalLM.register(TinyLLMConfig, TinyLLMForCausalLM)

__all__ = ["TinyLLMConfig", "TinyLLMForCausalLM", "attention"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        oldest = ".".join(map(str, _OLDEST))
        raise ImportError(f"transformers is {__version__}; the models of tinyllm need {oldest} or later")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
