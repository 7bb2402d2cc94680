"""Compile every C++ and CUDA source against the headers of the oldest supported torch, of 2.11 and of the newest one:

    python -m tests.building.abi_check [--sources PATTERN]

The headers come from pip into build/torch-headers, once for each version; no torch is installed. They are those of the
wheel for macOS, the smallest: all platforms' wheels hold the same torch/headeronly, torch/csrc/stable and C shim, and
other headers of torch are left out, since the stable ABI promises nothing of them. The C++ standard and nvcc's options
are those that the version's own cpp_extension gives. Nothing is linked or run. Fails where a source does not compile,
where a built library needs a symbol of at:: or c10::, which no later torch promises to have, and where a private Python
name that tinyllm uses is not there. CUDA sources need nvcc on PATH.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "torch-headers"
VERSIONS = ("2.10.0", "2.11.0")
WORKERS = 2
STABLE = tuple(f"torch/include/torch/{name}/" for name in ("headeronly", "csrc/stable", "csrc/inductor/aoti_torch"))
CPP_EXTENSION = "torch/utils/cpp_extension.py"
# What tinyllm uses of torch's Python side that torch does not promise to keep: in which file, and how it stands there.
PRIVATE = {
    "torch/_C/__init__.pyi": ("def _are_functorch_transforms_active(", "def _is_tracing("),
    "torch/_C/_functorch.pyi": ("def is_legacy_batchedtensor(",),
    "torch/autograd/forward_ad.py": ("_current_level = ",),
    "torch/_dynamo/decorators.py": ("._dynamo_marked_constant = True",),
    "torch/optim/optimizer.py": ("@functools.wraps(func)", "self.__class__.step.hooked = True"),
}
# All versions of macOS up to this one.
WHEEL = ("--only-binary=:all:", "--platform=macosx_99_0_arm64", "--python-version=3.12", "--implementation=cp")


def pip(*arguments: str) -> str:
    """Return pip's output; raise RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    # Constraints are for installations, which this is not: one on torch would hide the newest.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"pip {arguments[0]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def headers(version: str) -> Path:
    """Return the folder of a torch version's headers, and some more of its files, downloaded at the first call."""
    folder = CACHE / version
    if all((folder / name).is_file() for name in PRIVATE):
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # of a time when less was wanted
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip("download", "--quiet", "--no-deps", *WHEEL, f"--dest={temporary}", f"torch=={version}")
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary, "unpacked")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [
                name for name in archive.namelist() if name.startswith(STABLE) or name in (CPP_EXTENSION, *PRIVATE)
            ]
            archive.extractall(unpacked, wanted)
        unpacked.rename(folder)  # whole, or not at all
    return folder


def newest() -> str:
    """Return the newest torch that there is, or, where pip cannot tell, the newest whose headers are here."""
    try:
        found = re.search(r"^torch \((.+)\)$", pip("index", "versions", *WHEEL, "torch"), re.MULTILINE)
        if found is None:
            raise RuntimeError("pip index: it names no version of torch")
        headers(found[1])
        return found[1]
    except RuntimeError as error:
        here = max((path.name for path in CACHE.glob("[0-9]*")), key=lambda name: [*map(int, name.split(".")[:3])])
        print(f"The newest torch cannot be had ({error}); torch {here} stands for it.")
        return here


def options(folder: Path) -> tuple[str, list[str]]:
    """Return the C++ standard and nvcc's options of a version's cpp_extension."""
    text = (folder / CPP_EXTENSION).read_text(encoding="utf-8")
    standard = re.search(r"common_cflags \+= \['(-std=c\+\+\d+)'", text)
    nvcc = re.search(r"^COMMON_NVCC_FLAGS = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    if standard is None or nvcc is None:
        raise RuntimeError(f"{folder.name}: {CPP_EXTENSION} gives its compilers' options in another way")
    return standard[1], ast.literal_eval(nvcc[1])


def complaint(source: Path, folder: Path) -> str | None:
    """Return the first error of a source against a version's headers, or None."""
    standard, for_nvcc = options(folder)
    common = [f"-I{folder / 'torch' / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    if source.suffix == ".cu":
        # PTX of one architecture, not optimized: the front ends of host and device and all templates, no more.
        command = ["nvcc", "--ptx", "-o", os.devnull, "-Xcicc=-O0", "-arch=sm_90a", "-std=c++17"]
        command += ["-DUSE_CUDA", "-DTINYLLM_SM90A"]
        command += [*common, *for_nvcc]
    else:
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        command = ["c++", "-fsyntax-only", "-Wall", "-fvisibility=hidden", standard, *includes, *common]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0:
        return None
    return next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip() or "it fails")


def missing(folder: Path) -> list[str]:
    """Return what tinyllm uses of a version's private Python names that is not there."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in PRIVATE}
    return [f"  {name}: no {text!r}" for name, found in PRIVATE.items() for text in found if text not in texts[name]]


def forbidden_symbols(library: Path) -> list[str]:
    """Return the symbols of at:: and c10:: that a library expects of the process."""
    done = subprocess.run(["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if re.search(r"\b(at|c10)::", line)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default="*", metavar="PATTERN", help="only files of these names (default: all)")
    pattern = parser.parse_args().sources
    start, failed = time.perf_counter(), False
    sources = [path for name in ("csrc/*.cpp", "csrc/cpu/*.cpp") for path in sorted(ROOT.glob(name))]
    if shutil.which("nvcc") is None:
        print("CUDA sources: not compiled, there is no nvcc on PATH")
    else:
        sources += sorted(ROOT.glob("csrc/cuda/**/*.cu"))
    sources = [path for path in sources if path.match(pattern)]
    for version in VERSIONS:
        headers(version)
    for version in dict.fromkeys((*VERSIONS, newest())):
        folder = headers(version)
        with ThreadPoolExecutor(WORKERS) as pool:
            found = list(pool.map(lambda source, folder=folder: complaint(source, folder), sources))
        wrong = [f"  {text}" for text in found if text is not None]
        failed |= bool(wrong)
        print(f"torch {version}: {len(sources) - len(wrong)} of {len(sources)} sources compile ({options(folder)[0]})")
        gone = missing(folder)
        failed |= bool(gone)
        print("\n".join(wrong + gone), end="\n" * bool(wrong + gone), flush=True)
    libraries = sorted((ROOT / "tinyllm").glob("_C*.so"))
    if not libraries:
        print("No library is built: whether it needs symbols of at:: or c10:: cannot be told")
        failed = True
    for library in libraries:
        symbols = forbidden_symbols(library)
        failed |= bool(symbols)
        print(f"{library.name}: {len(symbols)} undefined symbols of at:: and c10::", *symbols, sep="\n  ")
    print(f"{time.perf_counter() - start:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
