"""Attention as transformers calls it, the cache, and what others do with an optimized model of transformers."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle

import pytest
import torch

import tinyllm
from tests.integrations.families import CAUSAL, FAMILIES, inputs_of, output_of, transformers
from tinyllm.integrations.cache import append

pytestmark = [
    pytest.mark.any_build,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


integration = pytest.importorskip("tinyllm.integrations.transformers")
sdpa_attention_forward = pytest.importorskip("transformers.integrations.sdpa_attention").sdpa_attention_forward


class Causal(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def heads(tokens, keys, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(2, keys, 4 + 2 * kv_heads, 8, generator=generator)  # as one projection gives them
    query, key, value = joined.transpose(1, 2).split([4, kv_heads, kv_heads], 1)
    return query[:, :, :tokens], key, value


BIAS = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("mask", ["none", "bool", "float", "bfloat16"])
@pytest.mark.parametrize("options", [
    {}, {"scaling": 1.0}, {"is_causal": False}, {"position_bias": BIAS},
], ids=lambda options: "-".join(options) or "default")  # fmt: skip
@pytest.mark.parametrize("keys", [5, 9])
def test_the_attention_function_does_what_that_of_sdpa_does(mask, options, keys):
    """More keys than queries without a mask are a static cache that was empty before."""
    query, key, value = heads(5, keys)
    given = None
    if mask != "none":
        given = torch.rand(2, 1, 5, keys, generator=torch.Generator().manual_seed(1)) < 0.7
        given[..., 0] = True
        if mask != "bool":
            given = torch.zeros(given.shape).masked_fill(~given, -1e4)
            given = given.bfloat16() if mask == "bfloat16" else given
    options = dict(options)
    if "position_bias" in options:
        options["position_bias"] = options["position_bias"][..., :keys]
    theirs = dict(options)
    sdpa_mask = given.float() if mask == "bfloat16" else given
    ours, weights = integration.attention(Causal(), query, key, value, given, **options)
    expected, _ = sdpa_attention_forward(Causal(), query, key, value, sdpa_mask, **theirs)
    assert weights is None
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_the_attention_function_does_not_compute(name):
    with pytest.raises(ValueError, match=f"{name} is given; attn_implementation='tinyllm' has none"):
        integration.attention(Causal(), *heads(5, 5), None, **{name: 30.0})


@pytest.mark.parametrize("name", FAMILIES)
def test_by_its_name_alone(name):
    """Padding is seen as well: the masks are registered, too."""
    model = FAMILIES[name]()
    inputs = inputs_of(name)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, :4] = 0
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    with torch.no_grad():
        expected = output_of(model, inputs)[seen]
        model.set_attn_implementation("tinyllm")
        ours = output_of(model, inputs)[seen]
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        assert not torch.equal(ours, expected)  # it was ours
        tinyllm.optimize(model)
        torch.testing.assert_close(output_of(model, inputs)[seen], expected, rtol=0, atol=1e-4)
        assert all(row.by is None for row in tinyllm.report(model).rows if "attention" in row.kind.lower())


def test_from_a_config():
    config = CAUSAL["llama"]().config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="tinyllm")
    assert model.config._attn_implementation == "tinyllm"
    assert model.generate(**inputs_of("llama"), max_new_tokens=3).shape == (2, 14)


def test_models_that_share_a_config_stay_apart():
    config = CAUSAL["gpt2"]().config
    first, second = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    inputs = inputs_of("gpt2")
    with torch.no_grad():
        expected = output_of(second, inputs)
        tinyllm.optimize(first)
        assert torch.equal(output_of(second, inputs), expected)
    assert first.config is second.config is config
    assert config._attn_implementation == "sdpa"
    assert all("forward" not in module.__dict__ for module in second.modules())
    tinyllm.restore(first)
    assert first.transformer.h[0].attn.config is config


def test_other_attention_is_left():
    """Who asks for eager attention wants its weights."""
    model = CAUSAL["gpt2"]()
    model.set_attn_implementation("eager")
    inputs = inputs_of("gpt2")
    tinyllm.optimize(model)
    rows = {row.name: row for row in tinyllm.report(model).rows}
    assert rows["transformer.h.0.attn"].why == "its attn_implementation is 'eager'; 'sdpa' is needed"
    assert rows["transformer.h.0.mlp"].by == "feed_forward"
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 11))


def test_the_models_config_is_still_asked():
    model, inputs = CAUSAL["gpt2"](), inputs_of("gpt2")
    tinyllm.optimize(model)
    with torch.no_grad():
        expected = output_of(model, inputs)
        model.set_attn_implementation("eager")
        out = model(**inputs, output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 11, 11)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-4)
    assert tinyllm.restore(model).config._attn_implementation == "eager"


def test_a_mask_of_two_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5\]; 4 dimensions"):
        integration.attention(Causal(), *heads(5, 5), torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_autocast_leaves_the_sums_in_float32(name):
    model, inputs = FAMILIES[name](), inputs_of(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs, output_hidden_states=True)
        after = tinyllm.optimize(model)(**inputs, output_hidden_states=True)
    for mine, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().mean() < 0.02 * theirs.abs().mean()


def step(model, cache, token):
    return model(token, **{CACHE: cache}, use_cache=True).logits


CACHE = "cache" if "cache" in inspect.signature(transformers.GPT2Model.forward).parameters else "past_key_values"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_block_whose_parts_are_exchanged_while_writing(name, weights):
    """Decoding notices modules, weights and settings that change between two tokens."""
    model = tinyllm.optimize(CAUSAL[name](), weights)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    ids = inputs_of(name)["input_ids"]
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        step(model, cache, ids)
        before = copy.deepcopy(cache)
        step(model, cache, ids[:, :1])
        changes = [
            lambda: setattr(blocks[0], "mlp", blocks[1].mlp),
            lambda: next(iter(blocks[1].parameters())).mul_(-1.0),
            lambda: setattr(next(m for m in blocks[0].modules() if hasattr(m, "scaling")), "scaling", 0.9),
            lambda: model.double().float(),
        ]
        for change in changes:
            change()
            plain = tinyllm.restore(copy.deepcopy(model))
            expected = step(plain, copy.deepcopy(before), ids[:, :1])
            ours = step(model, copy.deepcopy(before), ids[:, :1])
            most = (1e-5 if weights is None else 0.05) * expected.abs().max()
            assert (ours - expected).abs().mean() < most


def test_a_prompt_that_is_read_in_inference_mode():
    model, ids = tinyllm.optimize(CAUSAL["llama"]()), inputs_of("llama")["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        step(model, cache, ids)
        step(model, cache, ids[:, :1])
    with torch.no_grad():
        ours = step(model, cache, ids[:, 1:2])
        whole = model(torch.cat([ids, ids[:, :2]], 1)).logits
    torch.testing.assert_close(ours[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_saved_and_loaded(name, tmp_path):
    model = CAUSAL[name]()
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tinyllm.optimize(model, "int8").save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "bert"])
def test_restored_bit_for_bit_and_pickled(name):
    model = FAMILIES[name]()
    inputs = inputs_of(name)
    with torch.no_grad():
        expected = output_of(model, inputs)
        other = pickle.loads(pickle.dumps(tinyllm.optimize(model, "int8")))
        assert torch.equal(output_of(other, inputs), output_of(model, inputs))
        assert torch.equal(output_of(tinyllm.restore(model), inputs), expected)
        assert torch.equal(output_of(tinyllm.restore(other), inputs), expected)
    assert "_loss_function" not in model.__dict__


def test_a_model_is_freed_when_nobody_has_it():
    model = tinyllm.optimize(CAUSAL["llama"](), "int8")
    model.generate(**inputs_of("llama"), max_new_tokens=3)
    weight = torch.utils.weak.WeakTensorKeyDictionary()
    weight[model.lm_head.weight] = True
    del model
    gc.collect()
    assert len(weight) == 0


def test_adapters_of_low_rank():
    peft = pytest.importorskip("peft")
    inputs = inputs_of("qwen2")
    for weights, first in ((None, True), ("int8", True), ("int8", False)):
        model = CAUSAL["qwen2"]()
        if first:
            tinyllm.optimize(model, weights)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
        if not first:
            tinyllm.optimize(adapted, weights)
            assert any(row.by == "cross_entropy" for row in tinyllm.report(adapted).rows)
        trained = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert all("lora" in key for key in trained)
        assert len(trained) == 8
        adapted.train()
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None for key, parameter in adapted.named_parameters() if "lora" in key)
        adapted.eval()
        plain = tinyllm.restore(copy.deepcopy(adapted))
        assert [key for key, parameter in plain.named_parameters() if parameter.requires_grad] == trained
        with torch.no_grad():
            ours, expected = output_of(adapted, inputs), output_of(plain, inputs)
        assert (ours - expected).abs().mean() < (1e-5 if weights is None else 0.1)
        text = adapted.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert text.shape == (2, 15)
        merged = adapted.merge_and_unload()
        with torch.no_grad():
            assert (output_of(merged, inputs) - expected).abs().mean() < (1e-4 if weights is None else 0.1)


def test_a_trainer(tmp_path):
    pytest.importorskip("accelerate")
    ids = inputs_of("gpt2", batch=6)["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no", "seed": 1}
    plain = CAUSAL["gpt2"]()
    losses = []
    for model in (copy.deepcopy(plain), tinyllm.optimize(copy.deepcopy(plain))):
        arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, disable_tqdm=True, **options)
        losses.append(transformers.Trainer(model, arguments, train_dataset=data).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ---- The cache


def test_appending_to_a_cache():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    views = []

    def add(tokens, index=0):
        key, value = torch.randn(2, 2, 3, tokens, 4, generator=generator)
        with torch.no_grad():
            found = append(ours, index, key, value)
        expected = theirs.update(key, value, index)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, (ours.layers[index].keys, ours.layers[index].values), expected))
        views.append((found[0], expected[0].clone()))

    for tokens in (7, 1, 1, 70, 1):
        add(tokens)
        add(tokens, 1)
    for cache in (ours, theirs):
        cache.crop(-5)
    add(1)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 1]))
    add(2)
    other = copy.deepcopy(ours)
    add(1)
    assert other.get_seq_length() == ours.get_seq_length() - 1
    append(other, 0, *torch.zeros(2, 2, 3, 1, 4))
    for view, expected in views:  # what was handed out is never written again
        assert torch.equal(view, expected)


def test_gradients_pass_a_cache():
    cache = transformers.DynamicCache()
    key, value = torch.randn(2, 1, 2, 3, 4, requires_grad=True)
    append(cache, 0, key, value)
    keys, _ = append(cache, 0, 2 * key, value)
    assert keys.shape == (1, 2, 6, 4)
    (grad,) = torch.autograd.grad(keys.sum(), key)
    assert grad.eq(3).all()
