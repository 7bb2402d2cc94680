"""Commands that mend an installation."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from tinyllm._doctor.facts import Gpu, least, output, version_of
from tinyllm._internal.installation import pip_install, reinstall

# The driver that a build of torch needs, and its index: those that every torch from 2.10 on is in, the latest first.
_CUDA_BUILDS = ((580, "cu130"), (525, "cu126"))
_BLACKWELL = 10  # the compute capability from which on the first of them alone has code
_INDEX = "https://download.pytorch.org/whl"
_LOCAL = ("cpu", *(build for _, build in _CUDA_BUILDS))  # behind the + of a version from such an index
_TOOLKITS = "https://developer.nvidia.com/cuda-toolkit-archive"
DRIVERS = "https://www.nvidia.com/drivers"


def install(*options: str) -> str:
    """Return the command that installs tinyllm once more for this Python, from where it came."""
    return " ".join((pip_install(), *options, reinstall().removeprefix("pip install ")))


def sudo() -> str:
    return "" if os.geteuid() == 0 else "sudo "


def cuda_build(gpu: Gpu | None) -> str | None:
    """Return the latest build of torch that the driver runs and that has code for the GPU, the one for old drivers
    where its version is not known; None where there is none."""
    release, major = (None, None) if gpu is None else (gpu.release, gpu.major)
    builds = _CUDA_BUILDS[:1] if (major or 0) >= _BLACKWELL else _CUDA_BUILDS
    if release is None:
        return builds[-1][1]
    return next((build for least, build in builds if release >= least), None)


def install_torch(gpu: Gpu | None) -> str:
    """Return the commands that install a torch for this machine, in the place of one that is there."""
    floor, there = least("torch"), version_of("torch")
    # Without force, pip would take a build for CPUs of the same version for the one that is asked for.
    torch = f'"torch>={floor}"' if floor else "torch"
    command = f"{pip_install()} {torch if there is None else f'--force-reinstall {torch}'}"
    if gpu is None or not gpu.present:
        local = (there or "").partition("+")[2]
        return f"{command} --index-url {_INDEX}/{local}" if local in _LOCAL else command
    build = cuda_build(gpu)
    update = "" if build else f"# First update the driver, which is {gpu.driver}: {DRIVERS}\n"
    return f"{update}{command} --index-url {_INDEX}/{build or _CUDA_BUILDS[0][1]}"


def rebuild_cuda(root: Path, version: str) -> str:
    """Return the commands that build the CUDA library against the torch that is installed."""
    major = version.split(".")[0]
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which("nvcc")
    homes += [Path(on_path).resolve().parents[1]] if on_path else []
    homes += sorted(root.glob("usr/local/cuda*"), reverse=True)
    fit = (home for home in homes if f"release {major}." in output(str(home / "bin/nvcc"), "--version"))
    home = next(fit, None)
    lines = [] if home else [f"# Install the CUDA toolkit {version}: {_TOOLKITS}"]
    lines.append(f"{pip_install()} setuptools pybind11 ninja wheel")
    variables = f"CUDA_HOME={shlex.quote(str(home or f'/usr/local/cuda-{version}'))} TINYLLM_CUDA=1"
    lines.append(f"{variables} {install('--no-build-isolation')}")
    return "\n".join(lines)
