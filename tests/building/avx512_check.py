"""Run the CPU kernels of AVX-512 on a processor without it, beside PyTorch.

    python -m tests.building.avx512_check [--calls N] [--seed N]

The C++ extension is compiled with intrinsics that SIMDe emulates by AVX2 (avx512/emulated.h), and makes the random
calls of `tinyllm check`. SIMDe's headers are installed where they are missing and this process may do that. A processor
with AVX-512 has nothing to do here: everything else checks its kernels. No speed can be measured so.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

from tests.building.cpu_sanitize import run_isa
from tests.emulation.host_build import ROOT, build_library, has_header, install_packages

KERNELS = Path(__file__).parent / "avx512" / "isa_avx512.cpp"
HEADER, PACKAGE = "simde/x86/avx512.h", "libsimde-dev"


def build() -> Path:
    """Return the path of `tinyllm._C` with AVX-512 emulated.

    Raises:
        RuntimeError: SIMDe is missing and cannot be installed, or the extension does not compile.
    """
    import pybind11

    if not has_header(HEADER):
        install_packages(PACKAGE)
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-mavx2", "-mfma", "-mf16c", "-fno-math-errno", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
    flags += ["-D__builtin_cpu_supports(name)=1"]  # the processor is taken to have every instruction set
    flags += [f"-I{ROOT / 'csrc' / 'cpu'}", *(f"-isystem{path}" for path in includes)]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    sources = [KERNELS if source.name == KERNELS.name else source for source in sources]
    return build_library(
        "avx512_emulated", sources, [*ROOT.glob("csrc/**/*.h"), KERNELS.with_name("emulated.h")], flags
    )


def main() -> int:
    """Return the exit status."""
    summary = __doc__.split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m tests.building.avx512_check", description=summary)
    parser.add_argument("--calls", type=int, default=40, help="number of calls of each operator in each dtype")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call")
    options = parser.parse_args()
    from tinyllm.ops.backends import cpp

    usable = [] if cpp.library is None else cpp.library.usable_isas()
    if "avx512" in usable or "avx2" not in usable:
        has = "has AVX-512 itself" if "avx512" in usable else "has no AVX2 to emulate it with"
        print(f"AVX-512 is not emulated: the processor {has}")
        return 0
    start = time.perf_counter()
    try:
        library = build()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    passed = run_isa([sys.executable], library, "avx512", options, {})
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
