"""SimpleLLM: with its defaults against the reference model, and then each option."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import ops, reference
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.model import SimpleLLM, init_gpt2_weights

F64 = torch.float64
SIZES = [(6, 16, 32, 2, 1, 4), (11, 7, 5, 1, 3, 1), (65, 48, 96, 3, 2, 33), (5, 4, 3, 0, 2, 6)]
MODERN: dict[str, Any] = {
    "num_heads": 2,
    "causal": True,
    "max_seq_len": 16,
    "activation": "gelu",
    "norm_first": True,
    "bias": False,
    "tie_embeddings": True,
    "position": "learned",
}
OPTIONS: list[dict[str, Any]] = [{}, {"num_heads": 2, "causal": True}, MODERN]


def pair(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[reference.SimpleLLM, SimpleLLM]:
    """Return the reference model and ours with the same weights, all of them random, the norms' too."""
    theirs, ours = reference.SimpleLLM(*sizes[:4]), SimpleLLM(*sizes[:4])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def batch(vocab_size: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(vocab_size, (batch_size, seq_len + 1))
    return ids[:, :-1], ids[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def outputs_and_grads(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = model(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return logits.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


# ---- The defaults are the article's model


@pytest.mark.parametrize("sizes", SIZES)
def test_same_seed_same_weights_and_keys(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    theirs = reference.SimpleLLM(*sizes[:4])
    torch.manual_seed(1)
    ours = SimpleLLM(*sizes[:4])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_in_float64(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    theirs, ours = pair(sizes, F64)
    x, y = batch(sizes[0], sizes[4], sizes[5])
    logits, gradients = outputs_and_grads(ours, x, y)
    expected_logits, expected_gradients = outputs_and_grads(theirs, x, y)
    assert logits.dtype == F64
    torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_in_float32(sizes: tuple[int, ...]) -> None:
    """Against float64, our error is at most twice the plain model's, plus a rounding per operator."""
    torch.manual_seed(2)
    theirs, ours = pair(sizes, torch.float32)
    exact = copy.deepcopy(theirs).double()
    x, y = batch(sizes[0], sizes[4], sizes[5])
    ours_logits, ours_grads = outputs_and_grads(ours, x, y)
    plain_logits, plain_grads = outputs_and_grads(theirs, x, y)
    exact_logits, exact_grads = outputs_and_grads(exact, x, y)
    # One rounding step for each sum on the way: two norms and two products a block, and the ends.
    steps = 4 * sizes[3] + 2

    def check(a: Tensor, plain: Tensor, true: Tensor, scale: Tensor) -> None:
        allowed = 2 * (plain - true).abs().max() + steps * 2**-24 * scale
        assert (a - true).abs().max() <= allowed

    check(ours_logits, plain_logits, exact_logits, exact_logits.abs().max())
    # Some gradients are zero but for rounding (a key's bias cancels in the softmax): scale of all.
    scale = torch.stack([g.abs().max() for g in exact_grads]).max()
    for a, plain, true in zip(ours_grads, plain_grads, exact_grads, strict=True):
        check(a, plain, true, scale)


def test_training_is_the_same() -> None:
    torch.manual_seed(3)
    theirs, ours = pair((13, 16, 24, 2), F64)
    losses: list[list[float]] = [[], []]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (theirs, ours)]
    for _ in range(12):
        x, y = batch(13, 4, 9)
        for model, optimizer, record in zip((theirs, ours), optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            record.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=name)


def test_the_constructor_has_the_options_of_the_config_in_their_order() -> None:
    ours, config = (inspect.signature(kind).parameters for kind in (SimpleLLM, SimpleLLMConfig))
    assert [(name, p.default) for name, p in ours.items()] == [(name, p.default) for name, p in config.items()]
    values = {"vocab_size": 5, "embedding_dim": 6, "hidden_dim": 7, "num_layers": 1, "num_heads": 2, "causal": True}
    values |= {"max_seq_len": 8, "dropout": 0.25, "activation": "gelu", "norm_first": True, "bias": False}
    values |= {"tie_embeddings": True, "position": "learned", "norm_eps": 1e-6, "output_bias": False}
    assert SimpleLLM(**values).config.to_dict() == values  # type: ignore[arg-type]


def test_state_dict_with_another_max_seq_len_does_not_load() -> None:
    state = SimpleLLM(6, 4, 4, 1, max_seq_len=8).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for positional_encoding\.pe"):
        SimpleLLM(6, 4, 4, 1).load_state_dict(state)


# ---- Options


@pytest.mark.parametrize("options", OPTIONS)
def test_causal_means_no_look_ahead(options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    model = SimpleLLM(11, 8, 12, 2, **options).double()
    x = torch.randint(11, (2, 9))
    changed = x.clone()
    changed[:, 6] = (x[:, 6] + 1) % 11
    with torch.no_grad():
        same = (model(x) == model(changed)).all(dim=-1)
    if model.config.causal:
        assert same[:, :6].all()
        assert not same[:, 6:].any()
    else:
        assert not same.any()


def test_modern_model_by_its_parts() -> None:
    """A GPT-2-like model equals one of torch.nn's own modules with the same weights."""
    torch.manual_seed(5)
    model = SimpleLLM(11, 8, 12, 2, **{**MODERN, "bias": True, "tie_embeddings": False}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    x = torch.randint(11, (2, 9))
    state = model.state_dict()
    h = state["embedding.embedding.weight"][x] + state["positional_encoding.weight"][:9]
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for i in range(2):
        block = {k: v for k, v in state.items() if k.startswith(f"transformer_blocks.{i}.")}
        block = {k.split(".", 2)[2]: v for k, v in block.items()}
        attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=F64)
        qkv = [f"attention.{name}" for name in ("query", "key", "value")]
        attention.load_state_dict(
            {
                "in_proj_weight": torch.cat([block[f"{name}.weight"] for name in qkv]),
                "in_proj_bias": torch.cat([block[f"{name}.bias"] for name in qkv]),
                "out_proj.weight": block["attention.out_proj.weight"],
                "out_proj.bias": block["attention.out_proj.bias"],
            }
        )
        n = F.layer_norm(h, (8,), block["norm1.weight"], block["norm1.bias"])
        h = h + attention(n, n, n, attn_mask=mask, need_weights=False)[0]
        n = F.layer_norm(h, (8,), block["norm2.weight"], block["norm2.bias"])
        n = F.gelu(F.linear(n, block["feed_forward.0.weight"], block["feed_forward.0.bias"]))
        h = h + F.linear(n, block["feed_forward.2.weight"], block["feed_forward.2.bias"])
    h = F.layer_norm(h, (8,), state["final_norm.weight"], state["final_norm.bias"])
    expected = F.linear(h, state["output.weight"], state["output.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.features(x), h, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("norm_first", "norms", "fused"), [(False, 0, 6), (True, 1, 6)])
def test_every_residual_add_is_fused(monkeypatch: pytest.MonkeyPatch, norm_first: bool, norms: int, fused: int) -> None:
    calls = {"layer_norm": 0, "add_layer_norm": 0}
    for name in calls:
        original = getattr(ops, name)

        def counted(*args: Any, _name: str = name, _original: Any = original) -> Any:
            calls[_name] += 1
            return _original(*args)

        monkeypatch.setattr(ops, name, counted)
    model = SimpleLLM(6, 8, 12, 3, norm_first=norm_first)
    for block in model.transformer_blocks:
        block.attention.dropout = 0.1  # another one than the block's: no operator stands for all of its modules
    model(torch.zeros(1, 2, dtype=torch.int64))
    assert calls == {"layer_norm": norms, "add_layer_norm": fused}


def test_tied_weights_are_one() -> None:
    model = SimpleLLM(11, 8, 12, 1, tie_embeddings=True)
    free = SimpleLLM(11, 8, 12, 1)
    assert model.num_parameters() == free.num_parameters() - 11 * 8
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        assert other.output.weight is other.embedding.embedding.weight
    x, y = batch(11, 2, 5)
    loss_of(model, x, y).backward()
    before = model.output.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.embedding.embedding.weight, before)
    assert torch.equal(model.embedding.embedding.weight, model.output.weight)


def test_no_bias_means_none() -> None:
    model = SimpleLLM(11, 8, 12, 2, num_heads=2, bias=False, norm_first=True)
    assert [name for name, _ in model.named_parameters() if "bias" in name] == []
    # embedding, 2 x (4 attention, 2 feed forward, 2 norms), final norm, output
    assert len(list(model.parameters())) == 1 + 2 * 8 + 1 + 1


@pytest.mark.parametrize("norm_first", [False, True])
def test_norm_eps_is_that_of_every_norm(norm_first: bool) -> None:
    model = SimpleLLM(11, 8, 12, 2, norm_first=norm_first, norm_eps=0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.5] * (4 + norm_first)


def test_an_output_without_bias_leaves_the_others_theirs() -> None:
    model, other = (SimpleLLM(11, 8, 12, 2, num_heads=2, output_bias=bias) for bias in (False, True))
    assert model.output.bias is None
    assert other.state_dict().keys() - model.state_dict().keys() == {"output.bias"}


@pytest.mark.parametrize("options", OPTIONS)
def test_dropout_is_active_in_training_only(options: dict[str, Any]) -> None:
    torch.manual_seed(6)
    model = SimpleLLM(11, 8, 12, 2, dropout=0.5, **options)
    without = SimpleLLM(11, 8, 12, 2, **options)
    without.load_state_dict(model.state_dict())
    x = torch.randint(11, (2, 9))
    torch.manual_seed(7)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), without(x))


def test_dropout_is_on_the_embedded_input() -> None:
    model = SimpleLLM(11, 8, 12, 0, dropout=1 - 1e-9)
    assert not model.features(torch.tensor([[1, 2]])).any()


def test_dropout_of_the_embedded_input_is_fused_where_it_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []
    embedding = ops.embedding

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        passed.append(kwargs["dropout_p"])
        return embedding(*args, **kwargs)

    monkeypatch.setattr(ops, "embedding", watched)
    x = torch.tensor([[1, 2]])
    model = SimpleLLM(11, 8, 12, 0, dropout=0.25)
    model.features(x)
    model.eval().features(x)
    assert passed == [0.25, 0.0]

    passed.clear()
    called = []
    model.train().dropout.register_forward_hook(lambda *_: called.append("hook"))
    model.features(x)
    model.dropout = nn.AlphaDropout(1 - 1e-9)
    torch.manual_seed(0)
    expected = F.alpha_dropout(torch.zeros(1, 2, 8), 1 - 1e-9, training=True)
    torch.testing.assert_close(model.features(x), expected)
    model.dropout = nn.Identity()
    model.features(x)
    assert passed == [0.0, 0.0, 0.0]
    assert called == ["hook"]


def test_learned_positions_tell_places_apart() -> None:
    model = SimpleLLM(11, 8, 12, 1, position="learned", max_seq_len=5)
    assert "positional_encoding.pe" not in model.state_dict()
    assert model.state_dict()["positional_encoding.weight"].shape == (5, 8)
    logits = model(torch.full((1, 5), 3))
    assert not torch.allclose(logits[0, 0], logits[0, 1])


@pytest.mark.parametrize("options", [*OPTIONS, {"num_heads": 7, "norm_first": True}])
def test_odd_sizes_and_empty_inputs(options: dict[str, Any]) -> None:
    dim = 7 if options.get("num_heads") == 7 else 6
    model = SimpleLLM(5, dim, 3, 2, **options)
    for shape in [(2, 0), (0, 3), (0, 0), (1, 1)]:
        assert model(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 5)


# ---- Weights


@pytest.mark.parametrize("num_heads", [1, 4])
def test_gpt2_weights(num_heads: int) -> None:
    options: dict[str, Any] = {"num_heads": num_heads, "norm_first": True, "position": "learned"}
    model = SimpleLLM(211, 64, 256, 3, **options, max_seq_len=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert init_gpt2_weights(model, generator=torch.Generator().manual_seed(0)) is model
    attention_last = "attention.value.weight" if num_heads == 1 else "attention.out_proj.weight"
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            scaled = name.endswith((attention_last, "feed_forward.2.weight"))
            std = 0.02 / math.sqrt(6) if scaled else 0.02
            # The standard deviation of n draws is itself off by std / sqrt(2 n): five of those.
            assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel())), name
    again = init_gpt2_weights(copy.deepcopy(model), generator=torch.Generator().manual_seed(0))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_model_starts_near_a_uniform_guess() -> None:
    torch.manual_seed(0)
    x, y = batch(1000, 4, 16)
    for model in (
        SimpleLLM(1000, 64, 64, 2, tie_embeddings=True),
        init_gpt2_weights(SimpleLLM(1000, 64, 64, 2, **MODERN)),
    ):
        assert loss_of(model, x, y).item() == pytest.approx(math.log(1000), rel=0.1)


# ---- What torch does with models


@pytest.mark.parametrize("options", OPTIONS)
def test_deepcopy_and_pickle(options: dict[str, Any]) -> None:
    model = SimpleLLM(11, 8, 12, 2, **options)
    x = torch.randint(11, (2, 9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = SimpleLLM(11, 8, 12, 2, **options).to(dtype)
    x, y = batch(11, 2, 9)
    logits, gradients = outputs_and_grads(model, x, y)
    assert logits.dtype == dtype
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)
    exact = copy.deepcopy(model).double()(x)
    # A few roundings of numbers of about 1; a wrong formula is off by far more.
    assert (logits - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("options", OPTIONS)
def test_autocast(options: dict[str, Any]) -> None:
    torch.manual_seed(8)
    model = SimpleLLM(11, 8, 12, 2, **options)
    x, y = batch(11, 2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    assert logits.dtype == torch.bfloat16
    exact, exact_gradients = outputs_and_grads(copy.deepcopy(model).double(), x, y)
    eps = torch.finfo(torch.bfloat16).eps
    assert (logits - exact).abs().max() <= 16 * eps * exact.abs().max()
    scale = torch.stack([g.abs().max() for g in exact_gradients]).max()
    for parameter, true in zip(model.parameters(), exact_gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - true).abs().max() <= 16 * eps * scale


def test_compiles_whole() -> None:
    """One real compilation, forward and backward; every option that changes the graph is in it."""
    torch._dynamo.reset()
    torch.manual_seed(9)
    model = SimpleLLM(11, 8, 12, 1, **MODERN)
    x, y = batch(11, 2, 9)
    compiled: Any = torch.compile(model, fullgraph=True)
    logits, gradients = outputs_and_grads(compiled, x, y)
    expected_logits, expected_gradients = outputs_and_grads(model, x, y)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_heads": 2, "dropout": 0.1}])
def test_traces_as_one_graph(options: dict[str, Any]) -> None:
    """Without the compiler behind it: no graph break in the article's model, nor under dropout."""
    torch._dynamo.reset()
    model = SimpleLLM(11, 8, 12, 2, **options)
    x, y = batch(11, 2, 9)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled, x, y).backward()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


# ---- Input


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    model = SimpleLLM(11, 8, 12, 1)
    x = torch.randint(11, (2, 9))
    assert torch.equal(model(x.to(dtype)), model(x))


@pytest.mark.parametrize("options", OPTIONS)
def test_bad_input(options: dict[str, Any]) -> None:
    model = SimpleLLM(11, 8, 12, 1, **{**options, "max_seq_len": 16})
    assert model(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 11)
    cases: list[tuple[Any, type[Exception], str]] = [
        (torch.zeros(1, 17, dtype=torch.int64), ValueError, "x has 17 tokens.*max_seq_len is 16"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"x has shape \(3,\); it must be \(B, T\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"x has shape \(1, 2, 3\)"),
        (torch.zeros(1, 2), TypeError, "x has dtype torch.float32; token ids are integers"),
        (torch.zeros(1, 2, dtype=torch.bool), TypeError, "x has dtype torch.bool"),
        ([[1, 2]], TypeError, "x is a list; it must be a tensor"),
        (torch.tensor([[1, 11]]), IndexError, r"token id 11; ids must be in 0 \.\. 10"),
        (torch.tensor([[-1, 1]]), IndexError, r"token id -1; ids must be in 0 \.\. 10"),
        (torch.tensor([[200]], dtype=torch.uint8), IndexError, "token id 200"),
    ]
    for x, error, message in cases:
        with pytest.raises(error, match=message):
            model(x)


@pytest.mark.parametrize("vocab_size", [9, 40_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_float32_at_least(vocab_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = SimpleLLM(vocab_size, 8, 16, 1, causal=True, norm_first=True).to(dtype)
    ids, targets = torch.randint(vocab_size, (2, 3, 16))
    loss = model.loss(ids, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    logits = model(ids).flatten(0, 1).to(loss.dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, targets.flatten()), rtol=tolerance, atol=0
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("blocks_are_operators", [True, False])
def test_checkpointing_and_documents_change_no_loss_they_should_not(blocks_are_operators: bool) -> None:
    torch.manual_seed(0)
    model = SimpleLLM(9, 8, 16, 2, num_heads=2, causal=True, norm_first=True, dropout=0.2)
    # Dropout is the same only where the same operators draw it.
    model.output.register_forward_hook(lambda *_: None)
    for block in model.transformer_blocks:
        block.attention.dropout = 0.2 if blocks_are_operators else 0.3
    ids, targets = torch.randint(9, (2, 3, 7))
    ways: list[tuple[bool, Tensor | None]] = [(False, None), (True, None)]
    if not blocks_are_operators:
        ways += [(False, torch.zeros(3, 7)), (True, torch.zeros(3, 7))]
    found = []
    for checkpointing, documents in ways:
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(1)  # of dropout, which backward must meet again
        loss = model.loss(ids, targets, documents=documents)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"documents has shape \(3, 6\); it must have x's, \(3, 7\)"):
        model.loss(ids, targets, documents=torch.zeros(3, 6))
