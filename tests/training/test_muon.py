"""Muon beside torch's, and as one optimizer with AdamW."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import _muon

from tests.helpers.runs import small
from tinyllm.model import SimpleLLM
from tinyllm.training import muon
from tinyllm.training.muon import ERROR, Muon, orthogonalize
from tinyllm.training.optim import make_optimizer

SHAPES = [(16, 16), (48, 16), (16, 48), (16, 16), (7, 13), (1, 5), (48, 16)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("at_once", [1 << 22, 1000, 1])
def test_all_but_the_iteration_is_torchs(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda update, *rest: orthogonalize(update[None])[0])
    monkeypatch.setattr(muon, "_BATCH", at_once)
    ours, theirs = matrices(), matrices()
    optimizers = [
        Muon(ours, torch.optim.AdamW([nn.Parameter(torch.zeros(3))]), lr=0.02, weight_decay=0.3),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)
        states = optimizers[0].state[mine], optimizers[1].state[expected]
        torch.testing.assert_close(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


def test_the_iteration_is_as_good_as_torchs() -> None:
    """The result for a matrix with few large singular values, as gradients have, is nearer to an orthogonal one."""
    u, _, v = torch.linalg.svd(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -2, 64)) @ v
    ours = (orthogonalize(matrix[None])[0] - u @ v).norm()
    theirs = (_muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7).float() - u @ v).norm()
    assert ours < theirs


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e12])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 96, 32), (2, 32, 96), (1, 1, 1), (2, 0, 3)])
def test_singular_values_come_near_to_one(shape: tuple[int, ...], size: float) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    found = orthogonalize(matrices)
    assert found.shape == shape
    before, after = torch.linalg.svdvals(matrices.double()), torch.linalg.svdvals(found.double())
    assert (after <= 1 + ERROR + 1e-4).all()
    assert (
        (after.flip(1)[before.flip(1) > 0.02 * before.amax(1, keepdim=True)] >= 0.5).all() if before.numel() else True
    )


def test_a_gradient_of_zeros_moves_nothing_but_by_decay() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([parameter], torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), lr=0.1, weight_decay=0.5)
    parameter.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))


def test_it_trains_all_parameters_as_one_optimizer() -> None:
    """A step of each part, with a learning rate set from outside, and a state that another one can take up."""
    config = small(preset="tiny", optimizer="muon", num_layers=2, embedding_dim=16)
    model = SimpleLLM.from_config(config.model_config(11))
    ids = torch.arange(8).view(1, 8)
    optimizer = make_optimizer(model, config)

    def step(model: SimpleLLM, optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        model.loss(ids, ids).backward()
        optimizer.step()

    before = copy.deepcopy(dict(model.named_parameters()))
    step(model, optimizer, 0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    step(model, optimizer, 1e-2)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert {len(state) for state in optimizer.state.values()} == {1, 3}
    assert len(optimizer.state) == len(before)

    twin = copy.deepcopy(model)
    other = make_optimizer(twin, config)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), (twin, other)):
        step(*each, 1e-3)
    for (name, parameter), (_, expected) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_copies_and_pickles_take_the_same_steps() -> None:
    matrix, vector = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3))
    first = Muon([matrix], torch.optim.AdamW([vector]), lr=0.1)
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        parameters = [p for group in copied.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        copied.step()
        assert [torch.equal(p, before) for p, before in zip(parameters, (matrix, vector), strict=True)] == [False] * 2
        assert len(copied.state) == 2
    assert not first.state


def test_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="Muon trains matrices only"):
        Muon([nn.Parameter(torch.zeros(3))], torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), lr=0.1)


def test_a_closure() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([parameter], torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), lr=0.1)

    def closure() -> float:
        loss = parameter.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert parameter.grad is not None
    assert not torch.equal(parameter, torch.ones(2, 2))
