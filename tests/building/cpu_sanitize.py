"""Run the CPU kernels of every usable instruction set under the address and undefined-behaviour sanitizers.

    python -m tests.building.cpu_sanitize [--calls N] [--seed N]

The whole C++ extension is compiled again, including the torch side, because the division of work into blocks, threads
and scratch memory can go wrong too. Its operators then run the random calls of `tinyllm check`. Each tensor has an
allocation of its own that ends with its last element, leases of scratch memory are exact to the byte as well, and all
memory is initialised to NaN. Results are compared with those of PyTorch, so that uses of uninitialised memory show.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.emulation.host_build import ROOT, build_library, sanitizer_environment

LIMIT_S = 170  # for all calls of an instruction set; a process that hangs is killed
_CALL = "call: "
# The same on every processor. Those of the first block are held against Philox's known answers elsewhere.
_RANDOM_BITS = "04d55af7f7770d498e105ce5fc851bd1b49d4aaf5de2f3ca9bca97e979db1780"


def build() -> Path:
    """Return the path of a sanitized `tinyllm._C`."""
    import pybind11

    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    # The intrinsics of the compiler use uninitialised vectors on purpose.
    flags = ["-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-DTINYLLM_SANITIZED", *includes]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    return build_library("cpu_host", sources, ROOT.glob("csrc/**/*.h"), flags, sanitize=True)


def load(path: str) -> None:
    """Load a library as `tinyllm._C`, before tinyllm is imported."""
    import torch  # noqa: F401  # provides symbols that the library needs

    name = "tinyllm._C"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module


def random_bits() -> str:
    """Return a digest of the factors of dropout for some seeds, offsets and probabilities."""
    import torch

    bits = hashlib.sha256()
    for seed, offset in ((0, 0), (1, 2), (-1, -1), (2**62 + 12345, 2**40 + 1)):
        for p in (0.0, 0.1, 0.5, 1.0):
            factors = torch.ops.tinyllm.dropout_factors(torch.tensor([seed, offset]), 37, 192, p)
            bits.update(factors.numpy().tobytes())
    return bits.hexdigest()


def run_calls(library: str, isa: str, calls: int, seed: int) -> int:
    """Check every operator of a library, print each call before it is made, and return the exit status: 1 where a
    result is wrong, or where another instruction set serves than the one that is expected."""
    load(library)
    from tinyllm.check.worker import WrongResultError, check_operator
    from tinyllm.ops.backends import cpp
    from tinyllm.ops.dispatch import OPERATORS

    assert cpp.library is sys.modules["tinyllm._C"]
    if (chosen := cpp.library.cpu_isa()) != isa:
        print(f"{isa}: {chosen} is chosen instead")
        return 1
    if random_bits() != _RANDOM_BITS:
        print(f"{isa}: the random bits of dropout are wrong")
        return 1
    for operator in OPERATORS:
        start = time.perf_counter()
        try:
            done = check_operator(operator, "cpp", "cpu", calls, seed, lambda text: print(f"{_CALL}{text}", flush=True))
        except WrongResultError as error:
            print(f"{isa:<8}{operator:<22}{error}")
            return 1
        print(f"{isa:<8}{operator:<22}{done['calls']:>4} calls, {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def run_isa(
    python: Sequence[str | Path],
    library: Path,
    isa: str,
    options: argparse.Namespace,
    environment: Mapping[str, str],
) -> bool:
    """Check one instruction set in a process of its own, and return whether it passed.

    Args:
        python: the interpreter's command.
        library: what `load` loads.
        isa: the name of the instruction set, which TINYLLM_CPU_ISA is set to.
        options: `calls` and `seed`.
        environment: variables to set besides those of this process.
    """
    command = [*python, "-m", "tests.building.cpu_sanitize", "--library", library]
    command += ["--isa", isa, "--calls", str(options.calls), "--seed", str(options.seed)]
    # Several of these processes share the cores.
    variables = {**os.environ, "OMP_WAIT_POLICY": "passive", "TINYLLM_CPU_ISA": isa, **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = threading.Timer(LIMIT_S, process.kill)
    watch.start()
    last = "nothing"
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_CALL):
            last = line.removeprefix(_CALL).strip()
        else:
            print(line, end="", flush=True)
    watch.cancel()
    if process.wait() != 0:
        print(f"{isa}: ended with status {process.returncode} in the call {last}", flush=True)
    return process.returncode == 0


def main() -> int:
    """Return the exit status."""
    summary = __doc__.split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m tests.building.cpu_sanitize", description=summary)
    parser.add_argument("--calls", type=int, default=40, help="number of calls of each operator in each dtype")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--isa", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        return run_calls(options.library, options.isa, options.calls, options.seed)
    library = build()
    from tinyllm.ops.backends import cpp

    if cpp.library is None:
        print(cpp.why_not, file=sys.stderr)
        return 1
    environment = sanitizer_environment()
    # Bytes of 0xff are NaN in every dtype.
    environment["ASAN_OPTIONS"] += ":malloc_fill_byte=255:max_malloc_fill_size=1073741824"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(
            pool.map(
                lambda isa: run_isa([sys.executable], library, isa, options, environment), cpp.library.usable_isas()
            )
        )
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
