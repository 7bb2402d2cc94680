"""Builds csrc/cuda for the CPU, with emulated threads: a library of the same operators, for tests.

    python -m tests.emulation.build [--sanitize]

Prints the library's path. Files that have not changed are not compiled again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.emulation.host_build import ROOT, build_library

HERE = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"


def build(sanitize: bool = False) -> Path:
    """Build the library and return its path. Raises RuntimeError with the compiler's message if it does not compile."""
    sources = [*SOURCES.glob("**/*.cu"), *HERE.glob("*.cpp")]
    headers = [*ROOT.glob("csrc/*.h"), *SOURCES.glob("**/*.cuh"), *HERE.glob("*.h")]
    return build_library("cuda_host", sources, headers, [f"-I{HERE}", "-Wno-unknown-pragmas"], sanitize)


def main() -> int:
    """Build the library and print its path; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.build", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    try:
        print(build(parser.parse_args().sanitize))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
