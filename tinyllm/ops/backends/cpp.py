"""The compiled libraries: `_C`, the C++ kernels for CPUs, and `_C_cuda`, which has those of `cuda`. They are loaded
once; where that fails, the reason is kept."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _C, which finds libtorch's symbols in the process and needs no rpath of its own

from tinyllm._internal.installation import reinstall

_PACKAGE = Path(__file__).parents[2]  # where setup.py puts the libraries


def build_record() -> dict[str, str]:
    """Return what the installation wrote about its build: `extension` (built|skipped), `reason`, `compiler`, `torch`,
    and `cuda` (built|skipped), `cuda_reason`, `nvcc`, `cuda_arch_list`."""
    path = _PACKAGE / "_build.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        never = "tinyllm is imported from a source tree that was never installed"
        return {"extension": "skipped", "reason": never, "cuda": "skipped", "cuda_reason": never}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        library = importlib.import_module("tinyllm._C")
    except ImportError as error:
        record = build_record()
        if record["extension"] == "skipped":
            return None, f"the C++ extension was not built: {record['reason']}"
        return None, f"the C++ extension does not load: {error}"
    return library, None


def _load_cuda() -> str | None:
    """Return why the CUDA library is not there. It has no Python module: it gives operators that _C declares their
    kernels."""
    if why_not is not None:
        return why_not
    record = build_record()
    # Not by the file alone: one of an earlier build may still lie in a source tree.
    if record.get("cuda") != "built":
        return f"the CUDA library was not built: {record.get('cuda_reason', 'tinyllm was installed before it had one')}"
    if torch.version.cuda is None:
        return "the CUDA library does not load: this build of torch has no CUDA"
    path = cuda_path()
    if path is None:
        return f"the CUDA library does not load: there is no _C_cuda{EXTENSION_SUFFIXES[0]} in {_PACKAGE}"
    failure = load_operators(path)
    return failure and f"the CUDA library does not load: {failure}"


def cuda_path() -> Path | None:
    """Return the CUDA library's file, or None where there is none."""
    return next(filter(Path.is_file, (_PACKAGE / f"_C_cuda{suffix}" for suffix in EXTENSION_SUFFIXES)), None)


def load_operators(path: str | Path) -> str | None:
    """Load a library that registers operators. Return what is wrong with it, or None."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error.__cause__ or error)  # the cause is the loader's own message
    return None


def _scalar() -> bool:
    """Return whether the processor runs only the scalar kernels."""
    try:
        return library is not None and library.cpu_isa() == "scalar"
    except RuntimeError:  # TINYLLM_CPU_ISA names none; the kernels say so when they are called
        return False


library, why_not = _load()
loaded = library is not None
cuda_why_not = _load_cuda()
_only_scalar = _scalar()
_warned = False


def unavailable(device_type: str, forced: bool, here: bool) -> str | None:
    """Return why the C++ kernels serve no tensors of a device type; see `Backend`."""
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type} ones"
    if here and why_not is not None:
        return why_not
    if here and _only_scalar and not forced:
        return "there are only the scalar kernels for this processor; PyTorch is faster"
    return None


def provide(raw: Sequence[str], source: str) -> str | None:
    """Return None: a build has all C++ kernels, or none."""
    return None


def has(name: str) -> bool:
    """Return whether there is a kernel for a raw operator."""
    return loaded and hasattr(torch.ops.tinyllm, name)


def operators() -> Any:
    """Return the namespace of the raw operators."""
    return torch.ops.tinyllm


def deliberately_absent() -> bool:
    """Return whether the installation was asked to leave the compiled kernels out (TINYLLM_EXT=0)."""
    return build_record().get("reason") == "TINYLLM_EXT=0"


def repair() -> str | None:
    """Return the command that installs the missing compiled kernels, or None where nothing is amiss."""
    if why_not is None or deliberately_absent():
        return None
    return reinstall()


def warn_if_absent() -> None:
    """Warn once in a process that compiled kernels are missing though nobody left them out."""
    global _warned
    if why_not is None or _warned:
        return
    _warned = True
    command = repair()
    if command is not None:
        text = f"tinyllm runs on plain PyTorch, without its compiled kernels: {why_not}. To install them: {command}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
