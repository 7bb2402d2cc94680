"""The estimates against what small models are measured to take."""

import functools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.needs import needs_extension
from tinyllm import SimpleLLM, ops
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.presets import PRESETS
from tinyllm.config.training import OPTIMIZERS, TrainConfig
from tinyllm.training.estimate import checkpoint_bytes, estimate
from tinyllm.training.optim import make_optimizer

B, T, V = 2, 32, 211
GPT = {"causal": True, "activation": "gelu", "norm_first": True, "tie_embeddings": True, "position": "learned"}
ARTICLE = {"causal": True}
# The operators of a block that is called in parts, as on a GPU.
PARTS = ("attention", "layer_norm", "add_layer_norm", "linear", "feed_forward", "embedding", "cross_entropy")


def small(num_layers=3, num_heads=4, **options):
    return SimpleLLMConfig(V, 64, 192, num_layers, num_heads=num_heads, max_seq_len=T, **options)


@pytest.mark.parametrize("options", [GPT, ARTICLE], ids=["gpt", "article"])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("num_layers", [0, 3])
def test_parameters_and_computation(num_layers, num_heads, options):
    config = small(num_layers, num_heads, **{**options, "causal": False})  # the counter knows no causal attention
    model, ids = SimpleLLM.from_config(config), torch.zeros(B, T, dtype=torch.int64)
    with ops.backend("reference"), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    found = estimate(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.flops_per_token * B * T == counter.get_total_flops()


def test_causal_attention_takes_half():
    full, causal = (estimate(small(causal=causal)).flops_per_token for causal in (False, True))
    attention = 3 * 2 * 3 * 2 * 64 * T  # layers, products, columns, keys
    assert full - causal == attention - attention * (T + 1) // (2 * T)


def checkpointed(forward, x):
    """Call a block with checkpointing; a pair is passed as two tensors, which checkpoint keeps as such."""
    parts = x if isinstance(x, tuple) else (x,)
    return checkpoint(lambda *parts: forward(parts if len(parts) > 1 else parts[0]), *parts, use_reentrant=False)


def kept_for_backward(config, dtype, checkpointing=False):
    """Return the bytes that forward keeps for backward, without parameters."""
    model, ids = SimpleLLM.from_config(config).to(dtype), torch.zeros(B, T, dtype=torch.int64)
    if checkpointing:
        for block in model.transformer_blocks:
            block.forward = functools.partial(checkpointed, block.forward)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its place
        return tensor

    with ops.backend("cpp", *PARTS), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(ids, ids)
    return sum(nbytes for nbytes, _ in kept.values())


@needs_extension
@pytest.mark.parametrize("options", [GPT, ARTICLE], ids=["gpt", "article"])
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_activations(options, precision, dtype):
    # What the ends of the model keep of so small a vocabulary, the logits, cancels out.
    grown = [kept_for_backward(small(layers, **options), dtype) for layers in (2, 5)]
    found = [estimate(small(layers, **options), batch_size=B, precision=precision) for layers in (2, 5)]
    counted = [each.memory["ddp"].activations for each in found]
    assert counted[1] - counted[0] == pytest.approx(grown[1] - grown[0], rel=0.01)


@needs_extension
@pytest.mark.parametrize("options", [GPT, ARTICLE], ids=["gpt", "article"])
def test_activations_with_checkpointing(options):
    grown = [kept_for_backward(small(layers, **options), torch.float32, True) for layers in (2, 5)]
    found = [
        estimate(small(layers, **options), batch_size=B, precision="32-true", checkpointing=True) for layers in (2, 5)
    ]
    counted = [each.memory["ddp"].activations for each in found]
    assert counted[1] - counted[0] == pytest.approx(grown[1] - grown[0], rel=0.01)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_states(precision, dtype, optimizer_name):
    config = small(**GPT)
    model = SimpleLLM.from_config(config).to(dtype)
    optimizer = make_optimizer(model, TrainConfig(optimizer=optimizer_name))
    model(torch.zeros(B, T, dtype=torch.int64)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    memory = estimate(config, precision=precision, optimizer=optimizer_name).memory["ddp"]
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert memory.optimizer == sum(t.nbytes for t in states)


def test_a_checkpoint_of_muon_is_smaller():
    sizes = []
    for name in OPTIMIZERS:
        config = TrainConfig.from_preset("tiny", optimizer=name)
        model = SimpleLLM.from_config(config.model_config(V))
        sizes.append(checkpoint_bytes(config, model.num_parameters())[0])
    hidden = [p for block in model.transformer_blocks for p in block.parameters() if p.dim() == 2]
    assert sizes[0] - sizes[1] == sum(p.nbytes for p in hidden)


def test_what_is_shared_shrinks_with_the_devices():
    config = small(**GPT)
    one, many = estimate(config), estimate(config, devices=8)
    assert one.memory["ddp"] == many.memory["ddp"]
    for strategy in ("fsdp", "deepspeed"):
        assert many.memory[strategy].optimizer == math.ceil(one.memory[strategy].optimizer / 4 / 8) * 4
        assert many.memory[strategy].gradients < one.memory[strategy].gradients
    assert many.memory["deepspeed"].weights == one.memory["deepspeed"].weights
    assert many.memory["fsdp"].weights < one.memory["fsdp"].weights
    assert many.tokens_per_second(8, 1e12, 0.5) == 8 * one.tokens_per_second(1, 1e12, 0.5)


def test_the_largest_preset():
    config = TrainConfig.from_preset("gpt3").model_config(PRESETS["gpt3"].vocab_size)
    found = estimate(config, devices=64, checkpointing=True)
    assert found.parameters == pytest.approx(175e9, rel=0.01)  # as Brown et al. 2020 say
    assert found.memory["fsdp"].total < 80 * 2**30 < found.memory["deepspeed"].total


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"devices": 0}, "devices is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1; it must be at least 1"),
        ({"seq_len": 33}, "seq_len is 33; the model takes at most max_seq_len, 32"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed are 'adamw', 'muon'"),
        ({"precision": "fp8"}, "precision is 'fp8'; allowed are '32-true', 'bf16-mixed', 'bf16-true'"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said.replace("(", "\\(")):
        estimate(small(), **arguments)
