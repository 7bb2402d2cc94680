"""On which GPUs the kernels are said to be proven."""

import json

import pytest
import torch

from benchmarks import proven, report
from benchmarks.row import CUDA, TRITON, Target
from benchmarks.rows import rows
from tinyllm._info import format_info
from tinyllm.ops.backends import hardware


@pytest.fixture
def measured(monkeypatch):
    """Let the committed results say that the rows of some operators were measured on a GPU, by one provider."""

    def commit(provider, capability, *operators):
        entries = [
            {**row.facts(), "provider": name, **({} if measured else {"failed": "out of time"})}
            for row in rows(Target(gpu=True))
            for name in (CUDA, TRITON)
            for measured in [name == provider and row.operators and set(row.operators) <= set(operators)]
        ]
        found = proven.proven([{"gpu": {"capability": capability}, "rows": entries}])
        monkeypatch.setattr(hardware, "_measured", lambda: found)

    return commit


@pytest.fixture
def gpus(monkeypatch):
    def have(*capabilities):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])

    have()
    return have


def test_what_is_installed_is_what_the_committed_results_prove():
    assert json.loads(hardware.PROVEN.read_text(encoding="utf-8")) == proven.proven(report.stored("gpu").values())


def test_what_was_not_measured_is_not_proven(measured, gpus):
    measured(CUDA, "9.0", "layer_norm")
    assert hardware.proven("layer_norm", "cuda") == [9]
    assert hardware.proven("layer_norm", "triton") == []
    assert hardware.proven("rms_norm", "cuda") == []
    assert hardware.remark("rms_norm", "cuda") == "not proven on hardware"
    assert hardware.remark("layer_norm", "cuda") == "proven on hardware of compute capability 9.x"
    assert hardware.remark("linear", "reference") is None


def test_another_family_proves_nothing_for_this_one(measured, gpus):
    measured(TRITON, "9.0", "attention")
    gpus((9, 0))
    assert hardware.remark("attention", "triton") is None
    gpus((9, 0), (8, 6))
    assert hardware.remark("attention", "triton") == "not proven on hardware of compute capability 8.x"


def test_info_says_what_is_not_proven(monkeypatch, measured, gpus):
    monkeypatch.setattr(hardware, "_measured", dict)
    lines = format_info().splitlines()
    at = lines.index("not proven on hardware:")
    assert all(name in "".join(lines[at + 1 :]) for name in ("layer_norm", "attention", "linear_cross_entropy"))
    measured(TRITON, "9.0", "attention")
    assert "proven on hardware of compute capability 9.x:" in format_info().splitlines()
