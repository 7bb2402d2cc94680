"""Small random models of the families that `tinyllm.optimize` is tested on, with weights that tell mistakes apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCAB = 97
_COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_GPT2 = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}
_GPT2 |= dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
_LLAMA = {
    **_COMMON,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _random(model: nn.Module) -> nn.Module:
    """Draw every parameter, since fresh norms are ones and biases zeros, which hide what multiplies or adds them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() < 2 else 1.5 * parameter.size(-1) ** -0.5
            one = parameter.dim() == 1 and bool((parameter == 1).all())  # a norm's
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + one)
    return model.eval()


def _causal(config: Callable[..., Any], model: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: _random(getattr(transformers, model)(config(**settings)))


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _causal(
        transformers.GPT2Config, "GPT2LMHeadModel", **_COMMON, **_GPT2
    ),
    "gpt2 scaled by layer": _causal(
        transformers.GPT2Config, "GPT2LMHeadModel", **_COMMON, **_GPT2,
        scale_attn_by_inverse_layer_idx=True, activation_function="relu",
    ),
    "gpt_neox": _causal(
        transformers.GPTNeoXConfig, "GPTNeoXForCausalLM", **_COMMON, hidden_size=48, intermediate_size=100,
        num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=64,
    ),
    "gpt_neox not parallel": _causal(
        transformers.GPTNeoXConfig, "GPTNeoXForCausalLM", **_COMMON, hidden_size=48, intermediate_size=100,
        num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=64, use_parallel_residual=False,
    ),
    "opt": _causal(
        transformers.OPTConfig, "OPTForCausalLM", **_COMMON, hidden_size=48, ffn_dim=100, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=48, dropout=0.0,
    ),
    "opt post-norm": _causal(
        transformers.OPTConfig, "OPTForCausalLM", **_COMMON, hidden_size=48, ffn_dim=100, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False,
        dropout=0.0,
    ),
    "llama": _causal(transformers.LlamaConfig, "LlamaForCausalLM", **_LLAMA),
    "llama with biases": _causal(
        transformers.LlamaConfig, "LlamaForCausalLM", **_LLAMA, attention_bias=True, mlp_bias=True, hidden_act="gelu"
    ),
    "mistral with a window": _causal(transformers.MistralConfig, "MistralForCausalLM", **_LLAMA, sliding_window=7),
    "qwen2": _causal(transformers.Qwen2Config, "Qwen2ForCausalLM", **_LLAMA, tie_word_embeddings=True),
    "qwen3": _causal(transformers.Qwen3Config, "Qwen3ForCausalLM", **_LLAMA, head_dim=16),
    "gemma": _causal(transformers.GemmaConfig, "GemmaForCausalLM", **_LLAMA, head_dim=12),
}  # fmt: skip


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=100,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _random(transformers.BertForMaskedLM(config))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100, image_size=32, patch_size=8
    )
    return _random(transformers.ViTForImageClassification(config))


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=100, decoder_ffn_dim=100, num_mel_bins=8, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return _random(transformers.WhisperModel(config)).encoder


OTHERS: dict[str, Callable[[], nn.Module]] = {"bert": _bert, "vit": _vit, "whisper's encoder": _whisper}
FAMILIES = CAUSAL | OTHERS


def inputs_of(name: str, batch: int = 2, tokens: int = 11, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return inputs of a family's model."""
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)}
    if name == "whisper's encoder":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def output_of(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Return the first tensor of a model's output."""
    out: Tensor = model(**inputs, **options)[0]
    return out
