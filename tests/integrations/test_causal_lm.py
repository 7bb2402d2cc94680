"""SimpleLLM as a model of transformers computes what the GPT-2 with the same weights does, in every way to call it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tinyllm
from tests.helpers.runs import environment
from tinyllm import SimpleLLM, SimpleLLMConfig
from tinyllm.integrations.export import export
from tinyllm.quantization import quantize
from tinyllm.tokenizer import BPETokenizer

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("tinyllm.integrations.transformers")

pytestmark = [
    pytest.mark.any_build,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
VOCAB = 97
SIZES = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}
DROPOUTS = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
OTHER_KINDS = {
    "the article's, but causal": {},
    "heads": {"num_heads": 3, "bias": False, "position": "learned", "tie_embeddings": True},
    "pre-norm": {"num_heads": 2, "norm_first": True, "activation": "gelu"},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a GPT-2 of transformers, and ours with its weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = transformers.GPT2Config(vocab_size=VOCAB, **SIZES, **DROPOUTS, **tokens, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    theirs.save_pretrained(folder)
    ours = integration.TinyLLMForCausalLM.from_simple(SimpleLLM.from_pretrained(folder))
    ours.generation_config = copy.deepcopy(theirs.generation_config)
    return theirs, ours


def ids_of(batch=2, length=9, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, by=3):
    """Return ids behind padding in the first row, and their mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :by], mask[0, :by] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def block_mask():
    """Return a 4-D mask: each token sees itself and one before it."""
    return torch.ones(9, 9).tril().triu(-1).bool()[None, None]


CALLS = {
    "plain": lambda: {"input_ids": ids_of(), "use_cache": False},
    "with a cache": lambda: {"input_ids": ids_of()},
    "padding on the left": lambda: padded(ids_of()),
    "padding on the right": lambda: {
        "input_ids": ids_of(),
        "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
    },
    "a mask of four dimensions": lambda: {"input_ids": ids_of(), "attention_mask": block_mask()},
    "packed sequences": lambda: {
        "input_ids": ids_of(1),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
        "use_cache": False,
    },
    "positions": lambda: {"input_ids": ids_of(), "position_ids": torch.arange(9)[None] + 20},
    "the last logits": lambda: {"input_ids": ids_of(), "logits_to_keep": 1},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward(pair, call, dtype):
    theirs, ours = (copy.deepcopy(model).to(dtype) for model in pair)
    inputs = CALLS[call]()
    with torch.no_grad():
        expected, found = theirs(**inputs), ours(**inputs)
    real = inputs.get("attention_mask", torch.ones(1))
    kept = real.bool() if real.dim() == 2 and "logits_to_keep" not in inputs else ...  # what padding gives is noise
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(found.logits[kept], expected.logits[kept], **tolerance)
    assert found.logits.dtype == dtype


def test_hidden_states_and_embeddings(pair):
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(ids_of(), output_hidden_states=True)
        found = ours(ids_of(), output_hidden_states=True)
        assert len(found.hidden_states) == len(expected.hidden_states)
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        embeds = ours.get_input_embeddings()(ids_of())
        torch.testing.assert_close(ours(inputs_embeds=embeds).logits, ours(ids_of()).logits)
        logits, *_ = ours(ids_of(), return_dict=False)
        assert torch.equal(logits, found.logits)


@pytest.mark.parametrize("inputs", [{"input_ids": ids_of()}, padded(ids_of())], ids=["plain", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(pair, inputs, checkpointing):
    theirs, ours = copy.deepcopy(pair)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 0, -100)
    for model in (theirs, ours):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=labels).loss.backward()
    torch.testing.assert_close(
        ours.model.embedding.embedding.weight.grad, theirs.transformer.wte.weight.grad, rtol=1e-4, atol=1e-6
    )
    first, block = theirs.transformer.h[0], ours.model.transformer_blocks[0]
    torch.testing.assert_close(block.feed_forward[0].weight.grad, first.mlp.c_fc.weight.grad.t(), rtol=1e-4, atol=1e-6)
    query = first.attn.c_attn.weight.grad[:, :48].t()
    torch.testing.assert_close(block.attention.query.weight.grad, query, rtol=1e-4, atol=1e-6)
    items = ours(**inputs, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(items, theirs(**inputs, labels=labels, num_items_in_batch=7).loss)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 8},
    "without a cache": {"use_cache": False},
    "a cache of a fixed length": {"cache_implementation": "static"},
    "penalised": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", [{"input_ids": ids_of()}, padded(ids_of())], ids=["plain", "padded"])
def test_generate(pair, way, inputs):
    written = []
    for model in pair:
        torch.manual_seed(0)
        written.append(model.generate(**inputs, max_new_tokens=12, **{"do_sample": False} | WAYS[way]))
    assert torch.equal(*written)


def test_guesses_and_an_assistant(pair):
    theirs, ours = pair
    plain = theirs.generate(ids_of(1), max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids_of(1), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(ours.generate(ids_of(1), max_new_tokens=12, do_sample=False, assistant_model=theirs), plain)


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_sixteen_bits(kind, tmp_path):
    """Every way to get a model in bfloat16 gives one whose positions have that dtype, too."""
    torch.manual_seed(0)
    model = SimpleLLM(VOCAB, 48, 80, 2, causal=True, max_seq_len=40, **OTHER_KINDS[kind])
    integration.TinyLLMForCausalLM.from_simple(model).save_pretrained(tmp_path)
    config = integration.TinyLLMConfig.from_simple(model.config)
    auto = transformers.AutoModelForCausalLM
    made = [auto.from_pretrained(tmp_path, dtype=torch.bfloat16), auto.from_config(config, dtype=torch.bfloat16)]
    made[0].save_pretrained(tmp_path / "half")
    made.append(auto.from_pretrained(tmp_path / "half", dtype="auto"))
    for each in made:
        with torch.no_grad():
            assert each.eval()(ids_of(), use_cache=False).logits.dtype == torch.bfloat16
            assert each(ids_of()).logits.dtype == torch.bfloat16
        each.train()(ids_of(), labels=ids_of()).loss.backward()
    with torch.no_grad():
        expected = model.eval()(ids_of())
        for each in (made[0], made[2]):
            difference = (each.eval()(ids_of(), use_cache=False).logits.float() - expected).abs().max()
            assert difference < 0.05 * expected.abs().max()


def test_hooks_on_blocks_and_attention_run_with_a_cache(pair):
    _, ours = copy.deepcopy(pair)
    block = ours.model.transformer_blocks[0]
    block.register_forward_hook(lambda module, args, out: tuple(2 * x for x in out))
    block.attention.register_forward_hook(lambda module, args, out: -out)
    with torch.no_grad():
        expected = ours(ids_of(), use_cache=False).logits
        torch.testing.assert_close(ours(ids_of()).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - pair[1](ids_of()).logits).abs().max() > 0.1


def test_masks_of_another_dtype(pair):
    _, ours = copy.deepcopy(pair)
    ours.to(torch.bfloat16)
    mask = torch.zeros(1, 1, 9, 9).masked_fill(~block_mask(), float("-inf"))
    with torch.no_grad():
        without = ours(ids_of(), attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(ours(ids_of(), attention_mask=mask).logits, without, rtol=0.02, atol=0.1)


def test_what_libraries_around_transformers_look_for(pair):
    config = pair[1].config
    assert config.to_dict()["hidden_size"] == config.to_dict()["embedding_dim"] == 48
    assert "hidden_size" not in json.loads(config.to_json_string())


def test_weights_in_fewer_bits_are_not_saved(pair, tmp_path):
    small = quantize(copy.deepcopy(pair[1].model), "int8")
    whole = integration.TinyLLMForCausalLM.from_simple(small)
    assert whole.generate(ids_of(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
    with pytest.raises(ValueError, match="stored as 'int8'; save the original"):
        whole.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_models(kind, tmp_path):
    """Models that are no GPT-2 give the logits and text of SimpleLLM itself, also from their files."""
    model = SimpleLLM(VOCAB, 48, 80, 2, causal=True, max_seq_len=40, **OTHER_KINDS[kind]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole = integration.TinyLLMForCausalLM.from_simple(model)
    assert whole.model is model
    whole.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids_of())
        torch.testing.assert_close(whole(ids_of()).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded(ids_of(), use_cache=False).logits, expected)
        again = SimpleLLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids_of()), expected)
        assert again.config == model.config
        text = ids_of()
        for _ in range(8):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids_of(), **options), text)
    assert torch.equal(loaded.generate(**padded(ids_of()), **options)[1], text[1])


def test_a_program_that_has_not_imported_us(pair, tmp_path):
    """The file beside the weights leads to the classes, where the user trusts it."""
    _, ours = pair
    ours.save_pretrained(tmp_path)
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "print(type(model).__module__, type(model.model).__module__)\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "tinyllm.integrations.causal_lm tinyllm.model" in done.stdout.splitlines()  # beside other libraries' words
    again = {path.name: path for path in (tmp_path / "again").iterdir()}
    assert again.keys() == {"config.json", "generation_config.json", "model.safetensors", "modeling_tinyllm.py"}
    for name in (
        "config.json",
        "modeling_tinyllm.py",
    ):  # no copy of our source, which would be another version's one day
        assert again[name].read_text() == (tmp_path / name).read_text()


def test_new_weights_are_drawn_as_gpt2s():
    config = integration.TinyLLMConfig(vocab_size=500, hidden_size=64, num_layers=8, num_heads=4, max_seq_len=128)
    model = transformers.AutoModelForCausalLM.from_config(config).model
    block = model.transformer_blocks[3]
    for weight, std in (
        (model.embedding.embedding.weight, 0.02),
        (model.positional_encoding.weight, 0.02),
        (block.attention.query.weight, 0.02),
        (block.attention.out_proj.weight, 0.02 / 4),
        (block.feed_forward[-1].weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert model.output.weight is model.embedding.embedding.weight
    assert block.feed_forward[0].bias.abs().max() == 0
    assert (block.norm1.weight == 1).all()


def test_tokens_are_added(pair):
    _, ours = copy.deepcopy(pair)
    before = ours(ids_of()).logits
    ours.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    after = ours(ids_of()).logits
    assert after.shape == (2, 9, VOCAB + 3)
    torch.testing.assert_close(after[..., :VOCAB], before)
    assert ours.model.config.vocab_size == ours.config.vocab_size == VOCAB + 3
    assert ours.model.output.weight is ours.model.embedding.embedding.weight


def test_fewer_bits(pair):
    """Linear layers store copies, and nothing else of a model that is ours already is replaced."""
    _, ours = copy.deepcopy(pair)
    with torch.no_grad():
        before = ours(ids_of()).logits
        tinyllm.optimize(ours)
        assert {row.by for row in tinyllm.report(ours).rows} == {None}
        assert torch.equal(ours(ids_of()).logits, before)
        tinyllm.optimize(ours, "int8")
        assert {row.by for row in tinyllm.report(ours).rows} == {None, "quantized_linear"}
        after = ours(ids_of()).logits
        assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
        assert torch.equal(tinyllm.restore(ours)(ids_of()).logits, before)


def test_copies_pickles_and_the_compiler(pair):
    _, ours = pair
    with torch.no_grad():
        before = ours(ids_of()).logits
        assert torch.equal(pickle.loads(pickle.dumps(ours))(ids_of()).logits, before)
        torch.compiler.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(ids_of(), use_cache=False).logits
        torch.testing.assert_close(compiled, before)


def test_adapters_and_a_trainer(pair, tmp_path):
    peft = pytest.importorskip("peft")
    _, ours = copy.deepcopy(pair)
    with torch.no_grad():
        before = ours(ids_of()).logits
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(ours, config)
    data = [{"input_ids": row, "labels": row} for row in ids_of(8)]
    frozen = ours.model.output.weight.clone()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    trained = transformers.Trainer(adapted, arguments, train_dataset=data).train()
    assert trained.training_loss > 0
    assert torch.equal(ours.model.output.weight, frozen)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        after = adapted.eval()(ids_of()).logits
        assert not torch.allclose(after, before)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(pair[1]), tmp_path / "adapter")
        torch.testing.assert_close(again.eval()(ids_of()).logits, after)
        torch.testing.assert_close(adapted.merge_and_unload()(ids_of()).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(), "exactly one is needed"),
        (lambda model: model(ids_of(), inputs_embeds=torch.ones(2, 9, 48)), "exactly one is needed"),
        (lambda model: model(ids_of(), output_attentions=True), "never store attention weights"),
        (lambda model: model(ids_of(1, 65)), "64"),
        (lambda model: model(ids_of(), position_ids=torch.full((1, 9), 64)), "position_ids has 64"),
        (lambda model: model(ids_of(), position_ids=torch.full((1, 9), -1)), "position_ids has -1"),
        (lambda model: integration.TinyLLMConfig(causal=False), "causal is False"),
        (lambda model: integration.TinyLLMConfig(hidden_size=50, num_heads=4), "divisible by num_heads"),
        (lambda model: integration.TinyLLMForCausalLM.from_simple(SimpleLLM(7, 8, 8, 1)), "causal is False"),
    ],
)
def test_errors_name_what_is_wrong(pair, call, message):
    with pytest.raises(ValueError, match=message):
        call(pair[1])


def test_damaged_folders_of_ours(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    path = Path(tmp_path, "config.json")
    values = json.loads(path.read_text())
    for change, message in (
        ({"num_layers": 3}, "are not those of its config.json.*transformer_blocks.2"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"position": None}, "position is None"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            SimpleLLM.from_pretrained(tmp_path)
    del values["activation"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="it has no activation"):
        SimpleLLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config of a tinyllm model has no activation"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_has_every_field_of_ours():
    config = integration.TinyLLMConfig()
    assert config.to_simple() == SimpleLLMConfig(
        *(50257, 768, 3072, 12, 12, True, 1024, 0.0, "gelu_tanh", True, True, True, "learned"), output_bias=False
    )
    assert config.num_attention_heads == config.num_heads == 12


def test_the_evaluation_harness_runs(tmp_path):
    """lm_eval takes a folder that `tinyllm export` has written, also of a model that is no GPT-2."""
    models = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    tokenizer = BPETokenizer.from_texts(["the fox and the dog\n" * 9], 300)
    model = SimpleLLM(tokenizer.vocab_size, 16, 32, 1, causal=True, max_seq_len=40)
    export(model, tokenizer, tmp_path / "out", to="hf")
    harness = models.HFLM(pretrained=str(tmp_path / "out"), trust_remote_code=True, device="cpu", batch_size=2)
    asked = [Instance("loglikelihood", {}, ("the fox", text), 0) for text in (" and", " dog the")]
    for (found, _), instance in zip(harness.loglikelihood(asked), asked, strict=True):
        context, text = (tokenizer.encode(part) for part in instance.args)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([context + text]))[0].log_softmax(-1)
        expected = sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(text))
        assert found == pytest.approx(expected, rel=1e-4)
