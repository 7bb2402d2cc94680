"""Builds csrc/cuda for the CPU, with emulated threads: a library of the same operators, for tests.

    python -m tests.cuda_host.build [--sanitize]

Prints the library's path. Files that have not changed are not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
# -O1: half of -O2's time to compile, and the emulation's own cost is what counts.
_FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def build(sanitize: bool = False) -> Path:
    """The library's path; RuntimeError with the compiler's words where it does not compile."""
    import torch
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    flags = [*_FLAGS, *(_SANITIZERS if sanitize else [])]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE}"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    folder = ROOT / "build" / ("cuda_host_sanitized" if sanitize else "cuda_host")
    folder.mkdir(parents=True, exist_ok=True)
    headers = sorted([*ROOT.glob("csrc/*.h"), *SOURCES.glob("**/*.cuh"), *HERE.glob("*.h")])
    common = hashlib.sha256(f"{compiler} {flags} {torch.__version__}".encode())
    for header in headers:
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

    sources = sorted([*SOURCES.glob("**/*.cu"), *HERE.glob("*.cpp")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "libtinyllm_host.so"
    if not library.exists() or any(made.stat().st_mtime >= library.stat().st_mtime for made in objects):
        beside = library.with_suffix(f".{os.getpid()}")
        paths = [f"-L{path}" for path in cpp_extension.library_paths()]
        _run(compiler, *flags, "-shared", *objects, *paths, "-ltorch_cpu", "-o", beside)
        beside.rename(library)
    return library


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host.build", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    try:
        print(build(parser.parse_args().sanitize))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
