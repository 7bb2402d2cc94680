"""`tinyllm doctor` on machines that have GPUs, or seem to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.installations import REINSTALL, World, raising
from tinyllm._doctor.facts import find_gpu
from tinyllm.ops.backends import cuda, triton


def test_what_the_system_knows_of_gpus(world: World) -> None:
    assert find_gpu(world.root) is None
    world.file("dev/dxg")  # of a GPU of another vendor, in WSL
    assert find_gpu(world.root) is None
    world.file("usr/lib/wsl/lib/libcuda.so.1")
    assert find_gpu(world.root) == (True, None, None)
    world.program("nvidia-smi", "driver_version\n550.54.15")
    assert find_gpu(world.root) == (True, "550.54.15", None)
    world.program("nvidia-smi", "compute_cap\n9.0\n12.0")
    assert find_gpu(world.root) == (True, None, 12)


@pytest.mark.parametrize(
    ("driver", "index"), [("580.65.06", "cu130"), ("550.54.15", "cu126"), (None, "cu126"), ("470.82.01", "cu130")]
)
def test_a_torch_without_cuda_beside_a_gpu(world: World, driver: str | None, index: str) -> None:
    world.gpu(driver)
    finding = world.finds_one("wrong")
    assert "build without CUDA" in finding.title
    *before, command = finding.remedy.splitlines()
    assert (
        command == f'pip install --force-reinstall "torch>=2.10" --index-url https://download.pytorch.org/whl/{index}'
    )
    assert ["update the driver, which is 470.82.01" in line for line in before] == [True] * (driver == "470.82.01")


def test_a_driver_without_a_device(world: World) -> None:
    world.gpu(device=False)
    assert world.finds_one("advice").remedy == "sudo nvidia-modprobe -c 0 -u"
    world.file(".dockerenv")
    assert world.finds_one("advice").remedy.startswith("docker run --gpus all")


def test_gpus_that_are_hidden(world: World) -> None:
    world.gpu()
    world.torch_for("13.0")
    world.patch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert world.finds_one("advice").remedy == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(("driver", "remedy"), [("550.54.15", "/whl/cu126"), ("470.82.01", "# Update the driver")])
def test_a_driver_too_old_for_torch(world: World, driver: str, remedy: str) -> None:
    world.gpu(driver)
    world.torch_for("13.0")
    finding = world.finds_one("wrong")
    assert f"{driver}, is too old for torch's CUDA 13.0, which needs 580" in finding.title
    assert remedy in finding.remedy


def test_a_gpu_that_torch_does_not_find(world: World) -> None:
    world.gpu()
    world.torch_for("13.0")
    world.patch.setattr(torch.cuda, "init", raising(RuntimeError("system not\nyet initialized")))
    finding = world.finds_one("wrong")
    assert finding.title.endswith("system not yet initialized")
    assert finding.remedy.startswith("sudo reboot")


def test_gpus_that_are_too_old(world: World) -> None:
    world.torch_for("13.0", available=True)
    world.patch.setattr(cuda, "too_old", lambda index: None if index else "cuda:0 has 7.5")
    assert world.finds_one("advice").remedy == "export CUDA_VISIBLE_DEVICES=1"
    world.patch.setattr(cuda, "too_old", lambda index: f"cuda:{index} has 7.5")
    assert all("Ampere" in finding.remedy for finding in world.finds())


@pytest.mark.parametrize(
    ("arches", "runs"),
    [(["sm_90"], False), (["sm_90", "compute_90"], True), (["sm_100"], True), (["sm_103"], False), ([], True)],
)
def test_a_torch_without_code_for_the_gpu(world: World, arches: list[str], runs: bool) -> None:
    world.gpu()
    world.torch_for("12.6", available=True)
    world.patch.setattr(torch.cuda, "device_count", lambda: 1)
    world.patch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    world.patch.setattr(torch.cuda, "get_arch_list", lambda: arches)
    assert runs or world.finds_one("wrong").remedy.endswith("/whl/cu130")
    assert not runs or world.finds() == []
    if not runs:  # a driver that runs CUDA 12, whose builds have no code for this GPU either
        world.gpu("570.86.15")
        update, command = world.finds_one("wrong").remedy.splitlines()
        assert "update the driver, which is 570.86.15" in update
        assert command.endswith("/whl/cu130")


def test_a_cuda_library_for_another_major(world: World) -> None:
    world.torch_for("13.0", available=True)
    world.record.update(cuda="built", nvcc="12.8.93")
    world.patch.setattr(cuda, "why_not", "the CUDA library does not load: libcudart.so.12")
    finding = world.finds_one("wrong")
    assert "built with CUDA 12.8.93, and torch has CUDA 13.0" in finding.title
    tools, *_, build = finding.remedy.splitlines()
    assert tools.startswith("# Install the CUDA toolkit 13.0: https://")
    world.program("nvcc", "Cuda compilation tools, release 12.8, V12.8.93")
    world.program("nvcc", "Cuda compilation tools, release 13.1, V13.1.80", world.root / "usr/local/cuda-13.1/bin")
    tools, build = world.finds_one("wrong").remedy.splitlines()
    assert tools == "pip install setuptools pybind11 ninja wheel"
    home = world.root / "usr/local/cuda-13.1"
    rest = REINSTALL.removeprefix("pip install")
    assert build == f"CUDA_HOME={home} TINYLLM_CUDA=1 pip install --no-build-isolation{rest}"


def test_an_nvcc_that_was_missing_or_of_another_major(world: World) -> None:
    world.torch_for("13.0", available=True)
    reason = "/usr/bin/nvcc is CUDA 12.8.93, torch 2.13.0 CUDA 13.0: the majors differ"
    world.record["cuda_reason"] = reason
    world.patch.setattr(cuda, "why_not", f"the CUDA library was not built: {reason}")
    finding = world.finds_one("advice")
    assert reason in finding.title
    assert "TINYLLM_CUDA=1 pip install --no-build-isolation" in finding.remedy


def test_a_missing_triton(world: World) -> None:
    world.torch_for("13.0")
    world.patch.setattr(triton, "why_not", "triton is not installed")
    assert world.finds() == []  # without a GPU nothing lacks it
    world.torch_for("13.0", available=True)
    world.patch.setattr(triton, "why_not", "triton is not installed")
    assert world.finds_one("wrong").remedy == 'pip install --force-reinstall --no-deps "triton==3.9.0"'


@pytest.mark.parametrize(
    ("module", "name", "variable"),
    [(triton, "interpreted", "TRITON_INTERPRET"), (cuda, "emulated", "TINYLLM_EMULATED_CUDA")],
)
def test_what_tests_leave_set(world: World, module: Any, name: str, variable: str) -> None:
    world.patch.setattr(module, name, True)
    assert world.finds_one("advice").remedy == f"unset {variable}"
    world.torch_for("13.0", available=True)
    assert world.finds_one("wrong").remedy == f"unset {variable}"


def test_launches_that_wait(world: World) -> None:
    world.torch_for("13.0", available=True)
    world.patch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert world.finds_one("advice").remedy == "unset CUDA_LAUNCH_BLOCKING"
