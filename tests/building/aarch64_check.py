"""Run the CPU kernels of aarch64 on this machine: cross compiled, in qemu's user mode, beside PyTorch's own wheel.

    python -m tests.building.aarch64_check [--calls N] [--seed N]

The C++ extension is compiled by Debian's cross compiler with setup.py's options. In a Python for aarch64 it then makes
the random calls of `tinyllm check`, compared with the PyTorch of that processor, with the instruction set that it
chooses by itself. Python comes from Debian's packages and PyTorch from pip, once, into build/aarch64. The cross
compiler and qemu are installed where they are missing and this process may do that. No speed can be measured so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.building.cpu_sanitize import run_isa
from tests.emulation.host_build import ROOT, build_library, install_packages

FOLDER = ROOT / "build" / "aarch64"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TOOLS = ("g++-aarch64-linux-gnu", "qemu-user", "debian-archive-keyring")  # Debian's and Ubuntu's packages
CPU = "neoverse-n1"  # without SVE; PyTorch's wheel does not start on the older ones
VERSION = "3.11"
# Debian 12. Its libc and libstdc++ are not among the packages: the cross compiler's serve, which may be newer.
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEBIAN = f"deb [arch=arm64 signed-by={KEYS}] http://deb.debian.org/debian bookworm main\n"
PACKAGES = [f"python{VERSION}-minimal", *(f"libpython{VERSION}-{part}" for part in ("minimal", "stdlib", "dev"))]
PACKAGES += ["libexpat1", "zlib1g", "libffi8", "libbz2-1.0", "liblzma5", "libssl3"]
CROSS_ROOT = Path("/usr/aarch64-linux-gnu")
# The oldest supported torch, whose wheel has no CUDA. All that is needed is listed, because pip would choose what it
# requires on this machine's processor.
WHEELS = ["torch==2.10.0", "numpy", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy"]
WHEELS += ["typing-extensions"]
PLATFORMS = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (28, 27, 17)]


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> str:
    """Return the output of a command that runs in a folder, with some variables set.

    Raises:
        RuntimeError: with what it says, where it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def missing_tools() -> list[str]:
    """Return which of the cross compiler and qemu are not on PATH."""
    return [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


def install_tools() -> None:
    """Install the cross compiler, qemu and the keys of Debian's packages where they are missing.

    Raises:
        RuntimeError: they cannot be installed.
    """
    missing = missing_tools() + ([] if KEYS.exists() else [str(KEYS)])
    if not missing:
        return
    try:
        install_packages(*TOOLS)
    except RuntimeError as error:
        raise RuntimeError(f"there is no {' and no '.join(missing)}; {error}") from None


def install_python() -> Path:
    """Return a folder with Python for aarch64 in usr/, and torch and its requirements in site/, filled once."""
    made = FOLDER / "root"
    if made.exists():
        return made
    print("downloading Python and PyTorch for aarch64", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    beside, apt = FOLDER / "unfinished", FOLDER / "apt"
    for folder in (beside, apt / "lists" / "partial", apt / "archives" / "partial"):
        folder.mkdir(parents=True)
    (apt / "sources.list").write_text(DEBIAN)
    (apt / "status").touch()
    options = ["APT::Architecture=arm64", "APT::Architectures=arm64", f"Dir::Etc::sourcelist={apt / 'sources.list'}"]
    options += ["Dir::Etc::sourceparts=/dev/null", f"Dir::State={apt}", f"Dir::State::status={apt / 'status'}"]
    options += [f"Dir::Cache={apt}", "APT::Sandbox::User="]
    command = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    run(*command, "update")
    run(*command, "download", *PACKAGES, folder=apt / "archives")
    for package in (apt / "archives").glob("*.deb"):
        run("dpkg-deb", "-x", package, beside)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", *PLATFORMS, f"--python-version={VERSION}", "--implementation=cp"]
    # Constraints are for this machine's torch.
    run(*pip, f"--target={beside / 'site'}", *WHEELS, PIP_CONSTRAINT=os.devnull)
    shutil.rmtree(apt)
    return beside.rename(made)


def build(root: Path) -> Path:
    """Return the path of `tinyllm._C`, cross compiled with the options of setup.py."""
    import pybind11

    # /usr/include for the other processor's pyconfig.h, which Python's own includes by its path below it.
    includes = [pybind11.get_include(), root / "usr/include" / f"python{VERSION}", root / "usr/include"]
    flags = ["-O3", "-g0", "-fno-math-errno", "-Wno-maybe-uninitialized", *(f"-isystem{path}" for path in includes)]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    libraries = [root / "site" / "torch" / "lib"]
    return build_library(
        "aarch64_library", sources, ROOT.glob("csrc/**/*.h"), flags, compiler=COMPILER, libraries=libraries
    )


def main() -> int:
    """Return the exit status."""
    summary = __doc__.split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m tests.building.aarch64_check", description=summary)
    parser.add_argument("--calls", type=int, default=6, help="number of calls of each operator in each dtype")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        install_tools()
        root = install_python()
        library = build(root)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    python = [EMULATOR, "-cpu", CPU, "-L", CROSS_ROOT, root / "usr/bin" / f"python{VERSION}"]
    libraries = root / "usr" / "lib" / "aarch64-linux-gnu"
    environment = {
        "PYTHONPATH": f"{root / 'site'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "QEMU_SET_ENV": f"LD_LIBRARY_PATH={libraries}:{root / 'lib' / 'aarch64-linux-gnu'}",
        "OMP_NUM_THREADS": "2",  # so that work is divided
        "TINYLLM_CPU_ISA": "",  # NEON must be chosen without it
    }
    passed = run_isa(python, library, "neon", options, environment)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
