"""tinyllm.optim.AdamW against torch.optim.AdamW."""

from __future__ import annotations

import copy
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.needs import needs_extension
from tests.ops.parity import DTYPES, assert_accurate, assert_equal, assert_same_bits
from tinyllm import ops, optim
from tinyllm.optim import AdamW

# The last ones are in several chunks of the kernel's, and share some.
SHAPES = [(3,), (), (0, 4), (1, 1), (17, 5), (300, 257), (16_384,)]
OPTIONS = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7}


def make(kind: type[torch.optim.AdamW], dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    unused = nn.Parameter(torch.ones(2, dtype=dtype))
    groups = [
        {"params": [p for p in parameters if p.dim() > 1] + [unused], "weight_decay": 0.3},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.1},
        {"params": [nn.Parameter(torch.ones(2, dtype=dtype))]},  # no gradient at all
    ]
    return kind(groups, **{"fused": True, **OPTIONS, **options})


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_gradients(optimizer: torch.optim.Optimizer, seed: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(optimizer):
        if parameter.shape != (2,):
            # The numbers that the least of the dtypes can hold, so that float64 has the same.
            grad = (scale * torch.randn(parameter.shape, generator=generator)).to(torch.bfloat16).to(torch.float16)
            parameter.grad = grad.to(parameter.dtype)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for i, parameter in enumerate(parameters_of(optimizer)):
        state = optimizer.state.get(parameter, {})
        found |= {f"{i}": parameter.detach(), **{f"{i}.{key}": value for key, value in state.items()}}
    return found


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float = 1.0) -> Tensor:
    if isinstance(optimizer, AdamW):
        return optimizer.clip_and_step(max_norm)
    norm = torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm)
    optimizer.step()
    return norm


@pytest.fixture
def served():
    """The calls of the kernel."""
    with mock.patch.object(optim, "step_by_kernel", wraps=optim.step_by_kernel) as step:
        yield step


@needs_extension
@pytest.mark.parametrize("max_norm", [1.0, 1e6, None])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype, maximize: bool, max_norm: float | None, served: mock.Mock) -> None:
    """The first steps are those of PyTorch's; it scales 16-bit gradients in place, and so rounds once more."""
    ours, torchs = make(AdamW, dtype, maximize=maximize), make(torch.optim.AdamW, dtype, maximize=maximize)
    exact = make(torch.optim.AdamW, torch.float64, maximize=maximize)
    for theirs, own in zip(parameters_of(exact), parameters_of(ours), strict=True):
        theirs.data.copy_(own.data)
    for step in range(4):
        norms = []
        for optimizer in (ours, torchs, exact):
            set_gradients(optimizer, step)
            if max_norm is None:
                optimizer.step()
            else:
                norms.append(clip_and_step(optimizer, max_norm))
        if norms:
            assert_accurate("norm", norms[0], norms[1].to(norms[0].dtype), norms[2])
    assert served.call_count == 8  # a call for each group with gradients
    found = [state_of(optimizer) for optimizer in (ours, torchs, exact)]
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert_accurate(name, *[state[name] for state in found], steps=8)


@needs_extension
def test_any_number_of_threads_gives_the_same_bits() -> None:
    def steps() -> list[Tensor]:
        optimizer = make(AdamW)
        norms = []
        for step in range(2):
            set_gradients(optimizer, step)
            norms.append(clip_and_step(optimizer))
        return [*norms, *state_of(optimizer).values()]

    assert_same_bits((1, 2, 3), steps)


@needs_extension
def test_gradients_are_left_as_they_are(served: mock.Mock) -> None:
    optimizer = make(AdamW)
    set_gradients(optimizer)
    before = [p.grad.clone() for p in parameters_of(optimizer) if p.grad is not None]
    assert clip_and_step(optimizer) > 1
    assert_equal([p.grad for p in parameters_of(optimizer) if p.grad is not None], before)
    assert served.called


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_step_with_a_gradient_that_is_not_finite(bad: float, fused: bool) -> None:
    optimizer = make(AdamW, fused=fused)
    set_gradients(optimizer)
    clip_and_step(optimizer)
    before = {name: value.clone() for name, value in state_of(optimizer).items()}
    parameters_of(optimizer)[2].grad[1, 1] = bad  # type: ignore[index]
    norm = clip_and_step(optimizer)
    assert not torch.isfinite(norm)
    assert norm.isnan() == torch.tensor(bad).isnan()
    after = state_of(optimizer)
    assert_equal(list(after.values()), list(before.values()))


@needs_extension
def test_the_kernel_serves_after_the_state_of_torchs_default_is_loaded() -> None:
    theirs, ours = (kind([nn.Parameter(torch.ones(4))]) for kind in (torch.optim.AdamW, AdamW))
    set_gradients(theirs)
    theirs.step()
    assert theirs.param_groups[0]["fused"] is None
    ours.load_state_dict(theirs.state_dict())
    set_gradients(ours)
    with mock.patch.object(optim, "step_by_kernel", wraps=optim.step_by_kernel) as kernel:
        ours.step()
    assert kernel.call_count == 1


def test_a_state_of_float64_steps_is_left_to_pytorch() -> None:
    """So are those that PyTorch makes where that is the default dtype."""
    theirs, ours = (kind([nn.Parameter(torch.ones(4))]) for kind in (torch.optim.AdamW, AdamW))
    set_gradients(theirs)
    theirs.step()
    (state,) = theirs.state.values()
    state["step"] = state["step"].double()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    ours.param_groups[0]["params"][0].data.copy_(theirs.param_groups[0]["params"][0].data)
    for optimizer in (theirs, ours):
        set_gradients(optimizer)
        optimizer.step()
    torch.testing.assert_close(*(parameters_of(optimizer) for optimizer in (theirs, ours)))


@pytest.mark.parametrize("kinds", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_the_state_dict_is_torchs(kinds: tuple[type[torch.optim.AdamW], ...]) -> None:
    """A training begun with either goes on with the other, to rounding."""
    first, second, alone = make(kinds[0]), make(kinds[1]), make(kinds[0])
    for optimizer in (first, alone):
        set_gradients(optimizer)
        clip_and_step(optimizer)
    for theirs, own in zip(parameters_of(second), parameters_of(first), strict=True):
        theirs.data.copy_(own.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]
    for optimizer in (second, alone):
        set_gradients(optimizer, 1)
        clip_and_step(optimizer)
    found, expected = state_of(second), state_of(alone)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


CHANNELS_LAST = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
LEFT = {
    "amsgrad": ({"amsgrad": True}, [nn.Parameter(torch.ones(3))]),
    "not fused": ({"fused": False}, [nn.Parameter(torch.ones(3))]),
    "foreach": ({"foreach": True}, [nn.Parameter(torch.ones(3))]),
    "strides": ({}, [CHANNELS_LAST]),
    "dtypes": ({}, [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_pytorch(name: str, served: mock.Mock) -> None:
    options, parameters = LEFT[name]
    theirs = {"fused": name in ("strides", "dtypes", "amsgrad"), **options}
    optimizers = [
        AdamW(copy.deepcopy(parameters), **options),
        torch.optim.AdamW(copy.deepcopy(parameters), **theirs),
    ]
    for _ in range(2):
        for optimizer in optimizers:
            for parameter in parameters_of(optimizer):
                parameter.grad = torch.full_like(parameter, 2.0)
            clip_and_step(optimizer)
    assert_equal(list(state_of(optimizers[0]).values()), list(state_of(optimizers[1]).values()))
    assert not served.called


def test_a_forced_reference_is_pytorchs_step(served: mock.Mock) -> None:
    ours, torchs = make(AdamW), make(torch.optim.AdamW)
    with ops.backend("reference"):
        for optimizer in (ours, torchs):
            set_gradients(optimizer)
            clip_and_step(optimizer)
    assert_equal(list(state_of(ours).values()), list(state_of(torchs).values()))
    assert not served.called


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_and_schedulers_count_each_step_once(fused: bool) -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch's class has its hooks from its first object on
    optimizer = make(AdamW, fused=fused)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    set_gradients(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_and_step(optimizer)
        scheduler.step()
    assert calls == ["before", "after"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.05, 0.005]


def test_a_closure() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert optimizer.step(closure) < 3.0


@pytest.mark.parametrize("unscaled", [True, False])
def test_a_grad_scaler(unscaled: bool) -> None:
    ours, torchs = make(AdamW), make(torch.optim.AdamW)
    for optimizer in (ours, torchs):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))  # which makes the scale
        set_gradients(optimizer)
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    assert_equal(list(state_of(ours).values()), list(state_of(torchs).values()))


@needs_extension
def test_autograd_notices_the_step() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter])
    parameter.grad = torch.ones(3)
    loss = parameter.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_can_be_copied_and_compiled() -> None:
    optimizers = [make(AdamW)]
    optimizers += [copy.deepcopy(optimizers[0]) for _ in range(2)]
    for optimizer in optimizers:
        set_gradients(optimizer)
    optimizers[0].step()
    optimizers[1].step()
    torch.compile(optimizers[2].step, backend="eager")()
    states = [list(state_of(optimizer).values()) for optimizer in optimizers]
    assert_equal(states[1], states[0])
    for found, expected in zip(states[2], states[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_without_any_gradient() -> None:
    optimizer = make(AdamW)
    assert clip_and_step(optimizer) == 0
    assert not optimizer.state
