"""Checks of the compiled kernels for CPUs, and of what they run on."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import tinyllm
from tinyllm._doctor.commands import install, sudo
from tinyllm._doctor.facts import Check, Finding, World, least, older, version_of
from tinyllm._doctor.general import hidden_package
from tinyllm._internal.allocator import allocator_state
from tinyllm._internal.cpus import cpu_quota, usable_cpus

_COMPILERS = {  # package managers, and how each installs a C++ compiler
    "apt-get": "apt-get update && {sudo}apt-get install -y g++",
    "dnf": "dnf install -y gcc-c++",
    "zypper": "zypper install -y gcc-c++",
    "pacman": "pacman -S --noconfirm gcc",
}
_ALL_ON_PYTORCH = "Everything on the CPU runs on plain PyTorch, more slowly and with more memory."
# What the code knows as an operator of Triton's alone; csrc/schemas.h has all others.
WITHOUT_CPP = ("quantized_embedding",)


def check_kernels(world: World) -> Iterator[Finding]:
    from tinyllm.ops.backends import cpp

    if cpp.why_not is None or hidden_package(world) is not None or older(version_of("torch"), least("torch")):
        return  # or it is said already
    rebuild = f"TINYLLM_EXT=1 {install()}"
    if cpp.deliberately_absent():
        yield Finding("advice", "The compiled kernels were left out: TINYLLM_EXT=0.", _ALL_ON_PYTORCH, rebuild)
        return
    title = cpp.why_not
    others = [path.name for path in world.package.glob("_C.*.*") if path.name[2:] not in EXTENSION_SUFFIXES]
    if cpp.build_record()["extension"] == "built" and others:
        title = f"the C++ extension is for another Python: {', '.join(others)}; this one loads *{EXTENSION_SUFFIXES[0]}"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if "there is no C++ compiler" in title and shutil.which(compiler) is None:
        how = next((how for manager, how in _COMPILERS.items() if shutil.which(manager)), None)
        first = "conda install -y -c conda-forge cxx-compiler" if how is None else sudo() + how.format(sudo=sudo())
        if sys.platform == "darwin":
            first = "xcode-select --install"
        rebuild = f"{first}\n{rebuild}"
    yield Finding("wrong", f"{title[0].upper()}{title[1:]}.", _ALL_ON_PYTORCH, rebuild)


def check_build(world: World) -> Iterator[Finding]:
    from tinyllm.ops import dispatch
    from tinyllm.ops.backends import cpp

    installed = version_of("tinyllm")
    missing = [name for name in dispatch.raw_operators if name not in WITHOUT_CPP and not cpp.has(name)]
    library_file = getattr(cpp.library, "__file__", None)
    if library_file is not None and Path(library_file).resolve().parent != world.package.resolve():
        title = f"The compiled kernels are those of another installation, {library_file}."
        leave = "unset PYTHONPATH" if os.environ.get("PYTHONPATH") else install()
        yield Finding("wrong", title, "They may be another version's than the code.", leave)
        return
    code = getattr(tinyllm, "__version__", None)  # of a folder that is taken for the package there is none
    if hidden_package(world) is None and None not in (installed, code) and installed != code:
        title = f"The code is tinyllm {code}, and was installed as {installed}."
        yield Finding("wrong", title, "Its libraries and dependencies are another version's.", install())
    elif cpp.loaded and missing:
        title = f"The C++ extension is of another version than the code: it has no {', '.join(missing)}."
        yield Finding("wrong", title, "Calls of these operators fail.", install())
    root = world.package.parent
    built = [("_C", "cpp", "h")] + [("_C_cuda", "cu", "cuh")] * (cpp.build_record().get("cuda") == "built")
    for stem, *endings in built:
        library = next(filter(Path.is_file, (world.package / f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES)), None)
        sources = [path for ending in endings for path in root.glob(f"csrc/**/*.{ending}")]
        newer = [path for path in sources if library and path.stat().st_mtime > library.stat().st_mtime]
        if newer:
            newest = max(newer, key=lambda path: path.stat().st_mtime).relative_to(root)
            title = f"tinyllm/{stem} is older than its sources: {newest} has changed since."
            command = f"cd {shlex.quote(str(root))} && {shlex.quote(sys.executable)} setup.py -q build_ext --inplace"
            yield Finding("wrong", title, "What runs is not what the sources say.", command)


def check_processor(world: World) -> Iterator[Finding]:
    from tinyllm.ops import _products
    from tinyllm.ops.backends import cpp

    for variable, look in (("TINYLLM_LINEAR", _products.setting), ("TINYLLM_CPU_ISA", _products.machine)):
        try:
            look()
        except (RuntimeError, ValueError) as error:
            yield Finding("wrong", f"{error}.", "Every call that looks at it fails.", f"unset {variable}")
            return
    try:
        _products.current()
    except ValueError as error:
        yield Finding("wrong", f"{error}.", "Every matrix product fails.", "tinyllm info --tune")
    if (setting := _products.setting()) != "auto":
        cost = f"{'Our kernels multiply' if setting == 'cpp' else 'PyTorch multiplies'} all matrices, faster or not."
        yield Finding("advice", f"TINYLLM_LINEAR={setting} is set.", cost, "unset TINYLLM_LINEAR")
    library = cpp.library
    if library is None:
        return
    best, chosen = library.usable_isas()[0], library.cpu_isa()
    if chosen != best:
        title = f"TINYLLM_CPU_ISA={chosen} is set; this processor runs {best}."
        yield Finding("advice", title, "The kernels leave a part of the processor unused.", "unset TINYLLM_CPU_ISA")
    family = library.cpu_family()
    if "-" not in family and family != "apple" and not world.torch.cuda.is_available():
        yield Finding(
            "advice",
            "This processor has no instructions for bfloat16 (AVX512-BF16, AMX, or aarch64's bf16).",
            "Arithmetic in bfloat16 is no faster than in float32, and PyTorch's may be much slower. Weights that are "
            "stored in bfloat16 for generation are not concerned.",
            "tinyllm train --precision 32-true  # the default; in Python: model.float()",
        )


def check_threads(world: World) -> Iterator[Finding]:
    threads, cpus = world.torch.get_num_threads(), usable_cpus()
    variables = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    values = ", ".join(f"{name}={os.environ[name]}" for name in variables)
    if threads > cpus:
        quota = "" if (found := cpu_quota(world.root)) is None else f" (the quota of its cgroups is {found:g})"
        by = f", by {values}" if values else ""
        title = f"torch uses {threads} threads{by}; this process may use {cpus} CPU{'s' * (cpus > 1)}{quota}."
        cost = "Threads wait for one another's CPU, and every operator for the last of them."
        shell = f"export {' '.join(f'{name}={cpus}' for name in variables or ['OMP_NUM_THREADS'])}"
        if variables:
            yield Finding("wrong", title, cost, shell)
        else:
            python = f"torch.set_num_threads({cpus})  # in Python, when the program starts; or in the shell before it:"
            cost += " The command tinyllm takes as many as there are CPUs."
            yield Finding("advice", title, cost, f"{python}\n{shell}")
    elif variables and cpus > 1 and (threads == 1 or threads * 2 < cpus):
        title = f"torch uses {threads} of {cpus} CPUs, by {values}."
        yield Finding("advice", title, "The kernels leave the other CPUs idle.", f"unset {' '.join(variables)}")


def check_allocator(world: World) -> Iterator[Finding]:
    if (state := allocator_state()).startswith("glibc's defaults"):
        yield Finding(
            "advice",
            f"The allocator has {state}.",
            "In a program of your own, glibc gives the memory of large tensors back at once, and takes it anew, "
            "page by page, for the next ones. The command tinyllm sees to it itself.",
            "tinyllm.tune_allocator()  # in Python, when the program starts; or in the shell before it:\n"
            "export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647",
        )


CHECKS: dict[str, Check] = {
    "the compiled kernels": check_kernels,
    "their age": check_build,
    "the processor": check_processor,
    "threads": check_threads,
    "the allocator": check_allocator,
}
