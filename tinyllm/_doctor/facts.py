"""The facts that the checks look at, as far as it takes no torch to know them."""

from __future__ import annotations

import importlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

Level = Literal["wrong", "advice"]


class Finding(NamedTuple):
    """One thing that `diagnose` finds.

    Attributes:
        level: "wrong" is to be mended; "advice" may be meant to be so, or concerns only a program of the user's own.
        title: what there is.
        cost: what it costs.
        remedy: commands of a shell or lines of Python that mend it, one after the other.
    """

    level: Level
    title: str
    cost: str
    remedy: str


class Gpu(NamedTuple):
    """The NVIDIA GPUs of this machine, as the system knows them without torch.

    Attributes:
        present: whether there is a device that this process may open.
        driver: its version, such as "580.65.06", if it is known.
        major: the first number of the latest compute capability among them, if it is known.
    """

    present: bool
    driver: str | None = None
    major: int | None = None

    @property
    def release(self) -> int | None:
        """The driver's first number."""
        return None if self.driver is None else int(self.driver.split(".")[0])


class World(NamedTuple):
    root: Path  # of the file system
    package: Path  # tinyllm's
    gpu: Gpu | None
    torch: Any  # the module, or why it does not import


Check = Callable[[World], Iterator[Finding]]


def find_gpu(root: Path = Path("/")) -> Gpu | None:
    """Return what the system knows of NVIDIA GPUs, without torch; None where there is no driver of theirs.

    Args:
        root: of the file system.
    """
    version = root / "proc/driver/nvidia/version"
    text = version.read_text(encoding="utf-8", errors="replace") if version.is_file() else ""
    driver = re.search(r"\b\d{3,}(\.\d+)+\b", text)
    shown = re.findall(r"^\d{3,}(?:\.\d+)+$", output("nvidia-smi", "--query-gpu=driver_version", "--format=csv"), re.M)
    # In WSL the device is that of any vendor's GPU, and the library comes with NVIDIA's driver for Windows.
    wsl = (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists()
    present = bool(shown) or wsl or any(root.glob("dev/nvidia[0-9]*"))
    if not present and driver is None:
        return None
    majors = re.findall(r"^(\d+)\.\d$", output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv"), re.M)
    return Gpu(present, shown[0] if shown else driver and driver[0], max(map(int, majors), default=None))


def output(*command: str) -> str:
    """Return what a program prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def imported(name: str) -> Any:
    """Import a module. Return it, or the exception: a library that is broken may raise any."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return error


def crash(world: World) -> Exception | None:
    """Return the signal that loading the compiled kernels ends a process with, as an exception; None if none does."""
    if not any(world.package.glob("_C*.so")):
        return None
    command = [sys.executable, "-c", "import tinyllm.ops"]
    try:
        status = subprocess.run(command, capture_output=True, cwd=world.package.parent, timeout=120).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    if status >= 0:
        return None
    return OSError(f"loading the compiled kernels ends the process: {signal.strsignal(-status)}")


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """Return a version's numbers, up to the first part that is not one."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def least(name: str) -> str | None:
    """Return the least version of a package that tinyllm asks for, None where it asks for none."""
    return next((floor for other, floor, _ in requirements_of("tinyllm") if other == name), None)


def older(version: str | None, floor: str | None) -> bool:
    """Return whether a version is below another one."""
    return version is not None and floor is not None and _release(version) < _release(floor)


def requirements_of(name: str) -> Iterator[tuple[str, str | None, bool]]:
    """Yield a distribution's requirements: the name, the least version, and whether it is needed in any case."""
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # run from its sources
        return
    for need in needs:
        found = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?", need)
        if found:
            yield found[1], found[2], ";" not in need
