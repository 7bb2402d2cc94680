"""A GPT-2 as llama.cpp reads it: its weights, quantized where that is asked for, and its tokens in a GGUF file.

Names, shapes and quantized types are those of llama.cpp's own converter for GPT-2 (`convert_hf_to_gguf.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

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
}


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of Hugging Face's GPT-2, such as "transformer.h.3.ln_1.weight"."""
    path, _, kind = name.removeprefix("transformer.").rpartition(".")
    if not path.startswith("h."):
        return f"{_NAMES[path]}.{kind}"
    _, layer, part = path.split(".", 2)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def write_gguf(folder: Path, path: Path, weights: str) -> None:
    """Write the model of a Hugging Face folder.

    Args:
        folder: config.json, model.safetensors and tokenizer.json with a byte-level BPE.
        path: the file to write.
        weights: "float32", "int8" (Q8_0), or "int4" (Q4_0, the embedding, which is the output too, in Q8_0).
    """
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    types = gguf.GGMLQuantizationType
    matrix = {"float32": types.F32, "int8": types.Q8_0, "int4": types.Q4_0}[weights]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        new_name = gguf_name(name)
        if tensor.ndim == 2 and new_name.startswith("blk."):
            tensor = tensor.T  # Conv1D keeps (inputs, outputs)
        kind = types.F32
        if new_name == "token_embd.weight":
            kind = types.F32 if weights == "float32" else types.Q8_0
        elif tensor.ndim == 2 and new_name != "position_embd.weight":
            kind = matrix
        data = np.ascontiguousarray(tensor, dtype=np.float32)
        writer.add_tensor(new_name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
