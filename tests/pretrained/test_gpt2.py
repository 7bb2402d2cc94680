"""Hugging Face's GPT-2 and ours: the same numbers, the same weights there and back, and refusals of all else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.needs import needs_transformers
from tests.helpers.runs import environment
from tinyllm import SimpleLLM, SimpleLLMConfig
from tinyllm.pretrained import gpt2
from tinyllm.tokenizer import BPETokenizer, WordTokenizer

GPT2 = SimpleLLMConfig(
    *(11, 8, 20, 2, 2, True, 7, 0.0, "gelu_tanh"),
    norm_first=True,
    tie_embeddings=True,
    position="learned",
    norm_eps=1e-4,
    output_bias=False,
)
# As options of GPT2Config.
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
MODELS: dict[str, dict[str, Any]] = {
    "small": dict(zip(SIZES, (65, 16, 24, 2, 3, None), strict=True)),
    "odd": dict(zip(SIZES, (101, 9, 35, 3, 5, 77), strict=True)) | {"layer_norm_epsilon": 1e-3},
    "untied": dict(zip(SIZES, (23, 33, 16, 1, 2, 64), strict=True)) | {"tie_word_embeddings": False},
    "gelu": dict(zip(SIZES, (50, 20, 32, 4, 4, None), strict=True)) | {"activation_function": "gelu"},
    "relu": dict(zip(SIZES, (50, 20, 32, 2, 4, 8), strict=True)) | {"activation_function": "relu"},
    "tanh in one call": dict(zip(SIZES, (40, 130, 64, 2, 2, None), strict=True))
    | {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-6},
    "no layers": dict(zip(SIZES, (12, 8, 8, 0, 2, None), strict=True)),
}


def hugging_face(seed: int = 0, **options: Any) -> Any:
    """Return a GPT2LMHeadModel whose parameters are all random, biases and norms too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(**dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), **options)
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def ours(seed: int = 0, config: SimpleLLMConfig = GPT2) -> SimpleLLM:
    torch.manual_seed(seed)
    model = SimpleLLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def saved(directory: Path, seed: int = 0) -> SimpleLLM:
    model = ours(seed)
    model.save_pretrained(directory)
    return model


def assert_equal(model: SimpleLLM, other: SimpleLLM) -> None:
    assert model.config == other.config
    assert list(model.state_dict()) == list(other.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- The same numbers


def logits_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(ids[:, :-1])
    logits = out if isinstance(out, Tensor) else out.logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return logits.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def under_our_names(tensors: dict[str, Tensor], config: SimpleLLMConfig) -> dict[str, Tensor]:
    found = {}
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for part in gpt2.parts(config):
        pieces = named[part.name].chunk(len(part.parameters), dim=-1)
        found |= {
            name: piece.t() if part.transposed else piece for name, piece in zip(part.parameters, pieces, strict=True)
        }
    return found


@needs_transformers
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_and_gradients_are_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    """Against float64, our error is at most twice that of transformers, plus a rounding per operator."""
    theirs = hugging_face(**options)
    theirs.save_pretrained(tmp_path)
    model = SimpleLLM.from_pretrained(tmp_path)
    config = model.config
    ids = torch.randint(config.vocab_size, (3, config.max_seq_len + 1), generator=torch.Generator().manual_seed(1))
    logits, gradients = logits_and_gradients(model, ids)
    plain, plain_gradients = logits_and_gradients(theirs, ids)
    exact, exact_gradients = logits_and_gradients(copy.deepcopy(theirs).double(), ids)
    plain_gradients, exact_gradients = (under_our_names(x, config) for x in (plain_gradients, exact_gradients))
    floor = (4 * config.num_layers + 2) * 2**-24  # two norms and two products a block, and the ends

    def check(name: str, a: Tensor, b: Tensor, true: Tensor, scale: Tensor) -> None:
        assert (a - true).abs().max() <= 2 * (b - true).abs().max() + floor * scale, name

    check("logits", logits, plain, exact, exact.abs().max())
    assert gradients.keys() == exact_gradients.keys()
    # Some gradients are zero but for rounding (a key's bias cancels in the softmax): scale of all.
    scale = torch.stack([gradient.abs().max() for gradient in exact_gradients.values()]).max()
    for name, gradient in gradients.items():
        check(name, gradient, plain_gradients[name], exact_gradients[name], scale)


# ---- There and back


@needs_transformers
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_transformers_keeps_every_bit(tied: bool, activation: str, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    values = GPT2.to_dict() | {"tie_embeddings": tied, "activation": activation, "dropout": 0.25}
    model = ours(config=SimpleLLMConfig.from_dict(values))
    model.save_pretrained(tmp_path / "ours")
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == tied
    named = under_our_names(dict(theirs.named_parameters()), model.config)
    for name, parameter in model.named_parameters():
        assert torch.equal(named[name], parameter), name
    theirs.save_pretrained(tmp_path / "theirs")
    back = SimpleLLM.from_pretrained(tmp_path / "theirs")
    assert_equal(model, back)
    assert not back.training
    assert (back.output.weight is back.embedding.embedding.weight) == tied
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in back.parameters())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = saved(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()
    assert "lm_head.weight" not in stored
    assert_equal(model, SimpleLLM.from_pretrained(tmp_path))


@needs_transformers
def test_the_config_is_one_of_transformers_own_options(tmp_path: Path) -> None:
    from transformers import GPT2Config

    saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    known = GPT2Config().to_dict()
    assert values.keys() <= known.keys()
    described = GPT2Config.from_pretrained(tmp_path)
    assert {name: value for name, value in described.to_dict().items() if name in values} == values


@needs_transformers
def test_options_that_a_config_lacks_have_transformers_defaults(tmp_path: Path) -> None:
    from transformers import GPT2Config

    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    config, _ = gpt2.read_config(tmp_path)
    GPT2Config().save_pretrained(tmp_path / "whole")
    assert config == gpt2.read_config(tmp_path / "whole")[0]
    assert (config.embedding_dim, config.hidden_dim, config.dropout) == (768, 3072, 0.1)


def test_other_dtypes_are_kept_in_files_and_loaded_as_float32(tmp_path: Path) -> None:
    model = ours().bfloat16()
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(model.float(), SimpleLLM.from_pretrained(tmp_path))


def test_a_loaded_model_can_be_trained_and_does_not_depend_on_its_file(tmp_path: Path) -> None:
    saved(tmp_path)
    model = SimpleLLM.from_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).detach()
    model.loss(ids, ids).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model(ids), before)
    assert model.output.weight is model.embedding.embedding.weight


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    SimpleLLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_does_not_import_what_takes_seconds(tmp_path: Path) -> None:
    saved(tmp_path)
    code = "import sys, tinyllm; tinyllm.SimpleLLM.from_pretrained(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# ---- Configs that are refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; SimpleLLM computes what True means"),
        (
            {"activation_function": "silu"},
            """activation_function is 'silu'; it must be "gelu_new", "gelu", "relu" or""",
        ),
        ({"attn_pdrop": 0.5}, r"the dropouts differ \(resid_pdrop 0.0, embd_pdrop 0.0, attn_pdrop 0.5\)"),
        ({"embd_pdrop": 1.0}, "embd_pdrop is 1.0; it must be from 0"),
        ({"n_head": 1}, "n_head is 1; .* no output projection"),
        ({"n_head": 3}, "n_embd is 8 and n_head 3; n_embd must be divisible by n_head"),
        ({"n_embd": 0}, "n_embd is 0; it must be at least 1"),
        ({"n_layer": "2"}, "n_layer is '2'; it must be an integer of at least 0"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; it must be positive"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None; it must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*; SimpleLLM has no such thing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"n_positions": 0, "scale_attn_weights": False}, "n_positions is 0.*; scale_attn_weights is False"),
        ({"model_type": "llama"}, "has the model_type 'llama'; 'gpt2' and 'tinyllm' can be loaded"),
        ({"model_type": None}, "has the model_type None"),
        ({"model_type": None, "model": {}}, "it is that of a run of ours, which tinyllm.load_run loads"),
    ],
)
def test_a_config_that_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    saved(tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"config\.json.*{says}"):
        SimpleLLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", '{"model_type": "gpt2"', "[1]", "null", "\x80"])
def test_a_config_that_is_none(content: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is not"):
        SimpleLLM.from_pretrained(tmp_path)


# ---- Models that are not saved


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"causal": False}, ["causal is False"]),
        ({"norm_first": False}, ["norm_first is False"]),
        ({"bias": False}, ["bias is False"]),
        ({"output_bias": True}, ["output_bias is True; GPT-2's output has none"]),
        ({"num_heads": 1}, ["num_heads is 1, without an output projection"]),
        ({"position": "sinusoidal"}, ["position is 'sinusoidal'"]),
        ({"causal": False, "norm_first": False, "output_bias": True}, ["causal", "norm_first", "output_bias"]),
    ],
)
def test_a_model_that_is_no_gpt2(change: dict[str, Any], says: list[str], tmp_path: Path) -> None:
    model = SimpleLLM.from_config(SimpleLLMConfig.from_dict(GPT2.to_dict() | change))
    with pytest.raises(ValueError, match="GPT-2's format cannot hold this model: " + ".*; ".join(says)):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_whose_modules_were_replaced_is_not_saved(tmp_path: Path) -> None:
    model = ours()
    model.output = nn.Linear(8, 11)
    with pytest.raises(ValueError, match=r"no longer those of its config: output\.bias"):
        model.save_pretrained(tmp_path / "new")
    model.output = nn.Linear(8, 11, bias=False)
    with pytest.raises(ValueError, match="tie_embeddings is True, but output and embedding are no longer one"):
        model.save_pretrained(tmp_path / "new")
    model = ours()
    model.transformer_blocks[0].feed_forward[0] = nn.Linear(8, 19)
    with pytest.raises(ValueError, match=r"feed_forward.0.weight has shape \[19, 8\]; \[20, 8\] is .*bias has shape"):
        model.save_pretrained(tmp_path / "new")
    model = ours()
    model.final_norm.double()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"dtypes torch.float32, torch.float64; one is needed"):
        model.save_pretrained(tmp_path / "new")


def test_another_gpt2_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = saved(tmp_path, seed=1)
    assert_equal(model, SimpleLLM.from_pretrained(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", '{"model": {}, "training": {}}'),
        ("config.json", "mine"),
        ("model.safetensors", "mine"),
    ],
)
def test_nothing_of_another_kind_is_replaced(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FileExistsError, match=rf"{name}.* not replaced"):
        ours().save_pretrained(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_a_file_in_the_directorys_place_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        ours().save_pretrained(tmp_path / "file")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(gpt2, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        ours(1).save_pretrained(tmp_path)
    assert_equal(model, SimpleLLM.from_pretrained(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (WordTokenizer({"a": 0, "<UNK>": 1}), "its tokenizer is a word tokenizer, which the library tokenizers cannot"),
        (BPETokenizer.from_texts(["a"], 257), "its tokenizer has 257 ids, and the model 11"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_not_saved(tokenizer: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        ours().save_pretrained(tmp_path / "new", tokenizer=tokenizer)
    assert not (tmp_path / "new").exists()
