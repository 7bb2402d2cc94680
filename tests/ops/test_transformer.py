import itertools

import pytest
import torch

from tests.ops.parity import assert_accurate, run
from tests.ops.test_transformer_block import make as make_block
from tinyllm import ops, reference
from tinyllm.ops import dispatch

# B, T, V, classes, D, hidden_dim, num_heads, num_layers.
SHAPES = [
    (1, 5, 6, 6, 16, 32, 1, 2), (1, 1, 1, 2, 6, 5, 2, 1), (2, 3, 5, 4, 6, 5, 2, 0), (3, 17, 40, 31, 33, 21, 3, 1),
    (2, 40, 3000, 70, 32, 64, 4, 3),
]  # fmt: skip
EMPTY = [(0, 3, 4, 4, 4, 5, 1, 1), (2, 0, 4, 4, 4, 5, 2, 2), (2, 3, 4, 4, 4, 0, 2, 1), (2, 3, 4, 0, 4, 4, 1, 1)]
ONE = (1, 1, 1, 1, 1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _on_the_kernel():
    with pytest.MonkeyPatch.context() as patch, ops.backend("cpp"):
        patch.setenv("TINYLLM_LINEAR", "cpp")
        yield


def make(shape, dtype=torch.float64, bias=True, norm_first=False):
    """ids, targets, positions and the parameters."""
    batch, tokens, vocab_size, classes, width, hidden, heads, layers = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    def ints(below):
        return torch.randint(max(1, below), (batch, tokens), generator=generator)

    parameters = [draw(vocab_size, width)]
    for layer in range(layers):
        parameters += make_block((1, 1 + layer, width, hidden, heads), dtype, bias)[1:]
    if norm_first:
        parameters += [1 + draw(width) / 4] + [draw(width)] * bias
    parameters += [draw(classes, width) / width**0.5] + [draw(classes)] * bias
    return ints(vocab_size), ints(classes), draw(tokens, width), parameters


def bind(module, shape, ids, target=None, *, causal=False, norm_first=False, activation="relu", eps=1e-5):
    """The model as a function of positions and parameters."""

    def model(positions, *parameters):
        return module.transformer(
            ids,
            parameters,
            num_layers=shape[7],
            positions=positions,
            target=target,
            num_heads=shape[6],
            causal=causal,
            norm_first=norm_first,
            activation=activation,
            eps=eps,
        )

    return model


def check(shape, dtype, with_loss, bias=True, **options):
    """The rule of parity.py, with all gradients as one vector, as for transformer_block."""
    ids, target, positions, parameters = make(shape, dtype, bias, options.get("norm_first", False))
    arguments = [positions, *parameters]
    ours, theirs = (bind(m, shape, ids, target if with_loss else None, **options) for m in (ops, reference))
    out, grads, used = run(ours, arguments)
    assert ops.last_backend() == "cpp"
    exact, exact_grads, _ = run(theirs, [x.double() for x in arguments], grads=used)
    with torch.no_grad():
        assert torch.equal(ours(*arguments), out[0])  # recorded or not
    if dtype == torch.float64:
        return torch.testing.assert_close([*out, *grads], [*exact, *exact_grads], rtol=1e-9, atol=1e-9)
    torchs, torchs_grads, _ = run(theirs, arguments, grads=used)
    assert_accurate("output", out[0], torchs[0], exact[0])
    assert [x.shape for x in grads] == [x.shape for x in arguments]
    flat = (torch.cat([x.flatten() for x in found]) for found in (grads, torchs_grads, exact_grads))
    return assert_accurate("gradients", *flat)


@pytest.mark.parametrize("with_loss", [False, True], ids=["logits", "loss"])
@pytest.mark.parametrize(
    ("causal", "norm_first", "activation", "bias"),
    list(itertools.product([False, True], [False, True], ["relu", "gelu"], [False, True])),
)
@pytest.mark.parametrize("heads", [1, 3])
def test_options(heads, causal, norm_first, activation, bias, with_loss):
    shape = (2, 9, 11, 13, 12, 20, heads, 2)
    check(shape, torch.float64, with_loss, bias, causal=causal, norm_first=norm_first, activation=activation, eps=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("with_loss", [False, True], ids=["logits", "loss"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, with_loss, norm_first, dtype):
    check(shape, dtype, with_loss, causal=True, norm_first=norm_first, activation="gelu")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("shape", [ONE, *EMPTY], ids=str)
def test_one_or_nothing(shape, norm_first):
    check(shape, torch.float64, False, norm_first=norm_first)


def test_loss_of_nothing_is_nan_as_in_pytorch():
    shape = (2, 0, 4, 4, 4, 5, 2, 2)
    ids, target, positions, parameters = make(shape)
    assert bind(ops, shape, ids, target)(positions, *parameters).isnan()
    shape = (1, 2, 4, 4, 4, 5, 2, 2)
    ids, target, positions, parameters = make(shape)
    assert bind(ops, shape, ids, torch.full_like(target, -100))(positions, *parameters).isnan()


def test_ignored_targets_and_repeated_ids():
    shape = (2, 9, 11, 13, 12, 20, 3, 2)
    ids, target, *arguments = make(shape)
    arguments = [arguments[0], *arguments[1]]
    ids[:] = ids[0, 0]
    target[0, 3:] = -100
    ours, theirs = (bind(module, shape, ids, target) for module in (ops, reference))
    out, grads, used = run(ours, arguments)
    expected, expected_grads, _ = run(theirs, arguments, grads=used)
    torch.testing.assert_close([*out, *grads], [*expected, *expected_grads])


def test_without_positions_and_with_int32_ids():
    shape = (2, 9, 11, 13, 12, 20, 3, 2)
    ids, target, _, parameters = make(shape)
    for index in (ids, ids.int(), ids.t().contiguous().t()):
        leaves = [p.detach().requires_grad_() for p in parameters]
        found = []
        for module in (ops, reference):
            loss = bind(module, shape, index, target)(None, *leaves)
            found.append([loss, *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(*found)


def test_any_part_may_be_frozen():
    shape = (2, 5, 7, 7, 6, 8, 2, 2)
    ids, target, positions, parameters = make(shape)
    whole = [positions, *parameters]
    for chosen in ([0], [1], [len(whole) - 1], [5, 16], [i for i in range(len(whole)) if i % 2]):
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(whole)]
        ours, theirs = (
            torch.autograd.grad(bind(module, shape, ids, target)(*leaves), [leaves[i] for i in chosen])
            for module in (ops, reference)
        )
        torch.testing.assert_close(ours, theirs)


def test_one_tensor_in_two_roles():
    shape = (2, 5, 7, 7, 6, 8, 2, 1)
    ids, target, positions, (_, *others) = make(shape)
    leaves = [x.requires_grad_() for x in (positions, *others)]
    ours, theirs = (  # tied embeddings
        torch.autograd.grad(bind(module, shape, ids, target)(leaves[0], others[-2], *others), leaves)
        for module in (ops, reference)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("with_loss", [False, True], ids=["logits", "loss"])
def test_bits_do_not_depend_on_threads(with_loss):
    shape = (3, 130, 600, 70, 48, 100, 3, 2)
    ids, target, positions, parameters = make(shape, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = bind(ops, shape, ids, target if with_loss else None, causal=True, activation="gelu")
            out, grads, _ = run(model, [positions, *parameters])
            results.append([*out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("with_loss", [False, True], ids=["logits", "loss"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_gradcheck(norm_first, with_loss):
    shape = (1, 3, 4, 3, 4, 3, 2, 1)
    ids, target, positions, parameters = make(shape, norm_first=norm_first)
    leaves = [x.requires_grad_() for x in (positions, *parameters)]
    options = {"norm_first": norm_first, "activation": "gelu"}
    model = bind(ops, shape, ids, target if with_loss else None, **options)
    assert torch.autograd.gradcheck(model, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(model, leaves, fast_mode=True)  # through the reference


# ---- PyTorch's machinery


@pytest.mark.parametrize(("heads", "bias", "activation", "norm_first", "layers"), [
    (1, True, "relu", False, 2), (2, False, "gelu", True, 1), (1, True, "gelu", True, 0), (1, False, "relu", False, 0),
])  # fmt: skip
@pytest.mark.parametrize("with_loss", [False, True], ids=["logits", "loss"])
def test_opcheck(heads, bias, activation, norm_first, layers, with_loss):
    raw, shape = torch.ops.tinyllm, (2, 3, 6, 5, 4, 7, heads, layers)
    ids, target, positions, parameters = make(shape, torch.float32, bias, norm_first)
    target = target.flatten() if with_loss else None
    forward = (ids, parameters, positions, target, layers, heads, True, norm_first, activation, 1e-5)
    torch.library.opcheck(raw.transformer_fwd, (*forward, False))
    torch.library.opcheck(raw.transformer_fwd, (*forward, True))
    out, saved = raw.transformer_fwd(*forward, True)
    for positions_grad in (False, True):
        backward = (out, *forward[:4], saved, *forward[4:], positions_grad)
        torch.library.opcheck(raw.transformer_bwd, backward)


def test_compile_fullgraph():
    shape = (2, 5, 7, 7, 8, 12, 2, 2)
    ids, target, positions, parameters = make(shape, torch.float32)
    leaves = [x.requires_grad_() for x in (positions, *parameters)]
    model = bind(ops, shape, ids, target, activation="gelu")

    def f(*leaves):
        return model(*leaves) * 2

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    ours, theirs = (torch.autograd.grad(out, leaves) for out in (compiled, eager))
    torch.testing.assert_close(ours, theirs)


def test_what_no_kernel_serves_goes_in_parts(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", None)
    shape = (2, 3, 7, 7, 8, 12, 2, 2)
    ids, target, positions, parameters = make(shape, torch.bfloat16)
    arguments = (positions, *parameters)
    expected = bind(reference, shape, ids)(*arguments)
    torch.testing.assert_close(bind(ops, shape, ids)(*arguments), expected, atol=0.1, rtol=0.1)
    with ops.backend("reference"):
        assert torch.equal(bind(ops, shape, ids)(*arguments), expected)
    assert not ops.serves_transformer(ids, parameters, 2, 2)
    ids, target, positions, parameters = make(shape, torch.float32)
    assert ops.serves_transformer(ids, parameters, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.serves_transformer(ids, parameters, 2, 2)
        out, expected = (bind(f, shape, ids, target)(positions, *parameters) for f in (ops, reference))
        torch.testing.assert_close(out, expected, atol=0.1, rtol=0.1, check_dtype=False)


# ---- Errors


@pytest.mark.parametrize(("change", "kind", "says"), [
    ({"input": torch.ones(3, dtype=torch.int64)}, ValueError, r"input has shape \[3\]; \(B, T\) is needed"),
    ({"input": torch.ones(2, 3)}, TypeError, "input has dtype torch.float32; int64 or int32"),
    ({"input": torch.full((2, 3), 7)}, IndexError, "input has the id 7; ids must be in 0 .. 6"),
    ({"input": torch.full((2, 3), -1)}, IndexError, "input has the id -1"),
    ({"input": torch.ones(2, 3, dtype=torch.int64, device="meta")}, ValueError, "input is on meta"),
    ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError, r"target has shape \[6\]; it must have input's"),
    ({"target": torch.zeros(2, 3)}, TypeError, "target has dtype torch.float32; int64"),
    ({"target": torch.full((2, 3), 5)}, IndexError, "5 is out of bounds"),
    ({"positions": torch.zeros(2, 8)}, ValueError, r"positions is \[2, 8\], .*; \[3, 8\], torch.float32 on cpu"),
    ({"parameters": []}, ValueError, r"the first is the embedding's weight; \(V, D\)"),
    ({"num_layers": 3}, ValueError, "parameters has 35 tensors; 26, or 51 with biases"),
    ({"num_heads": 3}, ValueError, "num_heads is 3; it must be a divisor of D, 8"),
    ({"activation": "tanh"}, ValueError, "activation is 'tanh'; relu or gelu is needed"),
    ((4, torch.ones(8)), ValueError, r"block 0: parameters: out_proj's weight is \[8\]"),
    ((21, torch.ones(13, 8)), ValueError, r"block 1: parameters: linear2's weight is \[8, 12\], .*; \[8, 13\]"),
    ((33, torch.ones(5, 7)), ValueError, r"the output's weight is \[5, 7\], .*; \[5, 8\]"),
    ((34, torch.ones(5).double()), ValueError, r"the output's bias is \[5\], torch.float64"),
])  # fmt: skip
def test_bad_input(change, kind, says):
    shape = (2, 3, 7, 5, 8, 12, 2, 2)
    ids, target, positions, parameters = make(shape, torch.float32)
    arguments = {"input": ids, "parameters": parameters, "num_layers": 2, "num_heads": 2}
    arguments |= {"positions": positions, "target": target}
    if isinstance(change, tuple):
        index, value = change
        change = {"parameters": [*parameters[:index], value, *parameters[index + 1 :]]}
    with pytest.raises(kind, match=says):
        ops.transformer(**arguments | change)


def test_a_raw_call_with_bad_shapes_is_refused():
    raw, bad = torch.ops.tinyllm, (ValueError, RuntimeError, IndexError)
    shape = (2, 3, 7, 5, 8, 12, 2, 2)
    ids, target, positions, parameters = make(shape, torch.float32)
    settings = (2, 2, True, False, "relu", 1e-5)

    def refused(says, changed=parameters, index=ids, added=positions, classes=None):
        with pytest.raises(bad, match=says):
            raw.transformer_fwd(index, changed, added, classes, *settings, False)

    refused("there are 34 parameters; 18 or 35 are needed", parameters[1:])
    refused(r"parameter 5 has shape \[12, 7\]", [*parameters[:5], torch.ones(12, 7), *parameters[6:]])
    refused("ids must be in 0 .. 6", index=ids + 9)
    refused("positions has shape", added=positions[1:])
    refused("target has shape", classes=target)
    refused("out of bounds", classes=target.flatten() + 9)
    out, saved = raw.transformer_fwd(ids, parameters, positions, None, *settings, True)
    with pytest.raises(bad, match="saved has shape"):
        raw.transformer_bwd(out, ids, parameters, positions, None, saved[1:], *settings, True)
    with pytest.raises(bad, match="grad has shape"):
        raw.transformer_bwd(out[1:], ids, parameters, positions, None, saved, *settings, True)
