import itertools

import pytest
import torch

from tests.ops.parity import assert_accurate, run
from tinyllm import ops, reference
from tinyllm.ops import dispatch
from tinyllm.reference import BLOCK_PARAMETERS

# B, T, D, hidden_dim, num_heads.
SHAPES = [
    (1, 1, 6, 5, 2), (1, 3, 5, 7, 1), (2, 2, 4, 9, 4), (1, 5, 16, 64, 2), (3, 17, 33, 31, 3),
    (2, 40, 64, 96, 1), (1, 130, 40, 100, 5), (12, 64, 32, 50, 4),
]  # fmt: skip
OPTIONS = list(itertools.product([False, True], [False, True], ["relu", "gelu"], [False, True]))


@pytest.fixture(autouse=True)
def _on_the_kernel():
    # With a patch of its own: the test's would be undone after the `with`, and whatever the test does to it, too late.
    with pytest.MonkeyPatch.context() as patch, ops.backend("cpp"):
        patch.setenv("TINYLLM_LINEAR", "cpp")
        yield


def make(shape, dtype=torch.float64, bias=True):
    """input and the parameters, all of them random, sums of the order of 1."""
    batch, tokens, width, hidden, heads = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    shapes = [(width, width)] * (4 if heads > 1 else 3) + [(hidden, width), (width, hidden)]
    weights = [draw(*s) / max(1, s[1]) ** 0.5 for s in shapes] + [1 + draw(width) / 4 for _ in range(2)]
    biases = [draw(w.size(0)) for w in weights] if bias else []
    return [x.to(dtype) for x in (draw(batch, tokens, width), *weights, *biases)]


def bind(module, shape, causal=False, norm_first=False, activation="relu"):
    return lambda x, *parameters: module.transformer_block(
        x, parameters, num_heads=shape[4], causal=causal, norm_first=norm_first, activation=activation, eps2=1e-3
    )


def check(shape, arguments, *options):
    """The rule of parity.py, with all gradients as one vector: some are zero by their nature, such as that of the keys'
    bias, and what is computed for them is the rounding of others."""
    ours, theirs = (bind(module, shape, *options) for module in (ops, reference))
    out, grads, used = run(ours, arguments)
    assert ops.last_backend() == "cpp"
    exact, exact_grads, _ = run(theirs, [x.double() for x in arguments], grads=used)
    if arguments[0].dtype == torch.float64:  # nothing is more precise, and the roundings of a whole block add up
        return torch.testing.assert_close([*out, *grads], [*exact, *exact_grads], rtol=1e-10, atol=1e-10)
    torchs, torchs_grads, _ = run(theirs, arguments, grads=used)
    assert_accurate("output", out[0], torchs[0], exact[0])
    assert [x.shape for x in grads] == [x.shape for x in arguments]
    flat = (torch.cat([x.flatten() for x in found]) for found in (grads, torchs_grads, exact_grads))
    return assert_accurate("gradients", *flat)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("causal", "norm_first", "activation", "bias"), OPTIONS)
@pytest.mark.parametrize("heads", [1, 3])
def test_options(heads, causal, norm_first, activation, bias, dtype):
    shape = (2, 9, 12, 20, heads)
    check(shape, make(shape, dtype, bias), causal, norm_first, activation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, norm_first, dtype):
    check(shape, make(shape, dtype), True, norm_first, "gelu")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1, 1), (0, 3, 4, 5, 1), (2, 0, 4, 5, 2), (2, 3, 4, 0, 2), (0, 0, 6, 0, 3),
], ids=str)  # fmt: skip
def test_one_or_nothing(shape, norm_first):
    check(shape, make(shape), False, norm_first, "relu")


@pytest.mark.parametrize("norm_first", [False, True])
def test_matrices_that_are_not_packed_together(norm_first):
    # Those of the network exceed what is packed at a time, and its depth what a sum takes at a time.
    shape = (1, 6, 400, 2600, 2)
    check(shape, make(shape, torch.float32), True, norm_first, "relu")


@pytest.mark.parametrize("norm_first", [False, True])
def test_any_strides(norm_first):
    shape = (4, 6, 8, 12, 2)
    x, *parameters = make(shape)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand_as(x), x[:, :, :1].expand_as(x)]
    transposed = [p.t().contiguous().t() if p.dim() == 2 else p.repeat_interleave(2)[::2] for p in parameters]
    for view in views:
        check(shape, [view, *transposed], False, norm_first, "gelu")


def test_an_expanded_gradient():
    shape = (2, 5, 6, 8, 2)
    leaves = [x.requires_grad_() for x in make(shape)]
    weighting = torch.arange(6, dtype=torch.float64).expand(2, 5, 6)
    ours, theirs = (torch.autograd.grad(bind(module, shape)(*leaves), leaves, weighting) for module in (ops, reference))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm_first", [False, True])
def test_any_part_may_be_frozen(norm_first):
    shape = (2, 5, 6, 8, 2)
    whole = make(shape)
    for chosen in ([0], [1], [5, 16], [i for i in range(len(whole)) if i % 2], list(range(1, len(whole)))):
        leaves = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(whole)]
        ours, theirs = (
            torch.autograd.grad(
                bind(module, shape, True, norm_first)(*leaves).pow(3).sum(), [leaves[i] for i in chosen]
            )
            for module in (ops, reference)
        )
        torch.testing.assert_close(ours, theirs)


def test_one_tensor_in_two_roles():
    shape = (2, 5, 6, 6, 2)
    x, query, _, *others = (t.requires_grad_() for t in make(shape))
    leaves = [x, query, *others]
    ours, theirs = (
        torch.autograd.grad(bind(module, shape)(x, query, query, *others).pow(3).sum(), leaves)
        for module in (ops, reference)
    )
    torch.testing.assert_close(ours, theirs)


def test_without_gradients_the_result_is_the_same():
    shape = (2, 9, 12, 20, 3)
    for norm_first in (False, True):
        x, *parameters = make(shape, torch.float32)
        with torch.no_grad():
            plain = bind(ops, shape, True, norm_first, "gelu")(x, *parameters)
        recorded = bind(ops, shape, True, norm_first, "gelu")(x.requires_grad_(), *parameters)
        assert torch.equal(plain, recorded)


@pytest.mark.parametrize("norm_first", [False, True])
def test_nan_stays_in_its_sequence(norm_first):
    shape = (3, 5, 8, 12, 2)
    x, *parameters = make(shape, torch.float32)
    clean = bind(ops, shape, True, norm_first)(x, *parameters)
    x[1, 3, 2] = float("nan")
    out = bind(ops, shape, True, norm_first)(x, *parameters)
    assert out[1, 3:].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 33, 48, 100, 3), (1, 300, 32, 70, 1), (1, 3, 64, 1000, 2)], ids=str)
def test_bits_do_not_depend_on_threads(shape, norm_first):
    arguments = make(shape, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads, _ = run(bind(ops, shape, True, norm_first, "gelu"), arguments)
            results.append([*out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck(heads, norm_first):
    shape = (1, 3, 4, 3, heads)
    leaves = [x.requires_grad_() for x in make(shape)]
    block = bind(ops, shape, True, norm_first, "gelu")
    assert torch.autograd.gradcheck(block, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(block, leaves, fast_mode=True)  # through the reference


# ---- PyTorch's machinery


@pytest.mark.parametrize(("heads", "bias", "activation"), [(1, True, "relu"), (2, False, "gelu")])
def test_opcheck(heads, bias, activation):
    raw, shape = torch.ops.tinyllm, (2, 3, 4, 5, heads)
    x, *parameters = make(shape, torch.float32, bias)
    settings = (heads, True, False, activation)
    forward = (x, parameters, *settings, 1e-5, 1e-5)
    torch.library.opcheck(raw.transformer_block_fwd, (*forward, False))
    torch.library.opcheck(raw.transformer_block_fwd, (*forward, True))
    out, saved = raw.transformer_block_fwd(*forward, True)
    torch.library.opcheck(raw.transformer_block_bwd, (out, x, parameters, saved, *settings))


def test_compile_fullgraph():
    shape = (2, 5, 8, 12, 2)
    leaves = [x.requires_grad_() for x in make(shape, torch.float32)]
    block = bind(ops, shape, True, False, "gelu")

    def f(*leaves):
        return block(block(*leaves) * 2, *leaves[1:])

    eager, compiled = f(*leaves), torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    weighting = eager.detach().cos()
    ours, theirs = (torch.autograd.grad(out, leaves, weighting) for out in (compiled, eager))
    torch.testing.assert_close(ours, theirs)


def test_export():
    shape = (2, 5, 8, 12, 2)
    arguments = make(shape, torch.float32)

    class Block(torch.nn.Module):
        def forward(self, *arguments):
            return bind(ops, shape)(*arguments)

    with torch.no_grad():
        program = torch.export.export(Block(), tuple(arguments))
    assert any("transformer_block_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*arguments), bind(reference, shape)(*arguments))


def test_what_no_kernel_serves_goes_in_parts(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", None)
    shape = (2, 3, 8, 12, 2)
    x, *parameters = make(shape, torch.bfloat16)
    expected = bind(reference, shape)(x, *parameters)
    # Each part rounds for itself, to eight bits.
    torch.testing.assert_close(bind(ops, shape)(x, *parameters), expected, atol=0.1, rtol=0.1)
    with ops.backend("reference"):
        assert torch.equal(bind(ops, shape)(x, *parameters), expected)
    assert not ops.serves_block(x, parameters, 2)
    x, *parameters = make(shape, torch.float32)
    assert ops.serves_block(x, parameters, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.serves_block(x, parameters, 2)
        out, expected = bind(ops, shape)(x, *parameters), bind(reference, shape)(x, *parameters)
        torch.testing.assert_close(out, expected, atol=0.1, rtol=0.1, check_dtype=False)
    # Large ones follow the products, small ones are served whatever those say.
    monkeypatch.setenv("TINYLLM_LINEAR", "torch")
    assert ops.serves_block(x, parameters, 2)
    x, *parameters = make((64, 128, 8, 80, 2), torch.float32)
    assert not ops.serves_block(x, parameters, 2)


# ---- Errors


def changed(name, value):
    """Parameters with one that is `value`; a bias's name ends in "_bias"."""
    _, *parameters = make((2, 3, 8, 12, 2), torch.float32)
    index = BLOCK_PARAMETERS.index(name.removesuffix("_bias")) + 8 * name.endswith("_bias")
    parameters[index] = value
    return {"parameters": parameters}


@pytest.mark.parametrize(("change", "says"), [
    ({"input": torch.ones(3, 8)}, r"input has shape \[3, 8\]; \(B, T, D\) is needed"),
    ({"input": torch.ones(2, 3, 6)}, r"query's weight is \[8, 8\], .*; \[6, 6\], torch.float32 on cpu"),
    ({"input": torch.ones(2, 3, 8, dtype=torch.float64)}, r"query's weight is .*; \[8, 8\], torch.float64 on cpu"),
    ({"num_heads": 3}, "num_heads is 3; it must be a divisor of D, 8"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"num_heads": 1}, "parameters has 16 tensors; 7, or 14 with biases, are needed"),
    ({"parameters": []}, "parameters has 0 tensors"),
    ({"activation": "gelu_tanh"}, "activation is 'gelu_tanh'; relu or gelu is needed"),
    (changed("out_proj", torch.ones(8)), r"parameters: out_proj's weight is \[8\]"),
    (changed("linear1", torch.ones(13, 8)), r"linear2's weight is \[8, 12\], .*; \[8, 13\]"),
    (changed("linear1", torch.tensor(1.0)), r"linear1's weight is \[\]"),
    (changed("linear1_bias", torch.ones(8)), r"linear1's bias is \[8\], .*; \[12\]"),
    (changed("norm2_bias", torch.ones(8).double()), "norm2's bias is .8., torch.float64"),
    (changed("key", torch.ones(8, 8, device="meta")), "key's weight is .8, 8., torch.float32 on meta"),
])  # fmt: skip
def test_bad_input(change, says):
    x, *parameters = make((2, 3, 8, 12, 2), torch.float32)
    arguments = {"input": x, "parameters": parameters, "num_heads": 2} | change
    assert "activation" in change or not ops.serves_block(*(arguments[k] for k in ("input", "parameters", "num_heads")))
    with pytest.raises(ValueError, match=says):
        ops.transformer_block(**arguments)


def test_a_raw_call_with_bad_shapes_is_refused():
    raw, bad = torch.ops.tinyllm, (ValueError, RuntimeError)
    x, *parameters = make((2, 3, 8, 12, 2), torch.float32)
    settings = (2, True, False, "relu")
    with pytest.raises(bad, match="there are 15 parameters; 8 or 16 are needed"):
        raw.transformer_block_fwd(x, parameters[1:], *settings, 1e-5, 1e-5, False)
    with pytest.raises(bad, match=r"parameter 4 has shape \[12, 7\]"):
        raw.transformer_block_fwd(
            x, [*parameters[:4], torch.ones(12, 7), *parameters[5:]], *settings, 1e-5, 1e-5, False
        )
    with pytest.raises(bad, match="num_heads is 3"):
        raw.transformer_block_fwd(x, parameters, 3, *settings[1:], 1e-5, 1e-5, False)
    with pytest.raises(bad, match="saved has shape"):
        raw.transformer_block_bwd(x, x, parameters, torch.ones(10), *settings)
    with pytest.raises(bad, match="grad has shape"):
        raw.transformer_block_bwd(x[:1], x, parameters, torch.ones(10), *settings)
