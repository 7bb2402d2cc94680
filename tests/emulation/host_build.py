"""Compilation of csrc for tests on a processor, with or without the sanitizers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def build_library(
    name: str,
    sources: Iterable[Path],
    headers: Iterable[Path],
    flags: Sequence[str],
    sanitize: bool = False,
    compiler: str | None = None,
    libraries: Sequence[str | Path] | None = None,
) -> Path:
    """Compile C++ against torch's stable ABI into one library below build/, each file only if it has changed.

    Args:
        name: of the folder below build/ and of the library.
        headers: files that, when they change, make all of `sources` be compiled again.
        flags: for the compiler, besides those that all such libraries need.
        sanitize: with the address and undefined-behaviour sanitizers.
        compiler: the one of this machine's processor by default.
        libraries: folders of torch's libraries, by default those of the installed torch.

    Returns:
        The library's path.

    Raises:
        RuntimeError: with the compiler's words, where it does not compile.
    """
    import torch
    from torch.utils import cpp_extension

    compiler = compiler or os.environ.get("CXX", "c++")
    # -O1: half of -O2's time to compile.
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", *flags]
    flags += _SANITIZERS if sanitize else []
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    folder = ROOT / "build" / (f"{name}_sanitized" if sanitize else name)
    folder.mkdir(parents=True, exist_ok=True)
    common = hashlib.sha256(f"{compiler} {flags} {torch.__version__}".encode())
    for header in sorted(headers):
        common.update(header.read_bytes())

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        made = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not made.exists():
            for old in folder.glob(f"{source.stem}-*.o"):
                if len(old.stem) == len(made.stem):
                    old.unlink(missing_ok=True)
            beside = made.with_suffix(f".{os.getpid()}")
            _run(compiler, *flags, "-x", "c++", "-c", source, "-o", beside)
            beside.rename(made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(sources, key=lambda source: -source.stat().st_size)))
    library = folder / f"lib{name}.so"
    if not library.exists() or any(made.stat().st_mtime >= library.stat().st_mtime for made in objects):
        beside = library.with_suffix(f".{os.getpid()}")
        paths = [f"-L{path}" for path in libraries or cpp_extension.library_paths()]
        # What torch's libraries need of others is there when they are loaded.
        _run(compiler, *flags, "-shared", *objects, *paths, "-ltorch_cpu", "-Wl,--allow-shlib-undefined", "-o", beside)
        beside.rename(library)
    return library


def install_packages(*names: str) -> None:
    """Install packages of Debian or Ubuntu.

    Raises:
        RuntimeError: this process may not, or there is no apt-get.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"as root: apt-get install {' '.join(names)}")
    print(f"installing {', '.join(names)}", flush=True)
    _run("apt-get", "update", "-qq")
    _run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-yqq", "--no-install-recommends", *names)


def has_header(name: str) -> bool:
    """Return whether the compiler finds a header of C++."""
    command = [os.environ.get("CXX", "c++"), "-x", "c++", "-E", "-include", name, os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def sanitizer_environment() -> dict[str, str]:
    """Return the environment variables with which a Python process loads a sanitized library.

    Python itself is not built with the sanitizers, so their libraries are preloaded, and its own leaks are ignored.
    """
    compiler = os.environ.get("CXX", "c++")
    libraries = [_run(compiler, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout
