"""GPT-2's folders, as Hugging Face's `transformers` keeps them: config.json and weights, from and to ours.

Two things differ besides names. The blocks' matrices lie (inputs, outputs) there, the transpose of an nn.Linear's, and
those of query, key and value are one, side by side. What its config can say and SimpleLLM cannot compute is an error
that names the option, and so is the other way round: nothing is loaded or saved approximately.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyllm._internal.checks import check_choice, check_heads, check_int, check_positive, check_probability
from tinyllm._internal.files import replacing, write_text
from tinyllm._internal.finite import not_finite
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.pretrained.tensors import SAFETENSORS_FILE, new_safetensors_file, stored_tensors
from tinyllm.tokenizer import BPETokenizer, Tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MODEL_TYPE = "gpt2"

# transformers' name for each of our activations comes first, as what is saved has it.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh"}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # and their defaults
_FIXED = {  # options, and the only value of each under which SimpleLLM computes the same
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_ABSENT = ("pruned_heads", "quantization_config")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PREFIX = "transformer."
_BUFFERS = ("attn.bias", "attn.masked_bias")  # causal masks, which older versions stored
_HEAD, _OUTPUT, _EMBEDDING = "lm_head.weight", "output.weight", "embedding.embedding.weight"


class Part(NamedTuple):
    """A tensor of GPT-2's.

    Attributes:
        name: without the prefix "transformer.", which is there in some files and not in others.
        shape: there.
        parameters: ours that it holds, side by side in its last dimension.
        transposed: whether each of them is the transpose of what is there.
    """

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    transposed: bool = False


def parts(config: SimpleLLMConfig) -> Iterator[Part]:
    """Yield every tensor of the GPT-2 of that config. A tied output is the embedding's, and no part of its own."""
    vocab_size, width, hidden = config.vocab_size, config.embedding_dim, config.hidden_dim
    yield Part("wte.weight", (vocab_size, width), (_EMBEDDING,))
    yield Part("wpe.weight", (config.max_seq_len, width), ("positional_encoding.weight",))
    for index in range(config.num_layers):
        theirs, ours = f"h.{index}.", f"transformer_blocks.{index}."
        yield from _norm(theirs + "ln_1", width, ours + "norm1")
        yield from _conv1d(
            theirs + "attn.c_attn", width, width, *(f"{ours}attention.{name}" for name in ("query", "key", "value"))
        )
        yield from _conv1d(theirs + "attn.c_proj", width, width, ours + "attention.out_proj")
        yield from _norm(theirs + "ln_2", width, ours + "norm2")
        yield from _conv1d(theirs + "mlp.c_fc", width, hidden, ours + "feed_forward.0")
        yield from _conv1d(theirs + "mlp.c_proj", hidden, width, ours + "feed_forward.2")
    yield from _norm("ln_f", width, "final_norm")
    if not config.tie_embeddings:
        yield Part(_HEAD, (vocab_size, width), (_OUTPUT,))


def _norm(theirs: str, width: int, ours: str) -> Iterator[Part]:
    for name in ("weight", "bias"):
        yield Part(f"{theirs}.{name}", (width,), (f"{ours}.{name}",))


def _conv1d(theirs: str, inputs: int, outputs: int, *ours: str) -> Iterator[Part]:
    """Yield the parts of linear layers that `transformers` keeps as one Conv1D."""
    yield Part(f"{theirs}.weight", (inputs, len(ours) * outputs), tuple(f"{name}.weight" for name in ours), True)
    yield Part(f"{theirs}.bias", (len(ours) * outputs,), tuple(f"{name}.bias" for name in ours))


# ---- Reading


def is_pretrained(directory: str | os.PathLike[str]) -> bool:
    """Return whether the config.json in a directory is of the kind that Hugging Face writes, of whatever model."""
    try:
        return "model_type" in read_json(Path(directory, CONFIG_FILE))
    except (OSError, ValueError):
        return False


def read_config(folder: Path) -> tuple[SimpleLLMConfig, dict[str, Any]]:
    """Read the config.json of a GPT-2. Options that it lacks have the values that `transformers` gives them.

    Returns:
        Ours, and the content of the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another model type, or SimpleLLM cannot compute what it asks for; the message
            names every such option.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}, which says what the model is")
    values = read_json(path)
    kind = values.get("model_type")
    if kind != MODEL_TYPE:
        run = " (it is that of a run of ours, which tinyllm.load_run loads)" if "model" in values else ""
        raise ValueError(f"{path} has the model_type {kind!r}; {MODEL_TYPE!r} and 'tinyllm' can be loaded{run}")
    problems: list[str] = []

    def checked(name: str, default: Any, check: Callable[..., Any], *limits: Any) -> Any:
        try:
            return check(name, values.get(name, default), *limits)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
            return default

    sizes = {name: checked(name, default, check_int, int(name != "n_layer")) for name, default in _SIZES.items()}
    hidden = 4 * sizes["n_embd"]
    if values.get("n_inner") is not None:
        hidden = checked("n_inner", hidden, check_int, 1)
    dropouts = {name: checked(name, 0.1, check_probability) for name in _DROPOUTS}
    eps = checked("layer_norm_epsilon", 1e-5, check_positive)
    activation = checked("activation_function", "gelu_new", check_choice, _ACTIVATIONS)
    try:
        check_heads(sizes["n_embd"], sizes["n_head"])
    except ValueError as error:
        problems.append(str(error).replace("embedding_dim", "n_embd").replace("num_heads", "n_head"))
    if sizes["n_head"] == 1:
        problems.append("n_head is 1; SimpleLLM's attention with one head has no output projection")
    if len({*dropouts.values()}) > 1:
        found = ", ".join(f"{name} {value}" for name, value in dropouts.items())
        problems.append(f"the dropouts differ ({found}); SimpleLLM has one for all")
    for name, needed in _FIXED.items():
        if (value := values.get(name, needed)) is not needed:
            problems.append(f"{name} is {value!r}; SimpleLLM computes what {needed} means")
    problems += [f"{name} is {values[name]!r}; SimpleLLM has no such thing" for name in _ABSENT if values.get(name)]
    tied = values.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings is {tied!r}; it must be true or false")
    if problems:
        raise ValueError(f"{path} describes a model that SimpleLLM is not: {'; '.join(problems)}")
    config = SimpleLLMConfig(
        sizes["vocab_size"],
        sizes["n_embd"],
        hidden,
        sizes["n_layer"],
        num_heads=sizes["n_head"],
        causal=True,
        max_seq_len=sizes["n_positions"],
        dropout=dropouts["resid_pdrop"],
        activation=_ACTIVATIONS[activation],
        norm_first=True,
        tie_embeddings=tied,
        position="learned",
        norm_eps=eps,
        output_bias=False,
    )
    return config, values


def read_weights(
    folder: Path, config: SimpleLLMConfig, store: Callable[[str, Tensor], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Read a GPT-2's weights as the state_dict of a SimpleLLM of that config; tied ones are the output's alone.

    Of safetensors one tensor at a time is in memory besides what is returned; of pickles all may be.

    Args:
        store: returns what the state_dict is to hold for a parameter, by its name and its tensor as it is in the file,
            which has to be copied.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is damaged, or tensors are missing, of no use, of another shape or dtype, or not finite; the
            message names all of them.
    """
    stored = stored_tensors(folder)
    if config.num_layers > len(stored):  # as a damaged config may say; to list what is missing would take all memory
        raise ValueError(
            f"{folder / CONFIG_FILE} has n_layer {config.num_layers}; the weights are {len(stored)} tensors"
        )
    names: dict[str, str] = {}  # as they are in the files, by the name without a prefix
    doubled = []
    for name in stored:
        short = name.removeprefix(_PREFIX)
        doubled += [f"{names[short]} and {name}"] if short in names else []
        names[short] = name
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    problems: list[str] = []
    copy = names.pop(_HEAD, None) if config.tie_embeddings else None  # of the embedding; safetensors have none
    for part in parts(config):
        if part.name not in names:
            missing.append(part.name)
            continue
        name = names.pop(part.name)
        tensor = stored[name].read()
        if tensor.shape != part.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}; {list(part.shape)} is needed")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} has dtype {tensor.dtype}; a floating one of 16 to 64 bits is needed")
        else:
            # As float32, in which a float64 may be infinite.
            if (wrong := not_finite(tensor.float())) is not None:
                problems.append(f"{name} holds {wrong}")
            found = _to_ours(tensor, part)
            if config.tie_embeddings and _EMBEDDING in found:
                if copy is not None and not torch.equal(stored[copy].read(), found[_EMBEDDING]):
                    problems.append(f"{copy} is not the embedding's, though tie_word_embeddings says so")
                found[_OUTPUT] = found.pop(_EMBEDDING)
            for parameter, value in found.items() if not problems else ():
                state |= store(parameter, value)
    buffers = {f"h.{index}.{name}" for index in range(config.num_layers) for name in _BUFFERS}
    unknown = [name for short, name in names.items() if short not in buffers]
    for what, those in (("missing", missing), ("not of this model", unknown), ("there twice", doubled)):
        problems += [f"{what}: {', '.join(those)}"] if those else []
    if problems:
        raise ValueError(f"the weights in {folder} are not those of its {CONFIG_FILE}: {'; '.join(problems)}")
    return state


def _to_ours(tensor: Tensor, part: Part) -> dict[str, Tensor]:
    pieces = tensor.chunk(len(part.parameters), dim=-1)
    if part.transposed:  # each contiguous first, as torch transposes such matrices faster
        pieces = tuple(piece.contiguous().t() for piece in pieces)
    return dict(zip(part.parameters, pieces, strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """Read a config.json. Raises ValueError: it is not JSON, or no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or is truncated: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a model's config: its JSON is not an object")
    return values


# ---- Writing


def save(
    directory: str | os.PathLike[str],
    config: SimpleLLMConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a folder that `transformers` and `SimpleLLM.from_pretrained` load: see `SimpleLLM.save_pretrained`."""
    reasons = [*not_gpt2(config, state), *not_theirs(tokenizer, config.vocab_size)]
    if reasons:
        raise ValueError(f"GPT-2's format cannot hold this model: {'; '.join(reasons)}")
    directory = Path(directory)
    _check_replaceable(directory, [SAFETENSORS_FILE, *([TOKENIZER_FILE, TOKENIZER_CONFIG_FILE] if tokenizer else [])])
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(config, state)}
    end = None if tokenizer is None else tokenizer.end_of_text_id
    dtype = str(tensors[f"{_PREFIX}wte.weight"].dtype).removeprefix("torch.")
    text = json.dumps(_to_theirs(config, dtype, end), indent=2) + "\n"
    # Both are written before either takes its name.
    with new_safetensors_file(directory / SAFETENSORS_FILE) as weights, replacing(directory / CONFIG_FILE) as described:
        save_file(tensors, weights, metadata={"format": "pt"})
        described.write_text(text, encoding="utf-8", newline="\n")
    if tokenizer is not None:
        save_tokenizer(directory, tokenizer, config.max_seq_len)


def save_tokenizer(directory: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write the files of a BPE tokenizer that `AutoTokenizer` reads."""
    tokenizer.save(directory / TOKENIZER_FILE)
    end = tokenizer.end_of_text_id
    special = {} if end is None else dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode([end]))
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len, **special}
    # Without it, transformers before 5 makes token_type_ids, whose vectors GPT-2 adds to the tokens'.
    values["model_input_names"] = ["input_ids", "attention_mask"]
    write_text(directory / TOKENIZER_CONFIG_FILE, json.dumps(values, indent=2) + "\n")


def tensors_of(config: SimpleLLMConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield GPT-2's tensors of a state_dict that is one, by their names in `transformers`."""
    for part in parts(config):
        pieces = [state[name].detach().cpu() for name in part.parameters]
        whole = torch.cat([piece.t() if part.transposed else piece for piece in pieces], dim=-1)
        yield part.name if part.name == _HEAD else _PREFIX + part.name, whole


def _to_theirs(config: SimpleLLMConfig, dtype: str, end_of_text_id: int | None) -> dict[str, Any]:
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.embedding_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.hidden_dim,
        "activation_function": activations[config.activation],
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "layer_norm_epsilon": config.norm_eps,
        **_FIXED,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "dtype": dtype,
    }


def not_gpt2(config: SimpleLLMConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Return every reason why a model is not a GPT-2."""
    reasons = {
        "causal is False; GPT-2's tokens see themselves and earlier ones only": not config.causal,
        "norm_first is False; GPT-2's norms come first": not config.norm_first,
        "bias is False; GPT-2's layers have biases": not config.bias,
        "output_bias is True; GPT-2's output has none": config.bias and config.output_bias,
        "num_heads is 1, without an output projection; GPT-2's attention has one": config.num_heads == 1,
        f"position is {config.position!r}; GPT-2's positions are learned": config.position != "learned",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        return found
    expected: dict[str, tuple[int, ...]] = {}
    for part in parts(config):
        shape = (*part.shape[:-1], part.shape[-1] // len(part.parameters))
        expected |= dict.fromkeys(part.parameters, shape[::-1] if part.transposed else shape)
    if config.tie_embeddings:
        expected[_OUTPUT] = expected[_EMBEDDING]
    if other := state.keys() ^ expected.keys():
        return [f"its parameters are no longer those of its config: {', '.join(sorted(other))}"]
    if config.tie_embeddings and not torch.equal(state[_OUTPUT], state[_EMBEDDING]):
        found.append("tie_embeddings is True, but output and embedding are no longer one")
    found += [
        f"{name} has shape {list(state[name].shape)}; {list(shape)} is what its config says"
        for name, shape in expected.items()
        if state[name].shape != shape
    ]
    if len(dtypes := {str(tensor.dtype) for tensor in state.values()}) > 1:
        found.append(f"its parameters are of the dtypes {', '.join(sorted(dtypes))}; one is needed")
    if not {tensor.dtype for tensor in state.values()} <= {*FLOATS}:
        found.append(f"its dtype is {', '.join(dtypes)}")
    return found


def not_theirs(tokenizer: Tokenizer | None, vocab_size: int) -> list[str]:
    """Return every reason why the library `tokenizers` cannot hold a tokenizer of a model with so many ids."""
    if tokenizer is None:
        return []
    if not isinstance(tokenizer, BPETokenizer):
        return [f"its tokenizer is a {tokenizer.kind} tokenizer, which the library tokenizers cannot read"]
    if tokenizer.vocab_size > vocab_size:
        return [f"its tokenizer has {tokenizer.vocab_size} ids, and the model {vocab_size}"]
    return []


def _check_replaceable(directory: Path, names: list[str]) -> None:
    """Raise an error unless a GPT-2's files may be written there: on those of another GPT-2, but of nothing else."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory {directory} is a file; a folder, or a name not yet taken, is needed")
    path = directory / CONFIG_FILE
    if path.exists():
        try:
            kind = read_json(path).get("model_type")
        except (OSError, ValueError):
            kind = None
        if kind != MODEL_TYPE:
            raise FileExistsError(f"{path} is not a {MODEL_TYPE}'s, and not replaced; choose another directory")
    elif taken := [name for name in names if (directory / name).exists()]:
        raise FileExistsError(
            f"{directory} has a {taken[0]} without a {CONFIG_FILE} that says whose it is, and it is not replaced; "
            "choose another directory"
        )
