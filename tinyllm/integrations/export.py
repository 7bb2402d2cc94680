"""export: a trained SimpleLLM and its tokenizer for other people's programs."""

from __future__ import annotations

import os
from pathlib import Path

from tinyllm._internal.checks import check_choice
from tinyllm._internal.extras import from_extra
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
        out: for "hf" a new folder, for "gguf" a file, which may replace another GGUF file.
        to: "hf": a folder for `AutoModelForCausalLM` and `AutoTokenizer`. A model that is a GPT-2 becomes one; any
            other needs tinyllm where it is loaded, see `tinyllm.integrations.causal_lm`. "gguf": one file for llama.cpp
            and what is built on it.
        weights: how gguf stores them: "float32", "bf16", "int8" or "int4".

    Returns:
        A sentence that says what was written.

    Raises:
        FileExistsError: something is there.
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
    if not differs:
        model.save_pretrained(out, tokenizer=tokenizer)
        return f"{out} is a GPT-2: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it anywhere."
    with from_extra("hf"):
        from tinyllm.integrations import causal_lm
    causal_lm.TinyLLMForCausalLM.from_simple(model).save_pretrained(out)
    gpt2.save_tokenizer(Path(out), tokenizer, model.config.max_seq_len)
    return (
        f"{out} has the model_type tinyllm, as it is no GPT-2 ({'; '.join(differs)}): where tinyllm is installed, "
        f"AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True) loads it, or without the option "
        "after `import tinyllm.integrations.transformers`."
    )
