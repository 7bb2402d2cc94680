"""A SimpleLLM as llama.cpp and what is built on it read it: a GGUF file of the architecture "gpt2".

Names, shapes and quantised types are those of llama.cpp's own converter for GPT-2 (`convert_hf_to_gguf.py`). The file
is written by the library `gguf`, of the same project.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllm._internal.checks import check_choice
from tinyllm._internal.extras import from_extra
from tinyllm._internal.files import replacing
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.pretrained import gpt2
from tinyllm.tokenizer import BPETokenizer, Tokenizer

WEIGHTS = ("float32", "bf16", "int8", "int4")
_TYPES = {"float32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # of the blocks' matrices
_BLOCK = 32  # columns of a quantised row that share a scale
_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of Hugging Face's GPT-2, such as "transformer.h.3.ln_1.weight"."""
    path, _, kind = name.removeprefix("transformer.").rpartition(".")
    if not path.startswith("h."):
        return f"{_NAMES[path]}.{kind}"
    _, layer, part = path.split(".", 2)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def save(
    path: str | os.PathLike[str],
    config: SimpleLLMConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    weights: str = "float32",
) -> None:
    """Write a model and its tokenizer as one GGUF file, whole or not at all.

    llama.cpp computes GELU by tanh, from a table of 16-bit numbers, also where a model has the exact one.

    Args:
        path: a new file.
        config, state: the model's config and state_dict, with float32 weights.
        tokenizer: a byte-level BPE that splits words as GPT-2's does, of at most vocab_size ids.
        weights: how the blocks' matrices are stored: "float32", "bf16", "int8" (Q8_0) or "int4" (Q4_0); of int4, the
            embedding and the output in Q8_0.

    Raises:
        FileExistsError: something is there.
        ModuleNotFoundError: the library `gguf` is not installed.
        ValueError: GGUF's "gpt2" cannot hold the model or the tokenizer; the message names every reason.
    """
    check_choice("weights", weights, WEIGHTS)
    reasons = [*gpt2.not_gpt2(config, state), *gpt2.not_theirs(tokenizer, config.vocab_size)]
    if config.activation == "relu":
        reasons.append("activation is 'relu'; llama.cpp computes GELU")
    if _TYPES[weights].startswith("Q") and (wrong := _not_in_blocks(config)):
        reasons.append(f"{wrong}; weights {weights!r} share scales in blocks of {_BLOCK} columns")
    if not reasons:
        reasons += _not_gpt2_words(tokenizer)
    if reasons:
        raise ValueError(f"GGUF cannot hold this model: {'; '.join(reasons)}")
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"out {path} is there, and not replaced; choose another name")
    assert isinstance(tokenizer, BPETokenizer)
    with from_extra("hf"):
        import gguf
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        _describe(writer, config, weights)
        _add_tokens(writer, tokenizer, config.vocab_size)
        for name, tensor in gpt2.tensors_of(config, state):
            _add_tensor(writer, name, tensor, weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _not_in_blocks(config: SimpleLLMConfig) -> str | None:
    sizes = {"embedding_dim": config.embedding_dim, "hidden_dim": config.hidden_dim}
    wrong = [f"{name} is {size}" for name, size in sizes.items() if size % _BLOCK]
    return " and ".join(wrong) or None


def _not_gpt2_words(tokenizer: Tokenizer) -> list[str]:
    """Return why llama.cpp would divide text into other tokens than a BPE tokenizer does."""
    content = tokenizer.to_dict() if isinstance(tokenizer, BPETokenizer) else {}
    model, splits = content.get("model", {}), content.get("pre_tokenizer") or {}
    reasons = []
    if tokenizer.end_of_text_id is None:
        reasons.append("its tokenizer has no token that ends a text; llama.cpp would take token 11 for it")
    if model.get("type") != "BPE":
        reasons.append(f"its tokenizer is a {model.get('type')} one; a byte-level BPE is needed")
    elif splits.get("type") != "ByteLevel" or splits.get("add_prefix_space") or splits.get("use_regex") is False:
        reasons.append("its tokenizer splits words otherwise than GPT-2's")
    elif content.get("normalizer") or model.get("byte_fallback") or model.get("ignore_merges"):
        reasons.append("its tokenizer changes text, or merges it, otherwise than GPT-2's")
    return reasons


def _describe(writer: Any, config: SimpleLLMConfig, weights: str) -> None:
    import gguf

    types = gguf.LlamaFileType
    files = {"float32": "ALL_F32", "bf16": "MOSTLY_BF16", "int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}
    writer.add_file_type(types[files[weights]])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embedding_dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.norm_eps)


def _add_tokens(writer: Any, tokenizer: BPETokenizer, vocab_size: int) -> None:
    """Write the vocabulary; ids without a token, to which vocabularies are padded, are marked as unused."""
    import gguf

    kinds = gguf.TokenType
    content = tokenizer.to_dict()
    tokens = [(f"[PAD{i}]", kinds.UNUSED) for i in range(vocab_size)]
    for token, i in content["model"]["vocab"].items():
        tokens[i] = (token, kinds.NORMAL)
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    if (end := tokenizer.end_of_text_id) is not None:
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)


def _add_tensor(writer: Any, name: str, tensor: Tensor, weights: str) -> None:
    import gguf

    new_name = gguf_name(name)
    kind = "F32"
    if tensor.dim() == 2 and new_name.startswith("blk."):
        tensor, kind = tensor.t(), _TYPES[weights]  # a Conv1D's weight lies (inputs, outputs)
    elif new_name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0" if weights == "int4" else _TYPES[weights]
    data = tensor.detach().to(torch.float32).contiguous().numpy()
    stored = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(new_name, gguf.quants.quantize(data, stored), raw_dtype=stored)
