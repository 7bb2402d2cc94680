"""Dropout within `ops.transformer` and `ops.transformer_block`: on the embedding, the softmax and both branches."""

import pytest
import torch

from tests.ops.parity import assert_accurate, run
from tests.ops.transformers import KINDS, SMALL, bind, make
from tinyllm import ops, reference
from tinyllm.ops._random import draw_rng
from tinyllm.ops.transformer import Settings, all_factors

kinds, norms = pytest.mark.parametrize("kind", KINDS), pytest.mark.parametrize("norm_first", [False, True])


@pytest.fixture(autouse=True)
def _on_the_kernel():
    with ops.backend("cpp"):
        yield


def both(kind, shape, ids, target, arguments, seed=4, p=0.3, **options):
    """Return the operator, drawing one state at each call, the reference with that state's factors, and the factors."""
    ours = bind(kind, ops, shape, ids, target, dropout_p=p, **options)

    def seeded(*arguments):
        torch.manual_seed(seed)
        return ours(*arguments)

    torch.manual_seed(seed)
    layers = 1 if kind == "block" else shape[7]
    settings = Settings(layers, shape[6], False, False, "relu", 0.0, 0.0, p)
    input = arguments[0] if kind == "block" else ids
    factors = all_factors(input, arguments[1], settings, draw_rng(torch.device("cpu")))
    return seeded, bind(kind, reference, shape, ids, target, factors=factors, **options), factors


@kinds
@norms
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("width", "activation"), [(12, "relu"), (132, "gelu")])
def test_dropout(width, activation, heads, norm_first, kind):
    shape = (2, 9, 11, 13, width, 20, heads, 2)
    options = {"causal": True, "norm_first": norm_first, "activation": activation}
    for dtype in (torch.float64, torch.float32):
        ids, target, arguments = make(kind, shape, dtype, norm_first=norm_first)
        ours, theirs, _ = both(kind, shape, ids, target, arguments, **options)
        out, grads, used = run(ours, arguments)
        assert ops.last_backend() == "cpp"
        exact, exact_grads, _ = run(theirs, [x.double() for x in arguments], grads=used)
        with torch.no_grad():
            assert torch.equal(ours(*arguments), out[0])  # recorded or not
        if dtype == torch.float64:
            torch.testing.assert_close([*out, *grads], [*exact, *exact_grads], rtol=1e-9, atol=1e-9)
            continue
        torchs, torchs_grads, _ = run(theirs, arguments, grads=used)
        assert_accurate("output", out[0], torchs[0], exact[0])
        flat = (torch.cat([x.flatten() for x in found]) for found in (grads, torchs_grads, exact_grads))
        assert_accurate("gradients", *flat)


@pytest.mark.parametrize("kind", ["block", "logits"])
def test_every_mask_is_drawn_anew(kind):
    shape = (4, 64, 11, 13, 64, 20, 2, 2)
    ids, target, arguments = make(kind, shape)
    factors = both(kind, shape, ids, target, arguments)[2]
    others = both(kind, shape, ids, target, arguments, seed=5)[2]
    assert len(factors) == (3 if kind == "block" else 7)
    every = [*factors, *others]
    for i, mask in enumerate(every):
        assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
        assert abs((mask == 0).double().mean() - 0.3) < 0.02
        for other in every[:i]:
            if other.shape == mask.shape:
                assert abs(torch.corrcoef(torch.stack([mask.flatten(), other.flatten()]))[0, 1]) < 0.05


@kinds
@norms
def test_gradcheck(norm_first, kind):
    shape = (1, 3, 4, 3, 4, 3, 2, 1)
    ids, target, arguments = make(kind, shape, norm_first=norm_first)
    leaves = [x.requires_grad_() for x in arguments]
    options = {"causal": True, "norm_first": norm_first, "activation": "gelu"}
    ours = both(kind, shape, ids, target, arguments, **options)[0]
    assert torch.autograd.gradcheck(ours, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)  # through the reference


@kinds
@norms
@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_through_the_reference_are_the_kernels(heads, norm_first, kind):
    shape = (2, 9, 11, 13, 12, 20, heads, 2)
    ids, target, arguments = make(kind, shape, norm_first=norm_first)
    leaves = [x.requires_grad_() for x in arguments]
    model = bind(kind, ops, shape, ids, target, dropout_p=0.3, causal=True, norm_first=norm_first, activation="gelu")
    out = model(*leaves)
    weighting = out.detach().cos()
    kernels = torch.autograd.grad(out, leaves, weighting, retain_graph=True)
    for _ in range(2):  # whatever the generator's state is by now
        references = torch.autograd.grad(out, leaves, weighting, retain_graph=True, create_graph=True)
        torch.testing.assert_close(references, kernels, rtol=1e-9, atol=1e-9)


def test_all_dropped():
    ids, target, arguments = make("block", SMALL, norm_first=True)
    ours, theirs, _ = both("block", SMALL, ids, target, arguments, p=1.0, norm_first=True)
    assert torch.equal(ours(*arguments), arguments[0])
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
@kinds
def test_no_probability(kind, p):
    ids, target, arguments = make(kind, SMALL)
    with pytest.raises(ValueError, match=r"dropout_p is .*; a probability in \[0, 1\] is needed"):
        bind(kind, ops, SMALL, ids, target, dropout_p=p)(*arguments)


@kinds
def test_compile_fullgraph(kind):
    ids, target, arguments = make(kind, SMALL, torch.float32)
    leaves = [x.requires_grad_() for x in arguments]
    model = bind(kind, ops, SMALL, ids, target, dropout_p=0.5, activation="gelu")
    compiled = torch.compile(model, fullgraph=True)
    first, second = compiled(*leaves), compiled(*leaves)
    assert not torch.equal(first, second)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(first.sum(), leaves))
