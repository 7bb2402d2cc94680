"""What transformers learns from us, registered there when this module is imported.

    import tinyllm.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tinyllm")  # our attention in any model
    model = AutoModelForCausalLM.from_pretrained("exported/tiny")  # a SimpleLLM, see `tinyllm export`

`tinyllm.optimize` needs no such name: it gives it to the attention modules of one model.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from tinyllm.integrations.attention import attention
from tinyllm.integrations.causal_lm import TinyLLMConfig, TinyLLMForCausalLM

__all__ = ["TinyLLMConfig", "TinyLLMForCausalLM", "attention"]

AutoConfig.register(TinyLLMConfig.model_type, TinyLLMConfig)
AutoModelForCausalLM.register(TinyLLMConfig, TinyLLMForCausalLM)
