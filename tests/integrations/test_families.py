"""Models of transformers compute the same before and after `optimize`, in every way in which they are called."""

from __future__ import annotations

import copy

import pytest
import torch

import tinyllm
from tests.integrations.families import CAUSAL, FAMILIES, OTHERS, VOCAB, inputs_of, output_of, transformers
from tinyllm.integrations import decoding, networks
from tinyllm.ops.backends import cpp

pytestmark = [
    pytest.mark.any_build,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
each_family = pytest.mark.parametrize("name", FAMILIES)
each_causal = pytest.mark.parametrize("name", CAUSAL)


def both(name, dtype=torch.float32):
    """Return a model and an optimized copy of it."""
    plain = FAMILIES[name]().to(dtype)
    return plain, tinyllm.optimize(copy.deepcopy(plain))


def assert_close(ours, theirs, dtype=torch.float32):
    most = theirs.abs().max().item()
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance * most)


@pytest.fixture
def decoded(monkeypatch):
    """Count the blocks that `decode_block` has computed."""
    counts = {"served": 0, "refused": 0}
    decode = decoding.decode

    def counting(*arguments):
        out = decode(*arguments)
        counts["refused" if out is None else "served"] += 1
        return out

    monkeypatch.setattr(decoding, "decode", counting)
    return counts


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward(name, dtype):
    plain, ours = both(name, dtype)
    inputs = inputs_of(name, dtype=dtype)
    with torch.no_grad():
        assert_close(output_of(ours, inputs), output_of(plain, inputs), dtype)


@each_family
def test_gradients(name):
    plain, ours = both(name)
    inputs = inputs_of(name)
    for model in (plain, ours):
        model.train()
        output_of(model, inputs).square().mean().backward()
    grads = {key: parameter.grad for key, parameter in plain.named_parameters()}
    # Where a gradient is rounding alone, as that of a bias of keys, what counts is the others' size.
    most = max(grad.abs().max().item() for grad in grads.values() if grad is not None)
    for key, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (grads[key] is None), key
        if parameter.grad is not None:
            assert parameter.grad.stride() == parameter.stride(), key
            torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-3, atol=1e-5 * most, msg=key)


@each_causal
def test_the_loss_of_labels(name):
    plain, ours = both(name)
    ids = inputs_of(name)["input_ids"]
    labels = ids.clone()
    labels[0, :4] = -100
    for options in ({}, {"num_items_in_batch": torch.tensor(5)}):
        losses = [model(input_ids=ids, labels=labels, **options).loss for model in (plain, ours)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert any(row.by == "cross_entropy" for row in tinyllm.report(ours).rows)


@each_family
def test_a_batch_with_padding_on_the_left(name):
    if "input_ids" not in inputs_of(name):
        pytest.skip("it takes no text")
    plain, ours = both(name)
    inputs = inputs_of(name, batch=3)
    inputs["attention_mask"][0, :4] = 0
    inputs["attention_mask"][1, :1] = 0
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_close(output_of(ours, inputs)[seen], output_of(plain, inputs)[seen])


@each_causal
@pytest.mark.parametrize("options", [
    {}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3},
    {"do_sample": True, "top_k": 5}, {"use_cache": False}, {"repetition_penalty": 1.3},
], ids=str)  # fmt: skip
def test_generate(name, options, decoded):
    plain, ours = both(name)
    inputs = inputs_of(name, batch=1 if "prompt_lookup_num_tokens" in options else 2)
    if len(inputs["input_ids"]) > 1:
        inputs["attention_mask"][0, :5] = 0
    texts = []
    for model in (plain, ours):
        torch.manual_seed(0)
        texts.append(model.generate(**inputs, max_new_tokens=14, **{"do_sample": False, **options}))
    assert torch.equal(*texts)
    block_is_ours = any(row.by == "decode_block" for row in tinyllm.report(ours).rows)
    if cpp.loaded and block_is_ours and options in ({}, {"num_beams": 3}) and "window" not in name:
        assert decoded["served"] > 20
        assert decoded["refused"] == 0


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3"])
def test_assisted_generation(name):
    """The assistant's guesses are taken back where they are wrong, from both caches."""
    plain, ours = both(name)
    assistant = tinyllm.optimize(CAUSAL[name]())
    with torch.no_grad():
        assistant.get_output_embeddings().weight.mul_(0.9).add_(0.01)
    inputs = inputs_of(name, batch=1)
    expected = plain.generate(**inputs, max_new_tokens=20, do_sample=False)
    found = ours.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, expected)


@each_causal
def test_generate_in_bfloat16(name):
    """A token after a cache has the logits that reading the whole text gives it, within bfloat16's rounding."""
    model = tinyllm.optimize(CAUSAL[name]().to(torch.bfloat16))
    inputs = inputs_of(name)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    text = model.generate(**inputs, **options)
    with torch.no_grad():
        whole = model(text.sequences).logits[:, 10:-1].float()
    assert (torch.stack(text.logits, 1).float() - whole).abs().mean() < 0.02 * whole.abs().max()


@each_causal
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_generate_with_weights_in_fewer_bits(name, weights, decoded):
    """The cache in any state gives what reading everything at once does; so do one sequence and several."""
    model = tinyllm.optimize(CAUSAL[name](), weights)
    inputs = inputs_of(name, batch=2, tokens=12)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        text = model.generate(**inputs, **kwargs, output_logits=True, return_dict_in_generate=True)
        alone = model.generate(inputs["input_ids"][:1], **kwargs, output_logits=True, return_dict_in_generate=True)
        whole = model(text.sequences).logits[:, 11:-1]
    together = torch.stack(text.logits, 1)
    # Few activations meet int8 and int4 weights rounded, many do not.
    most = {"bf16": 1e-5, "int8": 0.01, "int4": 0.01}[weights] * float(whole.abs().max())
    assert (together - whole).abs().mean() < most
    assert (torch.stack(alone.logits, 1)[0, 0] - together[0, 0]).abs().mean() < most
    if cpp.loaded and any(row.by == "decode_block" for row in tinyllm.report(model).rows) and "window" not in name:
        assert decoded["served"] > 10
    assert model.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "bert"])
def test_a_mask_of_four_dimensions_and_an_additive_one(name):
    plain, ours = both(name)
    ids = inputs_of(name)["input_ids"]
    visible = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(3)) < 0.6
    visible |= torch.eye(11, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        for mask in (visible, additive):
            inputs = {"input_ids": ids, "attention_mask": mask}
            assert_close(output_of(ours, inputs), output_of(plain, inputs))


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
def test_packed_sequences(name):
    """Positions that begin again are sequences that do not see each other."""
    plain, ours = both(name)
    ids = inputs_of(name, batch=1, tokens=12)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        packed, expected = (model(ids, position_ids=positions, use_cache=False).logits for model in (ours, plain))
        alone = ours(ids[:, 5:8], use_cache=False).logits
    assert_close(packed, expected)
    assert_close(packed[:, 5:8], alone)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt_neox"])
def test_gradient_checkpointing(name):
    plain, ours = both(name)
    inputs = inputs_of(name)
    expected = torch.autograd.grad(output_of(plain, inputs).square().mean(), [*plain.parameters()][:3])
    for options in ({"use_reentrant": True}, {"use_reentrant": False}):
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        ours.train()
        ours.enable_input_require_grads()
        ours.zero_grad()
        output_of(ours, inputs).square().mean().backward()
        grads = [parameter.grad for parameter in [*ours.parameters()][:3]]
        torch.testing.assert_close(grads, [*expected], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "vit"])
def test_compile(name):
    plain, ours = both(name)
    inputs = inputs_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(output_of(compiled, inputs), output_of(plain, inputs))
    torch._dynamo.reset()


@each_family
def test_hidden_states_and_hooks(name):
    """Forward hooks on replaced modules, and those that record hidden states, are still called."""
    plain, ours = both(name)
    inputs = inputs_of(name)
    with torch.no_grad():
        states = [model(**inputs, output_hidden_states=True).hidden_states for model in (plain, ours)]
    assert len(states[0]) == len(states[1])
    for mine, theirs in zip(states[1], states[0], strict=True):
        assert_close(mine, theirs)
    seen = []
    inside = next(module for key, module in ours.named_modules() if key.endswith(("mlp", "fc1", "intermediate")))
    handle = inside.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        output_of(ours, inputs)
    handle.remove()
    assert len(seen) == 1


def test_dropout_in_training():
    """A block with dropout calls its modules one by one in training, and drops nothing in evaluation."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_head=4, n_layer=2, n_positions=64, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).train()
    ids = inputs_of("gpt2")["input_ids"]
    tinyllm.optimize(model)
    before = networks.Fallbacks.count
    first, second = model(ids).logits, model(ids).logits
    assert networks.Fallbacks.count > before
    assert not torch.allclose(first, second)
    model.eval()
    with torch.no_grad():
        ours = model(ids).logits
        assert_close(ours, tinyllm.restore(model)(ids).logits)


@pytest.mark.parametrize("name", [*OTHERS, "llama"])
def test_whole_blocks_serve(name):
    """Nothing of a usual call falls back to a module's own forward."""
    _, ours = both(name)
    before = networks.Fallbacks.count
    with torch.no_grad():
        output_of(ours, inputs_of(name))
    assert networks.Fallbacks.count == before
