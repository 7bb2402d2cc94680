"""torch.func, forward-mode AD, batched backward and torch.jit.trace on every operator, against the same of the
reference in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_map

from tinyllm import ops, reference
from tinyllm.ops.dispatch import OPERATORS

pytestmark = [
    pytest.mark.any_build,
    # Of torch's own jvp and linearize, and of its tracer.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:Attempted to insert a get_attr Node"),
]

IDS = torch.tensor([[1, 0, 3], [2, 2, 1]])
TARGET = torch.tensor([3, 0, -100, 1])
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
MASK = torch.tensor([[True, False, True, True], [False, True, False, False], [True, True, True, False]])
KEY_LENGTHS = torch.tensor([2, 4])


@dataclass(frozen=True)
class Case:
    """A call of one operator: `call(functions, *inputs)` takes it from `tinyllm.ops` or from `tinyllm.reference`."""

    name: str
    operator: str
    call: Callable[..., Any]
    shapes: Sequence[Sequence[int]]

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in self.shapes)


def attention_of_lengths(functions: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if functions is ops:
        return ops.scaled_dot_product_attention(query, key, value, key_lengths=KEY_LENGTHS)
    mask = torch.arange(key.size(-2)) < KEY_LENGTHS[:, None, None, None]
    return reference.scaled_dot_product_attention(query, key, value, mask)


def class_weight(like: Tensor) -> Tensor:
    return CLASS_WEIGHT.to(like.dtype)


def quantized_linear(functions: Any, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    if functions is ops:
        return ops.quantized_linear(x, QUANTIZED, bias, activation="gelu", residual=residual)
    return reference.linear(x, QUANTIZED.dequantize().to(x.dtype), bias, activation="gelu", residual=residual)


QUANTIZED = ops.quantize_weight(torch.arange(20.0).view(4, 5) / 7 - 1, "int8")
QKV = ((2, 2, 3, 2), (2, 2, 4, 2), (2, 2, 4, 2))
BLOCK = ((2, 3, 4), *[(4, 4)] * 4, (6, 4), (4, 6), (4,), (4,), *[(4,)] * 4, (6,), (4,), (4,), (4,))
MODEL = ((5, 4), *BLOCK[1:], (4,), (4,), (4, 4), (4,))
CASES = [
    Case("layer_norm", "layer_norm", lambda f, x, w, b: f.layer_norm(x, (5,), w, b), ((2, 3, 5), (5,), (5,))),
    Case("layer_norm_plain", "layer_norm", lambda f, x: f.layer_norm(x, (3, 5)), ((2, 3, 5),)),
    Case(
        "add_layer_norm",
        "add_layer_norm",
        lambda f, x, r, w, b: f.add_layer_norm(x, r, (5,), w, b),
        ((2, 3, 5), (2, 3, 5), (5,), (5,)),
    ),
    Case("rms_norm", "rms_norm", lambda f, x, w: f.rms_norm(x, (5,), w, 1e-5), ((2, 3, 5), (5,))),
    Case(
        "add_rms_norm",
        "add_rms_norm",
        lambda f, x, r, w: f.add_rms_norm(x, r, (5,), w, 1e-5),
        ((2, 3, 5), (2, 3, 5), (5,)),
    ),
    Case(
        "rotary_embedding",
        "rotary_embedding",
        lambda f, q, k, c, s: f.rotary_embedding(q, k, c, s),
        ((2, 2, 3, 5), (2, 1, 3, 5), (2, 3, 4), (2, 3, 4)),
    ),
    Case("gated_activation", "gated_activation", lambda f, g, u: f.gated_activation(g, u), ((2, 5), (2, 5))),
    Case("embedding", "embedding", lambda f, w, p: f.embedding(IDS, w, 2, positions=p), ((5, 4), (3, 4))),
    Case("attention", "attention", lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v), QKV),
    Case(
        "attention_causal",
        "attention",
        lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        QKV,
    ),
    Case("attention_mask", "attention", lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, MASK), QKV),
    Case("attention_bias", "attention", lambda f, *x: f.scaled_dot_product_attention(*x), (*QKV, (3, 4))),
    Case(
        "attention_gqa",
        "attention",
        lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ((2, 4, 3, 2), *QKV[1:]),
    ),
    Case("attention_lengths", "attention", attention_of_lengths, QKV),
    Case(
        "attention_offset",
        "attention",
        lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True, causal_offset=1),
        QKV,
    ),
    Case(
        "attention_offsets",
        "attention",
        lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True, causal_offset=KEY_LENGTHS - 2),
        QKV,
    ),
    Case("linear", "linear", lambda f, x, w, b: f.linear(x, w, b), ((2, 3, 5), (4, 5), (4,))),
    Case(
        "linear_gelu_residual",
        "linear",
        lambda f, x, w, b, r: f.linear(x, w, b, activation="gelu", residual=r),
        ((2, 3, 5), (4, 5), (4,), (2, 3, 4)),
    ),
    Case("quantized_linear", "quantized_linear", quantized_linear, ((2, 5, 5), (4,), (2, 5, 4))),  # many rows
    Case(
        "feed_forward",
        "feed_forward",
        lambda f, *x: f.feed_forward(*x[:5], activation="gelu_tanh", residual=x[5]),
        ((3, 5), (6, 5), (6,), (4, 6), (4,), (3, 4)),
    ),
    Case("cross_entropy", "cross_entropy", lambda f, x: f.cross_entropy(x, TARGET), ((4, 4),)),
    Case(
        "cross_entropy_rows",
        "cross_entropy",
        lambda f, x: f.cross_entropy(x, TARGET, class_weight(x), reduction="none", label_smoothing=0.1),
        ((4, 4),),
    ),
    Case(
        "linear_cross_entropy",
        "linear_cross_entropy",
        lambda f, x, w, b: f.linear_cross_entropy(x, w, TARGET, linear_bias=b),
        ((4, 5), (4, 5), (4,)),
    ),
    Case(
        "linear_cross_entropy_rows",
        "linear_cross_entropy",
        lambda f, x, w: f.linear_cross_entropy(x, w, TARGET, weight=class_weight(x), reduction="none"),
        ((4, 5), (4, 5)),
    ),
    Case(
        "transformer_block",
        "transformer_block",
        lambda f, x, *p: f.transformer_block(x, p, num_heads=2, causal=True, activation="gelu"),
        BLOCK,
    ),
    Case(
        "transformer",
        "transformer",
        lambda f, *p: f.transformer(IDS, p[:-1], positions=p[-1], num_layers=1, num_heads=2, norm_first=True),
        (*MODEL, (3, 4)),
    ),
    Case(
        "transformer_loss",
        "transformer",
        lambda f, *p: f.transformer(IDS, p, target=IDS, num_layers=1, num_heads=2, norm_first=True),
        MODEL,
    ),
]

Function = Callable[..., Any]
Inputs = tuple[Tensor, ...]


def outputs(function: Function) -> Callable[..., tuple[Tensor, ...]]:
    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = function(*inputs)
        return (out,) if isinstance(out, Tensor) else out

    return call


def scalar(function: Function) -> Callable[..., Tensor]:
    """Return one number that is not linear in the outputs, so that second derivatives are not 0."""
    return lambda *inputs: sum((out.sin().sum() for out in outputs(function)(*inputs)), torch.tensor(0.0))


def like(tensors: Sequence[Tensor], seed: int, *batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda x: torch.randn((*batch, *x.shape), generator=generator, dtype=torch.float64).to(x.dtype)  # noqa: E731
    return tuple(map(draw, tensors))


def argnums(inputs: Inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def run_vjp(function: Function, inputs: Inputs) -> Any:
    out, pull = vjp(outputs(function), *inputs)
    return out, pull(like(out, 1))


def run_forward_ad(function: Function, inputs: Inputs) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in zip(inputs, like(inputs, 1), strict=True)]
        return [tuple(forward_ad.unpack_dual(out)) for out in outputs(function)(*duals)]


def run_forward_over_reverse(function: Function, inputs: Inputs) -> Any:
    """Compute a product with the Hessian, with the forward pass outside of the dual level."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in zip(leaves, like(leaves, 1), strict=True)]
        found = torch.autograd.grad(scalar(function)(*duals), leaves, create_graph=True)
        return [forward_ad.unpack_dual(x).tangent.detach() for x in found]


def run_batched_backward(function: Function, inputs: Inputs) -> Any:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = outputs(function)(*leaves)
    return torch.autograd.grad(out, leaves, like(out, 1, 3), is_grads_batched=True)


def run_vmap_of_backward(function: Function, inputs: Inputs) -> Any:
    """The forward pass is outside of vmap, and so by the kernels."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = outputs(function)(*leaves)
    return vmap(lambda *grads: torch.autograd.grad(out, leaves, grads, retain_graph=True))(*like(out, 1, 3))


def run_linearize(function: Function, inputs: Inputs) -> Any:
    out, push = linearize(outputs(function), *inputs)
    return out, push(*like(inputs, 1))


TRANSFORMS: dict[str, Callable[[Function, Inputs], Any]] = {
    "grad": lambda f, x: grad(scalar(f), argnums(x))(*x),
    "vjp": run_vjp,
    "jvp": lambda f, x: jvp(outputs(f), x, like(x, 1)),
    "vmap": lambda f, x: vmap(outputs(f))(*like(x, 1, 3)),
    "vmap_of_first": lambda f, x: vmap(outputs(f), (0, *[None] * (len(x) - 1)))(*like(x[:1], 1, 3), *x[1:]),
    "vmap_of_grad": lambda f, x: vmap(grad(scalar(f), argnums(x)))(*like(x, 1, 3)),
    "grad_of_vmap": lambda f, x: grad(scalar(vmap(outputs(f))), argnums(x))(*like(x, 1, 3)),
    "vmap_of_jvp": lambda f, x: vmap(lambda *t: jvp(outputs(f), x, t)[1])(*like(x, 1, 3)),
    "jacrev": lambda f, x: jacrev(outputs(f), argnums(x))(*x),
    "jacfwd": lambda f, x: jacfwd(outputs(f), argnums(x))(*x),
    "hessian": lambda f, x: hessian(scalar(f))(*x),
    "linearize": run_linearize,
    "forward_ad": run_forward_ad,
    "forward_over_reverse": run_forward_over_reverse,
    "batched_backward": run_batched_backward,
    "vmap_of_backward": run_vmap_of_backward,
}


def test_every_operator_has_a_case():
    without_gradients = {"adamw", "decoder", "decode_block", "quantize_weight", "quantized_embedding"}
    assert {case.operator for case in CASES} == set(OPERATORS) - without_gradients


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transform(case: Case, transform: str):
    run = TRANSFORMS[transform]
    found = run(lambda *x: case.call(ops, *x), case.inputs(torch.float32))
    exact = run(lambda *x: case.call(reference, *x), tuple(x.double() for x in case.inputs(torch.float32)))
    torch.testing.assert_close(tree_map(torch.Tensor.double, found), exact, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grad_is_that_of_autograd(case: Case):
    """torch.func.grad by the reference, autograd's by whatever backend serves the operator."""
    inputs = case.inputs(torch.float64)
    function = scalar(lambda *x: case.call(ops, *x))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(function(*leaves), leaves)
    torch.testing.assert_close(grad(function, argnums(inputs))(*inputs), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_has_left_a_transform(case: Case):
    """It is wrapped still, and has the gradient of what it wraps."""
    left: list[Tensor] = []

    def leave(*inputs: Tensor) -> Tensor:
        left.extend(2 * x for x in inputs)
        return sum(x.sum() for x in inputs)

    inputs = [x.requires_grad_() for x in case.inputs(torch.float32)]
    grad(leave, argnums(inputs))(*inputs)
    assert all(torch._C._functorch.unwrap_if_dead(x) is not x for x in left)
    found, expected = outputs(case.call)(ops, *left), outputs(case.call)(ops, *(2 * x for x in inputs))
    torch.testing.assert_close(found, expected)
    for out, same in zip(found, expected, strict=True):
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sin().sum(), inputs, retain_graph=True, allow_unused=True) for x in (out, same))
        )
    with torch.no_grad():
        torch.testing.assert_close(outputs(case.call)(ops, *left), expected)


# Sizes are compared in Python, and a trace is of one set of dtypes and ranks.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trace_passes_its_check(case: Case, requires_grad: bool):
    example = tuple(x.requires_grad_(requires_grad) for x in case.inputs(torch.float32))
    traced = torch.jit.trace(outputs(lambda *x: case.call(ops, *x)), example, check_trace=True)
    assert "PythonOp" not in str(traced.graph)
    assert "tinyllm::" not in str(traced.graph)  # a program without this package can run it
    others = case.inputs(torch.float32, seed=1)
    expected = outputs(lambda *x: case.call(reference, *x))(*(x.double() for x in others))
    torch.testing.assert_close(tuple(x.double() for x in traced(*others)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_vmap_over_ids_and_targets(batched: bool):
    ids = torch.tensor([[0, 3], [2, 1], [1, 1]])
    weight = torch.randn(3, 4, 5) if batched else torch.randn(4, 5)
    dims = (0, 0 if batched else None)
    for function in (
        lambda i, w: ops.embedding(i, w),
        lambda i, w: ops.cross_entropy(w[i], i),
        lambda i, w: ops.linear_cross_entropy(w[i], w, i),
    ):
        rows = [function(ids[k], weight[k] if batched else weight) for k in range(3)]
        torch.testing.assert_close(vmap(function, dims)(ids, weight), torch.stack(rows))


DROPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: ops.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "embedding": lambda x: ops.embedding(IDS, x, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_under_vmap_follows_its_randomness(name: str):
    function, x = DROPPING[name], torch.ones(3, 8, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function)(x)
    same, different = (vmap(function, randomness=kind)(x) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("batched", ["is_grads_batched", "vmap"])
def test_batched_backward_through_dropout_drops_the_same(name: str, batched: str):
    shape = (2, 6, 4) if name == "attention" else (5, 4)
    x = torch.randn(shape, requires_grad=True)
    out = DROPPING[name](x)
    grads = torch.randn(3, *out.shape)
    pull = lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0]  # noqa: E731
    expected = torch.stack([pull(grad) for grad in grads])
    if batched == "vmap":
        found = vmap(pull)(grads)
    else:
        (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forced_kernels_name_the_transform(case: Case):
    inputs = case.inputs(torch.float32)
    function = scalar(lambda *x: case.call(ops, *x))
    with ops.backend("cpp", case.operator):
        with pytest.raises(RuntimeError, match=r"cpp: a transform of torch\.func is active.*reference: can serve it"):
            vmap(function)(*like(inputs, 1, 3))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="cpp: forward-mode automatic differentiation"):
            function(*inputs)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vmap_of_grad"])
def test_compiled_with_a_transform_inside(transform: str):
    def run(x: Tensor, weight: Tensor) -> Any:
        def function(x: Tensor) -> Tensor:
            return ops.layer_norm(x, (8,), weight).sin()

        total = lambda x: function(x).sum()  # noqa: E731
        return {
            "grad": lambda: grad(total)(x),
            "vmap": lambda: vmap(function)(x),
            "jvp": lambda: jvp(function, (x,), (x.cos(),))[1],
            "vmap_of_grad": lambda: vmap(grad(total))(x),
        }[transform]()

    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight), run(x, weight))


def test_compiled_first_without_a_transform_and_then_with_one():
    def run(x: Tensor, batched: bool) -> Tensor:
        function = lambda x: ops.layer_norm(x, (8,)).sin()  # noqa: E731
        return vmap(function)(x) if batched else function(x)

    compiled, x = torch.compile(run, fullgraph=True, backend="aot_eager"), torch.randn(3, 8)
    for batched in (False, True, False):
        torch.testing.assert_close(compiled(x, batched), run(x, batched))


def test_nothing_stays_behind():
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kernel that vmap calls row by row would warn
        before = ops.layer_norm(x, (8,)), ops.last_backend()
        vmap(lambda x: ops.layer_norm(x, (8,)))(x)
        assert ops.last_backend() == "reference"
        with forward_ad.dual_level():
            ops.layer_norm(x, (8,))
            assert ops.last_backend() == "reference"
        assert ops.active_transform() is None
        assert torch.equal(ops.layer_norm(x, (8,)), before[0])
        assert ops.last_backend() == before[1]
