"""torch.func, forward-mode AD and torch.jit.trace on SimpleLLM."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F

from tinyllm import SimpleLLM, ops

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own jvp uses it

IDS = torch.tensor([[0, 4, 2], [3, 3, 1]])
TARGETS = torch.tensor([[4, 2, 5], [3, 1, -100]])

MODELS: dict[str, Callable[[], SimpleLLM]] = {
    "article": lambda: SimpleLLM(6, 8, 12, 2),
    "gpt2": lambda: SimpleLLM(
        6, 8, 12, 2, num_heads=2, causal=True, norm_first=True, activation="gelu", position="learned", max_seq_len=16
    ),
    "tied": lambda: SimpleLLM(6, 8, 12, 1, num_heads=2, bias=False, tie_embeddings=True),
    "large_products": lambda: SimpleLLM(6, 160, 1056, 1, num_heads=4, causal=True),  # in the operators of tinyllm
}
Parameters = dict[str, Tensor]


@pytest.fixture(params=MODELS)
def model(request: Any) -> SimpleLLM:
    torch.manual_seed(0)
    return MODELS[request.param]()


def loss_of(model: SimpleLLM, ids: Tensor = IDS, targets: Tensor = TARGETS) -> Callable[[Parameters], Tensor]:
    def loss(parameters: Parameters) -> Tensor:
        logits = functional_call(model, parameters, (ids,))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss


def parameters_of(model: SimpleLLM) -> Parameters:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def by_autograd(model: SimpleLLM, ids: Tensor = IDS, targets: Tensor = TARGETS) -> Parameters:
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))


def assert_alike(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grad(model: SimpleLLM):
    assert_alike(grad(loss_of(model))(parameters_of(model)), by_autograd(model))


def test_grad_of_the_loss_method(model: SimpleLLM):
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.loss(IDS, TARGETS)

    parameters = {f"model.{name}": parameter for name, parameter in parameters_of(model).items()}
    found = grad(lambda p: functional_call(Loss(), p, ()))(parameters)
    assert_alike(found, {f"model.{name}": x for name, x in by_autograd(model).items()})


def test_gradient_of_each_sequence(model: SimpleLLM):
    def loss(parameters: Parameters, ids: Tensor, targets: Tensor) -> Tensor:
        return loss_of(model, ids[None], targets[None])(parameters)

    found = vmap(grad(loss), (None, 0, 0))(parameters_of(model), IDS, TARGETS)
    for i in range(2):
        expected = by_autograd(model, IDS[i : i + 1], TARGETS[i : i + 1])
        assert_alike({name: x[i] for name, x in found.items()}, expected)


def test_ensemble():
    models = [MODELS["gpt2"]() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    found = vmap(lambda *state: functional_call(models[0], state, (IDS,)))(parameters, buffers)
    assert_alike(found, torch.stack([model(IDS) for model in models]))


def test_jvp_agrees_with_the_gradient(model: SimpleLLM):
    parameters = parameters_of(model)
    tangents = {name: torch.randn_like(x) for name, x in parameters.items()}
    expected = sum((by_autograd(model)[name] * tangent).sum() for name, tangent in tangents.items())
    assert_alike(jvp(loss_of(model), (parameters,), (tangents,))[1], expected)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, tangents[name]) for name, x in parameters.items()}
        assert_alike(forward_ad.unpack_dual(loss_of(model)(duals)).tangent, expected)


def test_product_with_the_hessian(model: SimpleLLM):
    parameters = parameters_of(model)
    tangents = {name: torch.randn_like(x) for name, x in parameters.items()}
    found = jvp(grad(loss_of(model)), (parameters,), (tangents,))[1]
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(IDS).flatten(0, 1), TARGETS.flatten())
    first = torch.autograd.grad(loss, [*named.values()], create_graph=True)
    product = sum((x * tangent).sum() for x, tangent in zip(first, tangents.values(), strict=True))
    expected = torch.autograd.grad(product, [*named.values()])  # type: ignore[arg-type]
    torch.testing.assert_close([*found.values()], [*expected], rtol=1e-3, atol=1e-4)


def test_dropout_under_vmap_follows_its_randomness():
    model = SimpleLLM(6, 8, 12, 1, num_heads=2, dropout=0.5)
    run = lambda ids: model(ids[None])  # noqa: E731
    ids = IDS[:1].expand(2, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(ids)
    same, different = (vmap(run, randomness=kind)(ids) for kind in ("same", "different"))
    torch.testing.assert_close(same[0], same[1])
    assert not torch.allclose(different[0], different[1])


def test_calls_within_a_transform_leave_nothing_in_the_model(model: SimpleLLM):
    with torch.no_grad():
        expected = model(IDS)
        backend = ops.last_backend()
        whole = model._whole
        grad(loss_of(model))(parameters_of(model))
        assert model._whole is whole
        assert torch.equal(model(IDS), expected)
    assert ops.last_backend() == backend


# Sizes are compared in Python, and a trace is of one set of dtypes and ranks.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("with_grad", [False, True])
def test_trace_passes_its_check(model: SimpleLLM, with_grad: bool, called_before: bool):
    model.eval()
    ids = torch.tensor([[1, 5, 0, 2, 2], [0, 1, 2, 3, 4], [5, 5, 5, 1, 0]])  # another batch size and another length
    with torch.set_grad_enabled(with_grad):
        if called_before:
            model(IDS)
        traced = torch.jit.trace(model, IDS, check_trace=True)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert_alike(traced(ids), model(ids))
        assert_alike(loaded(ids), model(ids))
    assert "tinyllm::" not in str(traced.inlined_graph)  # a program without this package can load it


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_can_be_trained(model: SimpleLLM):
    expected = by_autograd(model)
    traced = torch.jit.trace(model, IDS)
    F.cross_entropy(traced(IDS).flatten(0, 1), TARGETS.flatten()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_alike(found, expected)
