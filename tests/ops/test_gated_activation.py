import functools

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import cases, on
from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference
from tinyllm.reference import ACTIVATIONS


@cases("dtype", cpp=DTYPES, triton=DTYPES[1:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (0, 4), (19, 64), (2, 5, 101)], ids=str)
def test_parity(backend, shape, activation, dtype):
    gate, up = backend.draw(*shape, dtype=dtype), backend.draw(*shape, dtype=dtype, seed=1)
    plain = functools.partial(reference.gated_activation, activation=activation)
    check_parity(functools.partial(ops.gated_activation, activation=activation), plain, plain, (gate, up))
    assert ops.last_backend() == backend.name


@on("cpp")
def test_many_elements(backend):
    gate, up = backend.draw(70, 1021), backend.draw(70, 1021, seed=1)
    check_parity(ops.gated_activation, reference.gated_activation, reference.gated_activation, (gate, up))


@on("cpp", "triton")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_values_and_slopes_far_out(backend, activation):
    """The value is x or 0, and the slope 1 or 0, for inputs whose exponential overflows."""
    x = backend.tensor([-1e4, -300.0, -90.0, -50.0, 50.0, 90.0, 300.0, 1e4]).requires_grad_()
    out = ops.gated_activation(x, torch.ones_like(x), activation)
    torch.testing.assert_close(out, torch.where(x > 0, x, 0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], (x > 0).float(), rtol=0, atol=1e-6)


def test_second_derivatives_of_strided_tensors_and_the_compiler():
    gate, up = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    for activation in ACTIVATIONS:
        assert torch.autograd.gradgradcheck(lambda g, u, a=activation: ops.gated_activation(g.T, u.T, a), (gate, up))
    compiled = torch.compile(ops.gated_activation, fullgraph=True, backend="aot_eager")(gate, up)
    torch.testing.assert_close(compiled, F.silu(gate) * up)


@on("cpp", "triton")
def test_opcheck(backend):
    gate, up = backend.draw(3, 7), backend.draw(3, 7, seed=1)
    torch.library.opcheck(backend.raw.gated_activation_fwd, (gate, up, "silu"))
    torch.library.opcheck(backend.raw.gated_activation_bwd, (gate, gate, up, "gelu"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_feed_forward(activation, bias):
    sizes = {
        "input": (3, 5, 8),
        "gate_weight": (12, 8),
        "up_weight": (12, 8),
        "down_weight": (6, 12),
        "residual": (3, 5, 6),
    }
    if bias:
        sizes |= {"gate_bias": (12,), "up_bias": (12,), "down_bias": (6,)}
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, size in sizes.items()
    }
    out = ops.gated_feed_forward(**given, activation=activation)
    x, bias_of = given["input"], lambda name: given.get(f"{name}_bias")
    gate, up = (F.linear(x, given[f"{name}_weight"], bias_of(name)) for name in ("gate", "up"))
    hidden = ACTIVATIONS[activation](gate) * up
    plain = F.linear(hidden, given["down_weight"], bias_of("down")) + given["residual"]
    torch.testing.assert_close(out, plain)
    leaves = list(given.values())
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(plain.square().sum(), leaves)
    )


@pytest.mark.parametrize(("arguments", "error", "says"), [
    ((torch.ones(3, dtype=torch.int64), torch.ones(3)), TypeError, "gate has dtype torch.int64"),
    ((torch.ones(3), torch.ones(3, dtype=torch.float64)), TypeError, "up has dtype torch.float64"),
    ((torch.ones(3), torch.ones(4)), ValueError, r"up has shape \[4\]; it must have gate's, \[3\]"),
    ((torch.ones(3), torch.ones(3, device="meta")), ValueError, "up is on meta"),
    ((torch.ones(3), torch.ones(3), "swish"), ValueError, "activation is 'swish'"),
])  # fmt: skip
def test_bad_input(arguments, error, says):
    with pytest.raises(error, match=says):
        ops.gated_activation(*arguments)


def test_a_raw_call_with_bad_shapes_is_refused():
    with pytest.raises((ValueError, RuntimeError), match="up has shape"):
        torch.ops.tinyllm.gated_activation_fwd(torch.ones(3), torch.ones(4), "silu")
