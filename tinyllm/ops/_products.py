"""Choice of the matmul on a CPU: our kernels, which fuse what surrounds it, or PyTorch's libraries.

The choice is a function of the instruction set, the processor's family, the dtype and the number of rows, read from a
table. It never comes from a clock inside a call: two runs of one program give the same bits, and tracing one changes
nothing for later calls.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tinyllm.ops._context import constant_for_compiler
from tinyllm.ops.backends import cpp

# Classes of products by the rows of the input: a token or few, a small batch, and all others.
_FEW, _SOME = 4, 32
CLASSES = ("few", "some", "many")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
WHO = ("cpp", "torch")

Choices = dict[str, dict[str, str]]  # dtype -> class -> who

# (instruction set, family as the extension names it) -> dtype -> who serves few, some and many rows. Dtypes and
# processors that are not here are served by our kernels. Where PyTorch is faster by less than a tenth they serve too,
# because a product in PyTorch leaves the bias, the activation and the residual to further passes over memory.
_TABLE: Mapping[tuple[str, str], Mapping[str, tuple[str, str, str]]] = {
    # AMD EPYC, Zen 4, 2 cores, torch 2.13, 2026-11-28: of 8 to 32 rows bfloat16 1.3 to 2.0 times as fast in oneDNN by
    # AVX512-BF16, float64 1.1 to 1.25 in MKL, float32 0.8 to 1.2; of more rows bfloat16 1.2 to 2.2.
    ("avx512", "amd-bf16"): {"float64": ("cpp", "torch", "cpp"), "bfloat16": ("cpp", "torch", "torch")},
    # Intel Xeon, Emerald Rapids without AMX, 2 cores, torch 2.13, 2026-11: float32 of 16 rows 1.17 to 1.23 times as
    # fast in MKL, of 256 rows 1.05 to 1.13; bfloat16 0.6 times, as its instruction has half of float32's rate there.
    ("avx512", "intel-bf16"): {"float32": ("cpp", "torch", "cpp")},
    # Not measured: by arithmetic, a tile instruction multiplies 16 times as many bfloat16 as our float32 kernels.
    ("avx512", "intel-amx"): {"float32": ("cpp", "torch", "cpp"), "bfloat16": ("cpp", "torch", "torch")},
    # Not measured: by arithmetic, oneDNN's BFMMLA multiplies eight times as many bfloat16 as our float32 kernels' FMLA.
    ("neon", "arm-bf16"): {"bfloat16": ("cpp", "torch", "torch")},
    # Not measured: Accelerate multiplies these on a matrix unit of its own, which has several times the rate of NEON.
    ("neon", "apple"): {"float32": ("cpp", "torch", "torch"), "float64": ("cpp", "torch", "torch")},
}

_training: Choices | None = None


def machine() -> str:
    """Return the name of this processor's row: its instruction set and family."""
    library = cpp.library
    return f"{library.cpu_isa()} {library.cpu_family()}" if library else "no kernels"


def tuned_file() -> Path:
    """Return where `tinyllm info --tune` writes, in the user's configuration folder."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tinyllm" / "products.json"


def table_choices(name: str) -> Choices:
    """Return the shipped table's choices for a machine as `machine` names it."""
    isa, _, family = name.partition(" ")
    row = _TABLE.get((isa, family), {})
    return {dtype: dict(zip(CLASSES, row.get(dtype, ("cpp",) * 3), strict=True)) for dtype in DTYPES}


@functools.cache
def _measured(path: Path, name: str) -> Choices | None:
    """Return the choices that were measured on this machine, if any were."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:  # there is none, or a home folder that is not this user's or none at all
        return None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; `tinyllm info --tune` writes it anew") from error
    choices = found.get(name, {}).get("choices") if isinstance(found, dict) else None
    return None if choices is None else _checked(choices, str(path))


def _measured_here() -> Choices | None:
    try:
        path = tuned_file()
    except RuntimeError:  # a user whom the system does not know, as in containers, has no home folder
        return None
    return _measured(path, machine())


def _checked(choices: Any, source: str) -> Choices:
    good = isinstance(choices, dict) and all(
        isinstance(choices.get(dtype), dict) and all(choices[dtype].get(rows) in WHO for rows in CLASSES)
        for dtype in DTYPES
    )
    if not good:
        raise ValueError(f"{source}: for each of {', '.join(DTYPES)} it must say cpp or torch for {', '.join(CLASSES)}")
    return {dtype: dict(choices[dtype]) for dtype in DTYPES}


_setting: str | None = None  # TINYLLM_LINEAR, which takes as long to look up as a small tensor to allocate


@constant_for_compiler
def setting() -> str:
    """Return what TINYLLM_LINEAR decides, as it was at the first call: auto, cpp or torch.

    Raises:
        ValueError: it is something else.
    """
    global _setting
    found = _setting
    if found is None:
        found = os.environ.get("TINYLLM_LINEAR", "auto")
        if found not in ("auto", *WHO):
            raise ValueError(f"TINYLLM_LINEAR is {found!r}; auto, cpp or torch is needed")
        _setting = found
    return found


def check_environment() -> None:
    """Raise ValueError where TINYLLM_LINEAR or TINYLLM_CPU_ISA asks for what is not there: now, and not in the middle
    of a command, or never because no call happens to look."""
    setting()
    try:
        machine()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def current() -> Choices:
    """Return the choices in force: TINYLLM_LINEAR's, a training's own, what was measured here, or the table's."""
    if setting() != "auto":
        return {dtype: dict.fromkeys(CLASSES, setting()) for dtype in DTYPES}
    if _training is not None:
        return _training
    return _measured_here() or table_choices(machine())


def source() -> str:
    """Return where the choices in force come from."""
    if setting() != "auto":
        return f"TINYLLM_LINEAR={setting()}"
    if _training is not None:
        return "the training"
    return (
        str(tuned_file())
        if _measured_here() is not None
        else "the table that is shipped; `tinyllm info --tune` measures this machine instead"
    )


def noted(before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a training notes of the choices, for `kept`: what it noted `before`, if that was on this machine."""
    if before is not None and before.get("machine") == machine():
        return dict(before)
    return {"machine": machine(), "choices": current()}


@contextmanager
def kept(note: Mapping[str, Any] | None) -> Iterator[None]:
    """Keep the choices that a training noted, so that it goes on bit for bit although the table has changed; those of
    another machine say nothing about this one."""
    global _training
    before, found = _training, None
    if note is not None and note.get("machine") == machine():
        found = _checked(note.get("choices"), "the products that the training noted")
    changes = found is not None and found != current()
    if changes:
        _training = found
        forget()
    try:
        yield
    finally:
        if changes:
            _training = before
            forget()


_decided: dict[tuple[torch.dtype, int], str | None] = {}


def forget() -> None:
    """Have the next calls look their choices up again, because what they follow from has changed."""
    global _decided
    _decided = {}  # another one: a call of another thread may be about to write to the old one
    _measured.cache_clear()
    if "torch._dynamo" in sys.modules:  # choices are constants of what is compiled
        torch._dynamo.reset()


def rows_class(rows: int) -> int:
    """Return the index in `CLASSES` of products of so many rows, which the compiler may know as a symbol only."""
    return 0 if rows <= _FEW else 1 if rows <= _SOME else 2


@constant_for_compiler
def by_torch(dtype: torch.dtype, rows: int) -> str | None:
    """Return why PyTorch multiplies products of a dtype and a class of `CLASSES`; None where our kernels do."""
    decided, key = _decided, (dtype, rows)
    if key not in decided:  # a small product takes no longer than what decides about it
        decided[key] = _why_torch(dtype, rows)
    return decided[key]


def _why_torch(dtype: torch.dtype, rows: int) -> str | None:
    row = current().get(str(dtype).removeprefix("torch."))
    if row is None or row[CLASSES[rows]] == "cpp":
        return None
    return f"PyTorch's product is faster for {CLASSES[rows]} rows of this dtype on this processor ({machine()})"


# Where a product is small, what surrounds it decides, on any processor: an operator that stands for many calls serves
# whatever the table says, and a module's own forward in PyTorch costs less Python than an operator of ours.
_MANY_CALLS = 4_000_000
_ONE_CALL = 1_000_000


def saved_calls_outweigh(multiplications: int) -> bool:
    """Return whether one operator in place of many calls is faster, whoever multiplies faster."""
    return multiplications <= _MANY_CALLS


def worth_a_call(multiplications: int) -> bool:
    """Return whether a product is large enough for the gain to exceed the Python of an operator of ours."""
    return multiplications >= _ONE_CALL


# ---- Measuring, where somebody asks for it

_SIZES = {
    "few": ((1, 768, 768), (1, 1024, 4096), (4, 768, 3072)),
    "some": ((8, 768, 3072), (16, 512, 512), (32, 768, 768)),
    "many": ((64, 128, 512), (256, 512, 512), (256, 768, 3072)),
}
# PyTorch must be this much faster: less than that is gained back by what our kernels fuse.
_MARGIN = 1.1


def ratio(dtype: torch.dtype, sizes: tuple[int, int, int], seconds: float = 0.15) -> float:
    """Return the time of our kernel over PyTorch's for (rows, in_features, out_features): the best of calls in turns,
    which other programs disturb least."""
    rows, in_features, out_features = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, in_features, generator=generator).to(dtype)
    weight = torch.rand(out_features, in_features, generator=generator).to(dtype)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[1]) < 5:
            for mine, call in zip(
                times,
                (
                    lambda: torch.ops.tinyllm.linear_fwd(x, weight, None, None, "none", False),
                    lambda: F.linear(x, weight),
                ),
                strict=True,
            ):
                start = time.perf_counter()
                call()
                mine.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


def tune() -> dict[str, Any]:
    """Measure this machine for some seconds, and write its choices to `tuned_file`; return what was written of it.

    Raises:
        RuntimeError: there are no compiled kernels to compare with.
        OSError: the file cannot be written.
    """
    if not cpp.loaded:
        raise RuntimeError(f"there are no compiled kernels to compare PyTorch with: {cpp.why_not}")
    found: dict[str, dict[str, float]] = {}
    for dtype, name in zip(_DTYPES, DTYPES, strict=True):
        found[name] = {
            rows: round(statistics.median(ratio(dtype, sizes) for sizes in _SIZES[rows]), 2) for rows in CLASSES
        }
    choices = {
        name: {rows: "torch" if value > _MARGIN else "cpp" for rows, value in row.items()}
        for name, row in found.items()
    }
    written = {
        "choices": choices,
        "torch_is_faster_by": found,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    path = tuned_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    others: Any = {}
    with suppress(FileNotFoundError, ValueError):  # there is none, or nothing that could be used
        others = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(others, dict):
        others = {}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**others, machine(): written}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    forget()
    return written
