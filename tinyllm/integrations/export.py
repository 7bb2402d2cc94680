"""export: a trained SimpleLLM and its tokenizer for other people's programs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tinyllm._internal.checks import check_choice
from tinyllm._internal.extras import from_extra
from tinyllm._internal.files import new_folder, write_text
from tinyllm.model import SimpleLLM
from tinyllm.pretrained import gguf, gpt2
from tinyllm.quantization import weights_of
from tinyllm.tokenizer import Tokenizer

FORMATS = ("hf", "gguf")


def export(
    model: SimpleLLM, tokenizer: Tokenizer, out: str | os.PathLike[str], *, to: str, weights: str = "float32"
) -> str:
    """Write a model and its tokenizer in another program's format.

    Args:
        model: causal, with float32 weights.
        tokenizer: a BPE tokenizer of at most vocab_size ids.
        out: for "hf" a new folder, for "gguf" a new file.
        to: "hf": a folder for `AutoModelForCausalLM` and `AutoTokenizer`. A model that is a GPT-2 becomes one; any
            other needs tinyllm where it is loaded, see `tinyllm.integrations.causal_lm`. "gguf": one file for llama.cpp
            and what is built on it.
        weights: how gguf stores them: "float32", "bf16", "int8" or "int4".

    Returns:
        A sentence that says what was written.

    Raises:
        FileExistsError, NotADirectoryError: something is there.
        ModuleNotFoundError: the library that knows the format is not installed.
        ValueError: the format cannot hold the model or the tokenizer; the message names every reason.
    """
    check_choice("to", to, FORMATS)
    if (stored := weights_of(model)) != "float32":
        raise ValueError(f"the model's weights are stored as {stored!r}; export the original, in float32")
    if to == "gguf":
        gguf.save(out, model.config, model.state_dict(), tokenizer, weights)
        return f"{out} is a GGUF file of llama.cpp's architecture gpt2, with {weights} weights."
    if weights != "float32":
        raise ValueError(f"weights is {weights!r}; to 'hf' it must be 'float32': `tinyllm.optimize` stores fewer bits")
    if reasons := gpt2.not_theirs(tokenizer, model.config.vocab_size):
        raise ValueError(f"transformers cannot read this tokenizer: {'; '.join(reasons)}")
    differs = gpt2.not_gpt2(model.config, model.state_dict())
    with new_folder(out) as folder:
        if differs:
            _save_ours(folder, model, tokenizer)
        else:
            model.save_pretrained(folder, tokenizer=tokenizer)
        _save_generation_config(folder, model, tokenizer)
    if not differs:
        return f"{out} is a GPT-2: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it anywhere."
    return (
        f"{out} has the model_type tinyllm, as it is no GPT-2 ({'; '.join(differs)}). Where tinyllm is installed, "
        f"AutoModelForCausalLM and AutoTokenizer load it with trust_remote_code=True, or without after `import "
        "tinyllm.integrations.transformers`."
    )


def _save_ours(folder: Path, model: SimpleLLM, tokenizer: Tokenizer) -> None:
    with from_extra("hf"):
        from tinyllm.integrations.transformers import TinyLLMForCausalLM
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text_id)
    TinyLLMForCausalLM.from_simple(model, **ids).save_pretrained(folder)
    gpt2.save_tokenizer(folder, tokenizer, model.config.max_seq_len)


def _save_generation_config(folder: Path, model: SimpleLLM, tokenizer: Tokenizer) -> None:
    """Write where texts end for `generate` of transformers, whose pipelines else go on behind the last position."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text_id)
    values = {**ids, "max_length": model.config.max_seq_len}
    write_text(folder / "generation_config.json", json.dumps(values, indent=2) + "\n")
