"""Checks of GPUs, and of what serves them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import metadata

from tinyllm._doctor.commands import DRIVERS, cuda_build, install_torch, rebuild_cuda, sudo
from tinyllm._doctor.facts import Check, Finding, Gpu, Level, World
from tinyllm._internal.installation import pip_install

# The least driver for each major version of CUDA, from NVIDIA's table of minor version compatibility.
_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
_ALL_ON_CPU = "Everything runs on the CPU."


def check_gpus(world: World) -> Iterator[Finding]:
    torch, gpu = world.torch, world.gpu
    if torch.cuda.is_available():
        yield from _check_each_gpu(world)
        return
    if gpu is None or torch.version.hip is not None:
        return
    version = torch.version.cuda
    if not gpu.present:
        container = any((world.root / name).exists() for name in (".dockerenv", "run/.containerenv"))
        remedy = "docker run --gpus all ..." if container else f"{sudo()}nvidia-modprobe -c 0 -u"
        title = f"There is an NVIDIA driver, {gpu.driver}, and no device of a GPU that this process could open."
        yield Finding("advice", title, _ALL_ON_CPU, remedy)
    elif version is None:
        title = f"There is an NVIDIA GPU, and torch {torch.__version__} is a build without CUDA."
        yield Finding("wrong", title, _ALL_ON_CPU, install_torch(gpu))
    elif (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and (not shown or shown.startswith("-")):
        title = f"CUDA_VISIBLE_DEVICES={shown} hides all GPUs."
        yield Finding("advice", title, _ALL_ON_CPU, "unset CUDA_VISIBLE_DEVICES")
    elif gpu.release is not None and gpu.release < _LEAST_DRIVER.get(int(version.split(".")[0]), 0):
        least = _LEAST_DRIVER[int(version.split(".")[0])]
        title = f"The driver, {gpu.driver}, is too old for torch's CUDA {version}, which needs {least} or later."
        remedy = install_torch(gpu) if cuda_build(gpu) else f"# Update the driver: {DRIVERS}"
        yield Finding("wrong", title, _ALL_ON_CPU, remedy)
    else:
        try:
            torch.cuda.init()
            reason = "it does not say why"
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
        title = f"torch {torch.__version__}, built for CUDA {version}, finds no GPU, though there is one: {reason}"
        remedy = f"{sudo()}reboot  # as after each update of the driver. If nvidia-smi fails then, too: {DRIVERS}"
        yield Finding("wrong", title, _ALL_ON_CPU, remedy)


def _check_each_gpu(world: World) -> Iterator[Finding]:
    from tinyllm.ops.backends import cuda

    count, arches = world.torch.cuda.device_count(), world.torch.cuda.get_arch_list()
    old = {index: reason for index in range(count) if (reason := cuda.too_old(index)) is not None}
    young = [index for index in range(count) if index not in old]
    visible = f"export CUDA_VISIBLE_DEVICES={','.join(map(str, young))}"
    for reason in old.values():
        remedy = visible if young else "# Use a GPU of the Ampere generation or a later one."
        yield Finding("advice", f"A GPU has no kernels of ours: {reason}.", "It has plain PyTorch's alone.", remedy)
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        cost = "The CPU waits for the end of each of a GPU's kernels."
        yield Finding("advice", "CUDA_LAUNCH_BLOCKING is set.", cost, "unset CUDA_LAUNCH_BLOCKING")
    for index in young:
        capability = world.torch.cuda.get_device_capability(index)
        if arches and not any(_runs(arch, *capability) for arch in arches):
            title = f"torch {world.torch.__version__} has no code for cuda:{index}, of compute capability "
            cost = "Every call on this GPU fails."
            gpu = (world.gpu or Gpu(True))._replace(major=capability[0])
            yield Finding("wrong", f"{title}{capability[0]}.{capability[1]}.", cost, install_torch(gpu))


def _runs(arch: str, major: int, minor: int) -> bool:
    """Return whether a GPU runs what was compiled for sm_90 (its major version alone) or for compute_90 (all later)."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch)
    if found is None:
        return False
    built = int(found[2]), int(found[3])
    return built <= (major, minor) and (found[1] == "compute" or built[0] == major)


def _level(world: World) -> Level:
    """Return how bad it is when what serves GPUs does not: not very where there is none."""
    there = world.torch.cuda.is_available() or (world.gpu is not None and world.gpu.present)
    return "wrong" if there else "advice"


def check_cuda_library(world: World) -> Iterator[Finding]:
    from tinyllm.ops.backends import cpp, cuda

    version, available = world.torch.version.cuda, world.torch.cuda.is_available()
    if cuda.emulated:
        cost = "The CUDA C++ kernels are those of the tests, emulated on the CPU; GPUs have Triton's alone."
        yield Finding(_level(world), "TINYLLM_EMULATED_CUDA is set.", cost, "unset TINYLLM_EMULATED_CUDA")
        return
    if version is None or not available or cuda.why_not is None or not cpp.loaded:
        return
    record = cpp.build_record()
    nvcc = record.get("nvcc", version)
    cost, remedy = "Triton's kernels serve the GPU alone.", rebuild_cuda(world.root, version)
    if record.get("cuda") == "built" and nvcc.split(".")[0] != version.split(".")[0]:
        title = f"The CUDA library was built with CUDA {nvcc}, and torch has CUDA {version}: the majors differ."
        yield Finding("wrong", title, cost, remedy)
    elif record.get("cuda_reason") != "TINYLLM_CUDA=0":  # as all wheels are, whose users have no nvcc
        level: Level = "wrong" if record.get("cuda") == "built" else "advice"
        yield Finding(level, f"{cuda.why_not[0].upper()}{cuda.why_not[1:]}.", cost, remedy)


def check_triton(world: World) -> Iterator[Finding]:
    from tinyllm.ops.backends import triton

    if triton.interpreted:
        cost = "Triton's kernels run in its interpreter, on NumPy: right, and slower than anything else."
        yield Finding(_level(world), "TRITON_INTERPRET is set.", cost, "unset TRITON_INTERPRET")
    if world.torch.version.cuda is None or _level(world) == "advice" or triton.why_not is None:
        return
    # Each torch has its own.
    pinned = (re.match(r"triton\s*[=<>~!][^;]*", need) for need in metadata.requires("torch") or [])
    wanted = next((found[0].strip() for found in pinned if found), "triton")
    cost = "GPUs have no kernels but those in CUDA C++, where these were built."
    command = f'{pip_install()} --force-reinstall --no-deps "{wanted}"'
    yield Finding("wrong", f"{triton.why_not[0].upper()}{triton.why_not[1:]}.", cost, command)


CHECKS: dict[str, Check] = {
    "GPUs": check_gpus,
    "the CUDA library": check_cuda_library,
    "Triton": check_triton,
}
