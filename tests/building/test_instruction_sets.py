"""Tests of each instruction set's vectors and micro-kernel, without torch. Those of aarch64 are cross compiled, and run
in qemu's user mode on the oldest of its processors."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.building.aarch64_check import COMPILER, EMULATOR, missing_tools
from tests.emulation.host_build import ROOT
from tinyllm.ops.backends import cpp

# Instruction set -> the compiler's options for it, as in the #pragma of csrc/cpu/isa_<name>.cpp.
OPTIONS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "neon": [],
    "scalar": [],
}
NATIVE = os.environ.get("CXX", "c++")


def compiler_and_runner(isa: str) -> tuple[str, list[str]]:
    """Return the compiler for an instruction set and what its programs are run with; skip where one is missing."""
    if isa in (cpp.library.usable_isas() if cpp.library else ()):
        if shutil.which(NATIVE) is None:
            pytest.skip(f"there is no {NATIVE}")
        return NATIVE, []
    if isa != "neon":
        pytest.skip(f"this processor, or this build, does not run {isa}")
    if missing := missing_tools():
        pytest.skip(f"there is no {' and no '.join(missing)}")
    return COMPILER, [EMULATOR, "-cpu", "cortex-a53"]


def compiled(compiler: str, isa: str, source: Path, made: Path, *flags: str) -> Path:
    macros = [f"-DTINYLLM_ISA={isa}", f"-DTINYLLM_{isa.upper()}"]
    # The intrinsics of the compiler use uninitialised vectors on purpose.
    common = ["-std=c++17", "-fno-math-errno", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized", f"-I{ROOT}"]
    done = subprocess.run(
        [compiler, *common, *macros, *OPTIONS[isa], *flags, source, "-o", made], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("isa", OPTIONS)
def test_vectors_compute_what_plain_code_does(isa, tmp_path):
    compiler, runner = compiler_and_runner(isa)
    source = Path(__file__).with_name("vectors.cpp")
    static = ["-static"] if runner else []
    program = compiled(compiler, isa, source, tmp_path / "vectors", "-O2", *static)
    done = subprocess.run([*runner, program], capture_output=True, text=True)
    # The digest of the random words is one for all instruction sets.
    assert (done.stdout, done.stderr, done.returncode) == ("random 27f756dfb732be4e\nok\n", "", 0)


@pytest.mark.parametrize("dtype", ["float", "double"])
def test_the_tile_of_neon_stays_in_registers(dtype, tmp_path):
    compiler, _ = compiler_and_runner("neon")
    source = tmp_path / "tile.cpp"
    source.write_text(
        "#include <arm_neon.h>\n"
        '#include "csrc/cpu/gemm.h"\n'
        f"template void tinyllm::neon::micro_kernel<{dtype}, tinyllm::neon::kMR, tinyllm::neon::kNV>(int64_t, const "
        f"{dtype}*, int64_t, int64_t, const {dtype}*, int64_t, {dtype}*, int64_t, "
        f"const tinyllm::neon::TileEnd<{dtype}>&);\n"
    )
    assembly = compiled(compiler, "neon", source, tmp_path / "tile.s", "-O3", "-S").read_text()
    # Stretches without a label inside, from a label to the branch back to it.
    loops = re.findall(r"^(\.\w+):\n((?:\t.*\n)*?)\tb\S+\t\1$", assembly, re.MULTILINE)
    loops = [body for _, body in loops if body.count("\tfmla\t") > 1]
    assert loops
    for body in loops:
        assert (body.count("\tfmla\t"), "[sp" in body) == (20, False), body
