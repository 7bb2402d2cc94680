"""A whole model, with and without its loss, and a block alone: two operators on one kernel."""

import functools
import itertools

import pytest
import torch

from tests.ops.operations import Operations
from tests.ops.parity import assert_accurate, outputs_and_gradients, run
from tests.ops.transformers import KINDS, SMALL, bind, make
from tinyllm import ops, reference
from tinyllm.ops import _products, dispatch
from tinyllm.ops.transformer import Settings, _model_by_parts, serves
from tinyllm.reference import BLOCK_PARAMETERS

# As SMALL.
SHAPES = [
    (1, 5, 6, 6, 16, 32, 1, 2), (1, 1, 1, 2, 6, 5, 2, 1), (2, 3, 5, 4, 6, 5, 2, 0), (3, 17, 40, 31, 33, 21, 3, 1),
    (2, 40, 3000, 70, 32, 64, 4, 3), (2, 2, 5, 5, 4, 9, 4, 1), (1, 130, 9, 9, 40, 100, 5, 1),
    (12, 64, 9, 9, 32, 50, 4, 1),
]  # fmt: skip
EMPTY = [
    (1, 1, 1, 1, 1, 1, 1, 1), (0, 3, 4, 4, 4, 5, 1, 1), (2, 0, 4, 4, 4, 5, 2, 2), (2, 3, 4, 4, 4, 0, 2, 1),
    (2, 3, 4, 0, 4, 4, 1, 1), (0, 0, 4, 4, 6, 0, 3, 1),
]  # fmt: skip
kinds, norms = pytest.mark.parametrize("kind", KINDS), pytest.mark.parametrize("norm_first", [False, True])


@pytest.fixture(autouse=True)
def _on_the_kernel():
    # With a patch of its own: the test's would be undone after the `with`, and whatever the test does to it, too late.
    with pytest.MonkeyPatch.context() as patch, ops.backend("cpp"):
        patch.setattr(_products, "_setting", "cpp")
        yield


def both(kind, shape, ids, target, **options):
    return (bind(kind, module, shape, ids, target, **options) for module in (ops, reference))


def check(kind, shape, dtype=torch.float64, bias=True, change=lambda arguments: arguments, **options):
    """Apply the rule of parity.py, with all gradients as one vector: some are zero by their nature, such as that of the
    keys' bias, and what is computed for them is the rounding of others."""
    ids, target, arguments = make(kind, shape, dtype, bias, options.get("norm_first", False))
    arguments = change(arguments)
    ours, theirs = both(kind, shape, ids, target, **options)
    out, grads, used = run(ours, arguments)
    assert ops.last_backend() == "cpp"
    exact, exact_grads, _ = run(theirs, [x.double() for x in arguments], grads=used)
    with torch.no_grad():
        assert torch.equal(ours(*arguments), out[0])  # recorded or not
    if dtype == torch.float64:  # nothing is more precise, and the roundings of a whole model add up
        return torch.testing.assert_close([*out, *grads], [*exact, *exact_grads], rtol=1e-9, atol=1e-9)
    torchs, torchs_grads, _ = run(theirs, arguments, grads=used)
    assert_accurate("output", out[0], torchs[0], exact[0])
    assert [x.shape for x in grads] == [x.shape for x in arguments]
    flat = (torch.cat([x.flatten() for x in found]) for found in (grads, torchs_grads, exact_grads))
    return assert_accurate("gradients", *flat)


@kinds
@norms
@pytest.mark.parametrize(
    ("causal", "activation", "bias"),
    list(itertools.product([False, True], ["relu", "gelu", "gelu_tanh", "silu"], [False, True])),
)
@pytest.mark.parametrize("heads", [1, 3])
def test_options(heads, causal, activation, bias, norm_first, kind):
    shape = (2, 9, 11, 13, 12, 20, heads, 2)
    for dtype in (torch.float64, torch.float32):
        check(kind, shape, dtype, bias, causal=causal, norm_first=norm_first, activation=activation)


@norms
@pytest.mark.parametrize("kind", ["logits", "loss"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_an_output_without_bias(layers, kind, norm_first):
    shape, options = (2, 9, 11, 13, 12, 20, 3, layers), {"norm_first": norm_first, "activation": "gelu_tanh"}
    check(kind, shape, bias="blocks", **options)
    ids, target, (positions, *parameters) = make(kind, shape, bias="blocks", norm_first=norm_first)
    whole = bind(kind, ops, shape, ids, target, **options)(positions, *parameters)
    settings = Settings(layers, 3, False, norm_first, "gelu_tanh", 1e-3, 1e-3, 0.0)
    parts = _model_by_parts(ids, parameters, positions, target if kind == "loss" else None, settings)
    torch.testing.assert_close(parts, whole)


@kinds
@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, norm_first, kind):
    check(kind, shape, dtype, causal=True, norm_first=norm_first, activation="gelu")


@norms
@pytest.mark.parametrize("kind", ["block", "logits"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_one_or_nothing(shape, kind, norm_first):
    check(kind, shape, norm_first=norm_first)


@norms
def test_matrices_that_are_not_packed_together(norm_first):
    # Those of the network exceed what is packed at a time, and its depth what a sum takes at a time.
    check("block", (1, 6, 1, 1, 400, 2600, 2, 1), torch.float32, causal=True, norm_first=norm_first)


def test_loss_of_nothing_is_nan_as_in_pytorch():
    ids, target, arguments = make("loss", (2, 0, *SMALL[2:]))
    assert bind("loss", ops, SMALL, ids, target)(*arguments).isnan()
    ids, target, arguments = make("loss", SMALL)
    assert bind("loss", ops, SMALL, ids, torch.full_like(target, -100))(*arguments).isnan()


def test_ignored_targets_and_repeated_ids():
    ids, target, arguments = make("loss", SMALL)
    ids[:] = ids[0, 0]
    target[0, 3:] = -100
    ours, theirs = both("loss", SMALL, ids, target)
    out, grads, used = run(ours, arguments)
    expected, expected_grads, _ = run(theirs, arguments, grads=used)
    torch.testing.assert_close([*out, *grads], [*expected, *expected_grads])


def test_without_positions_and_with_int32_ids():
    ids, target, (_, *parameters) = make("loss", SMALL)
    leaves = [p.requires_grad_() for p in parameters]
    for index in (ids, ids.int(), ids.t().contiguous().t()):
        found = []
        for model in both("loss", SMALL, index, target):
            loss = model(None, *leaves)
            found.append([loss, *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(*found)


@kinds
@norms
def test_any_strides(norm_first, kind):
    def views(x, *parameters):
        turned = [p.mT.contiguous().mT if p.dim() == 2 else p.repeat_interleave(2)[::2] for p in parameters]
        for view in (x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand_as(x), x[..., :1].expand_as(x)):
            yield [view, *turned]

    for i in range(3):
        pick = functools.partial(lambda i, arguments: [*views(*arguments)][i], i)
        check(kind, (4, 6, 7, 7, 8, 12, 2, 1), change=pick, norm_first=norm_first, activation="gelu")


@pytest.mark.parametrize("kind", ["block", "logits"])
def test_an_expanded_gradient(kind):
    ids, target, arguments = make(kind, SMALL)
    leaves = [x.requires_grad_() for x in arguments]
    ours, theirs = (f(*leaves) for f in both(kind, SMALL, ids, target))
    weighting = torch.arange(ours.size(-1), dtype=torch.float64).expand_as(ours)
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, weighting) for out in (ours, theirs)))


@kinds
@norms
def test_any_part_may_be_frozen(norm_first, kind):
    ids, target, whole = make(kind, SMALL, norm_first=norm_first)
    every = range(len(whole))
    for chosen in ([0], [1], [len(whole) - 1], [5, 16], [i for i in every if i % 2], [*every][1:]):
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(whole)]
        ours, theirs = (
            torch.autograd.grad(f(*leaves).pow(3).sum(), [leaves[i] for i in chosen])
            for f in both(kind, SMALL, ids, target, causal=True, norm_first=norm_first)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "place", "other"), [("block", 2, 1), ("loss", 1, -2)]
)  # query as key; tied embeddings
def test_one_tensor_in_two_roles(kind, place, other):
    ids, target, arguments = make(kind, SMALL)
    leaves = [x.requires_grad_() for i, x in enumerate(arguments) if i != place]
    arguments[place] = arguments[other]
    ours, theirs = (torch.autograd.grad(f(*arguments).pow(3).sum(), leaves) for f in both(kind, SMALL, ids, target))
    torch.testing.assert_close(ours, theirs)


@norms
def test_nan_stays_in_its_sequence(norm_first):
    ids, target, (x, *parameters) = make("block", (3, 5, 1, 1, 8, 12, 2, 1), torch.float32)
    block = bind("block", ops, SMALL, ids, target, causal=True, norm_first=norm_first)
    clean = block(x, *parameters)
    x[1, 3, 2] = float("nan")
    out = block(x, *parameters)
    assert out[1, 3:].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(("kind", "shape"), [
    ("logits", (3, 130, 600, 70, 48, 100, 3, 2)), ("loss", (3, 130, 600, 70, 48, 100, 3, 2)),
    ("block", (2, 33, 1, 1, 48, 100, 3, 1)), ("block", (1, 300, 1, 1, 32, 70, 1, 1)),
    ("block", (1, 3, 1, 1, 64, 1000, 2, 1)),
], ids=str)  # fmt: skip
@norms
def test_bits_do_not_depend_on_threads(norm_first, kind, shape):
    ids, target, arguments = make(kind, shape, torch.float32, norm_first=norm_first)
    model = bind(kind, ops, shape, ids, target, causal=True, norm_first=norm_first, activation="gelu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads, _ = run(model, arguments)
            results.append([*out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@kinds
@norms
@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck(heads, norm_first, kind):
    shape = (1, 3, 4, 3, 4, 3, heads, 1)
    ids, target, arguments = make(kind, shape, norm_first=norm_first)
    leaves = [x.requires_grad_() for x in arguments]
    model = bind(kind, ops, shape, ids, target, causal=True, norm_first=norm_first, activation="gelu")
    assert torch.autograd.gradcheck(model, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(model, leaves, fast_mode=True)  # through the reference


# ---- PyTorch's machinery


@pytest.mark.parametrize(("heads", "bias", "activation", "norm_first", "layers"), [
    (1, True, "relu", False, 2), (2, False, "gelu", True, 1), (1, True, "gelu", True, 0), (1, False, "relu", False, 0),
])  # fmt: skip
@kinds
def test_opcheck(heads, bias, activation, norm_first, layers, kind):
    raw, shape = torch.ops.tinyllm, (2, 3, 6, 5, 4, 7, heads, layers)
    ids, target, (added, *parameters) = make(kind, shape, torch.float32, bias, norm_first)
    input, added, target = ids, added, target.flatten() if kind == "loss" else None
    if kind == "block":  # the kernel takes several in a row
        input, added, layers = added, None, max(1, layers)
        parameters *= layers
    forward = (input, parameters, added, target, layers, heads, True, norm_first, activation, 1e-5, 1e-3)
    forward += (0.25, torch.tensor([5, 7])) if layers % 2 else (0.0, None)
    torch.library.opcheck(raw.transformer_fwd, (*forward, False))
    torch.library.opcheck(raw.transformer_fwd, (*forward, True))
    out, saved = raw.transformer_fwd(*forward, True)
    for grad_added in (False, True)[kind == "block" :]:
        backward = (out, *forward[:4], saved, *forward[4:], grad_added)
        torch.library.opcheck(raw.transformer_bwd, backward)


@norms
def test_blocks_in_a_row_are_one_after_the_other(norm_first):
    ids, target, (x, *parameters) = make("block", SMALL)
    settings = (2, True, norm_first, "gelu", 1e-5, 1e-3, 0.0, None)
    out, saved = torch.ops.tinyllm.transformer_fwd(x, parameters * 3, None, None, 3, *settings, True)
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    block = bind("block", reference, SMALL, ids, target, causal=True, norm_first=norm_first, activation="gelu")
    expected = block(block(block(*leaves), *leaves[1:]), *leaves[1:])
    torch.testing.assert_close(out, expected)
    plain = torch.ops.tinyllm.transformer_fwd(x, parameters * 3, None, None, 3, *settings, False)[0]
    assert torch.equal(plain, out)
    grad = expected.detach().cos()
    grads, grad_x = torch.ops.tinyllm.transformer_bwd(
        grad, x, parameters * 3, None, None, saved, 3, *settings, True
    )  # fmt: skip
    summed = [sum(grads[i :: len(parameters)]) for i in range(len(parameters))]
    torch.testing.assert_close([grad_x, *summed], [*torch.autograd.grad(expected, leaves, grad)])


@pytest.mark.parametrize("kind", ["block", "loss"])
def test_compile_fullgraph(kind):
    ids, target, arguments = make(kind, SMALL, torch.float32)
    leaves = [x.requires_grad_() for x in arguments]
    model = bind(kind, ops, SMALL, ids, target, activation="gelu")

    def f(*leaves):
        return model(model(*leaves) * 2 if kind == "block" else leaves[0], *leaves[1:]) * 2

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    weighting = eager.detach().cos()
    chosen = leaves if kind == "block" else leaves[1:]
    ours, theirs = (torch.autograd.grad(out, chosen, weighting) for out in (compiled, eager))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["block", "logits"])
def test_export(kind):
    ids, target, arguments = make(kind, SMALL, torch.float32)
    ours, theirs = both(kind, SMALL, ids, target)
    module = torch.nn.Module()
    module.forward = lambda *arguments: ours(*arguments)
    with torch.no_grad():
        program = torch.export.export(module, tuple(arguments))
    assert any("transformer_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*arguments), theirs(*arguments))


@kinds
@norms
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_what_no_kernel_serves_is_its_parts(heads, bias, norm_first, kind, unforced, monkeypatch):
    shape = (2, 3, 7, 5, 8, 12, heads, 2)
    for declared in (dispatch.OPERATORS["transformer"], dispatch.OPERATORS["transformer_block"]):
        monkeypatch.setattr(declared, "refuses", lambda *_: "as under autocast")
    for dtype in (torch.float64, torch.bfloat16):
        ids, target, arguments = make(kind, shape, dtype, bias, norm_first)
        ours, theirs = both(kind, shape, ids, target, norm_first=norm_first, causal=True, activation="gelu")
        with Operations() as operations:
            found = outputs_and_gradients(ours, *arguments)
        called = {str(function) for function, _ in operations.calls}
        assert {"tinyllm.attention_fwd.default", "tinyllm.layer_norm_bwd.default"} <= called
        assert not any("transformer" in name for name in called)
        if dtype == torch.float64:
            torch.testing.assert_close(found, outputs_and_gradients(theirs, *arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["block", "loss"])
def test_where_a_kernel_serves(kind, unforced, monkeypatch):
    name = "transformer_block" if kind == "block" else "transformer"
    settings = Settings(1 if kind == "block" else 2, 2, False, False, "relu", 1e-5, 1e-5, 0.0)

    def served(arguments):
        input = arguments[0] if kind == "block" else ids
        return serves(name, input, arguments[1:], settings)

    ids, target, arguments = make(kind, SMALL, torch.float32)
    ours, theirs = both(kind, SMALL, ids, target)
    assert served(arguments)
    with ops.backend("reference"):
        assert torch.equal(ours(*arguments), theirs(*arguments))
        assert not served(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert not served(arguments)
        # As the modules have it: products in bfloat16, norms and losses in float32.
        assert ours(*arguments).dtype == (torch.float32 if kind == "loss" else torch.bfloat16)
    # Large ones follow the products, small ones are served whatever those say.
    monkeypatch.setattr(_products, "_setting", "torch")
    assert served(arguments)
    ids, _, arguments = make(kind, (64, 128, 7, 7, 8, 80, 2, 2), torch.float32)
    assert not served(arguments)


# ---- Errors

WIDE = (2, 3, 7, 5, 8, 12, 2, 2)


def replaced(parameters, index, value):
    return {"parameters": [*parameters[:index], value, *parameters[index + 1 :]]}


@pytest.mark.parametrize(("change", "kind", "says"), [
    ({"input": torch.ones(3, dtype=torch.int64)}, ValueError, r"input has shape \[3\]; \(B, T\) is needed"),
    ({"input": torch.ones(2, 3)}, TypeError, "input has dtype torch.float32; int64 or int32"),
    ({"input": torch.full((2, 3), 7)}, IndexError, "input has the token id 7; ids must be in 0 .. 6"),
    ({"input": torch.full((2, 3), -1)}, IndexError, "input has the token id -1"),
    ({"input": torch.ones(2, 3, dtype=torch.int64, device="meta")}, ValueError, "input is on meta"),
    ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError, r"target has shape \[6\]; it must have input's"),
    ({"target": torch.zeros(2, 3)}, TypeError, "target has dtype torch.float32; int64"),
    ({"target": torch.full((2, 3), 5)}, IndexError, "5 is out of bounds"),
    ({"positions": torch.zeros(2, 8)}, ValueError, r"positions is \[2, 8\], .*; \[3, 8\], torch.float32 on cpu"),
    ({"parameters": []}, ValueError, r"the first is the embedding's weight; \(V, D\)"),
    ({"num_layers": 3}, ValueError, "parameters has 35 tensors; 26, or 51 with biases, 50 with all but"),
    ({"num_heads": 3}, ValueError, "num_heads is 3; it must be a divisor of D, 8"),
    ({"activation": "tanh"}, ValueError, "activation is 'tanh'; one of relu, gelu, gelu_tanh, silu is needed"),
    ((4, torch.ones(8)), ValueError, r"block 0: parameters: out_proj's weight is \[8\]"),
    ((21, torch.ones(13, 8)), ValueError, r"block 1: parameters: linear2's weight is \[8, 12\], .*; \[8, 13\]"),
    ((33, torch.ones(5, 7)), ValueError, r"the output's weight is \[5, 7\], .*; \[5, 8\]"),
    ((34, torch.ones(5).double()), ValueError, r"the output's bias is \[5\], torch.float64"),
])  # fmt: skip
def test_bad_model(change, kind, says):
    ids, target, (positions, *parameters) = make("loss", WIDE, torch.float32)
    arguments = {"input": ids, "parameters": parameters, "num_layers": 2, "num_heads": 2}
    arguments |= {"positions": positions, "target": target}
    with pytest.raises(kind, match=says):
        ops.transformer(**arguments | (replaced(parameters, *change) if isinstance(change, tuple) else change))


def test_bad_final_norm():
    ids, _, (_, *parameters) = make("logits", WIDE, norm_first=True)
    for index, part in ((-4, "weight"), (-3, "bias")):
        bad = replaced(parameters, len(parameters) + index, torch.ones(9).double())
        with pytest.raises(ValueError, match=rf"the final norm's {part} is \[9\], .*; \[8\]"):
            ops.transformer(ids, **bad, num_layers=2, num_heads=2, norm_first=True)


@pytest.mark.parametrize(("change", "says"), [
    ({"input": torch.ones(3, 8)}, r"input has shape \[3, 8\]; \(B, T, D\) is needed"),
    ({"input": torch.ones(2, 3, 6)}, r"query's weight is \[8, 8\], .*; \[6, 6\], torch.float32 on cpu"),
    ({"input": torch.ones(2, 3, 8, dtype=torch.float64)}, r"query's weight is .*; \[8, 8\], torch.float64 on cpu"),
    ({"num_heads": 3}, "num_heads is 3; it must be a divisor of D, 8"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"num_heads": 1}, "parameters has 16 tensors; 7, or 14 with biases, are needed"),
    ({"parameters": []}, "parameters has 0 tensors"),
    ({"activation": "none"}, "activation is 'none'; one of relu, gelu, gelu_tanh, silu is needed"),
    (("out_proj", 0, torch.ones(8)), r"parameters: out_proj's weight is \[8\]"),
    (("linear1", 0, torch.ones(13, 8)), r"linear2's weight is \[8, 12\], .*; \[8, 13\]"),
    (("linear1", 0, torch.tensor(1.0)), r"linear1's weight is \[\]"),
    (("linear1", 8, torch.ones(8)), r"linear1's bias is \[8\], .*; \[12\]"),
    (("norm2", 8, torch.ones(8).double()), "norm2's bias is .8., torch.float64"),
    (("key", 0, torch.ones(8, 8, device="meta")), "key's weight is .8, 8., torch.float32 on meta"),
])  # fmt: skip
def test_bad_block(change, says):
    _, _, (x, *parameters) = make("block", WIDE, torch.float32)
    if isinstance(change, tuple):
        change = replaced(parameters, BLOCK_PARAMETERS.index(change[0]) + change[1], change[2])
    with pytest.raises(ValueError, match=says):
        ops.transformer_block(**{"input": x, "parameters": parameters, "num_heads": 2} | change)


def test_a_raw_call_with_bad_shapes_is_refused():
    raw, bad = torch.ops.tinyllm, (ValueError, RuntimeError, IndexError)
    ids, target, (positions, *parameters) = make("logits", WIDE, torch.float32)
    _, _, (x, *block) = make("block", WIDE, torch.float32)

    def refused(says, input, changed, added=None, classes=None, layers=2, heads=2, activation="relu"):
        settings = (layers, heads, True, False, activation, 1e-5, 1e-5, 0.0, None)
        with pytest.raises(bad, match=says):
            raw.transformer_fwd(input, changed, added, classes, *settings, False)

    refused("there are 33 parameters; 18 or 35 are needed, the output's", ids, parameters[2:], positions)
    refused(
        "activation is 'none'; relu, gelu, gelu_tanh or silu is needed", ids, parameters, positions, activation="none"
    )
    refused("activation is 'tanh'; none, relu", ids, parameters, positions, activation="tanh")
    refused(r"parameter 5 has shape \[12, 7\]", ids, **_at(parameters, 5), added=positions)
    refused("ids must be in 0 .. 6", ids + 9, parameters, positions)
    refused("positions has shape", ids, parameters, positions[1:])
    refused("target has shape", ids, parameters, positions, target)
    refused("out of bounds", ids, parameters, positions, target.flatten() + 9)
    refused("num_layers is -1", ids, parameters, positions, layers=-1)
    refused("there are 15 parameters; 8 or 16 are needed", x, block[1:], layers=1)
    refused(r"parameter 4 has shape \[12, 7\]", x, **_at(block, 4), layers=1)
    refused("num_heads is 3", x, block, layers=1, heads=3)
    refused("num_layers is 0; it must be at least 1", x, block, layers=0)
    refused("neither positions nor target", x, block, positions, layers=1)
    for input, changed, added, layers in ((ids, parameters, positions, 2), (x, block, None, 1)):
        settings = (layers, 2, True, False, "relu", 1e-5, 1e-5, 0.0, None)
        out, saved = raw.transformer_fwd(input, changed, added, None, *settings, True)
        with pytest.raises(bad, match="saved has shape"):
            raw.transformer_bwd(out, input, changed, added, None, saved[1:], *settings, True)
        with pytest.raises(bad, match="grad has shape"):
            raw.transformer_bwd(out[1:], input, changed, added, None, saved, *settings, True)


def _at(parameters, index):
    return {"changed": replaced(parameters, index, torch.ones(12, 7))["parameters"]}
