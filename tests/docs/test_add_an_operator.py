"""The steps of docs/add-an-operator.md, done to a copy of the sources as the page has them, give an operator.

To build all kernels anew would take minutes. The new one is compiled into a library of its own, for this processor's
best instruction set, against the copy's own headers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.emulation.host_build import build_library
from tests.helpers.needs import needs_extension
from tests.helpers.runs import ROOT, environment
from tinyllm.ops.backends import cpp

PAGE = (ROOT / "docs" / "add-an-operator.md").read_text(encoding="utf-8")
STEPS = dict(enumerate(re.split(r"^\d+\. ", PAGE, flags=re.MULTILINE)))  # 0: what comes before the first

# What takes the place of an instruction set's table of all kernels. The fragment declares what schemas.h does.
TABLE = """
const Kernels& kernels() {{
  static const Kernels table = [] {{
    using namespace TINYLLM_ISA;
    Kernels only{{}};
    only.scale_add = TINYLLM_ALL_DTYPES(scale_add);
    return only;
  }}();
  return table;
}}
STABLE_TORCH_LIBRARY_FRAGMENT(tinyllm, m) {{ {schema} }}
"""


def blocks(step: int) -> list[str]:
    """Return the step's blocks of code."""
    found = re.findall(r"^   +```\w+\n(.*?)^   +```", STEPS[step], re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def words(step: int) -> list[str]:
    """Return the code in the step's sentences."""
    return re.findall(r"`([^`]+)`", re.sub(r"(?ms)^ *```.*?^ *```", "", STEPS[step]))


def insert(path: Path, before: str, code: str) -> None:
    """Insert code in front of the last occurrence of `before`."""
    head, found, tail = path.read_text(encoding="utf-8").rpartition(before)
    assert found, f"{path} has no {before!r}"
    path.write_text(head + code + found + tail, encoding="utf-8")


def follow(folder: Path) -> None:
    """Do what the steps up to the ninth say, to the sources in a folder."""
    cpu, ops = folder / "csrc" / "cpu", folder / "tinyllm" / "ops"
    insert(folder / "csrc" / "schemas.h", "}\n\n}  // namespace", words(1)[-1] + "\n")
    insert(cpu / "kernel_args.h", "}  // namespace", words(2)[-1] + "\n")
    (cpu / "scale_add_kernel.h").write_text(blocks(3)[0], encoding="utf-8")
    include, member, entry = words(4)[-3:]
    insert(cpu / "dispatch.h", "};\n\n// The table in use", member + "\n")
    insert(cpu / "isa_table.h", '#include "', include + "\n")
    insert(cpu / "isa_table.h", "  };\n}", entry + "\n")
    (cpu / "scale_add.cpp").write_text(blocks(5)[0], encoding="utf-8")

    reference = folder / "tinyllm" / "reference"
    head, body = words(6)[1:3]
    insert(reference / "functional.py", "\n\ndef transformer(", f"\n\n{head}\n    {body}\n")
    insert(reference / "__init__.py", "    transformer,\n", "    scale_add,\n")
    insert(reference / "__init__.py", '    "transformer",\n', '    "scale_add",\n')
    (ops / "scale_add.py").write_text(blocks(7)[0], encoding="utf-8")
    insert(ops / "__init__.py", "from tinyllm.ops.transformer import", "from tinyllm.ops.scale_add import scale_add\n")
    insert(ops / "__init__.py", '    "scaled_dot_product_attention",\n', '    "scale_add",\n')

    tests = folder / "tests" / "ops"
    (tests / "test_scale_add.py").write_text(blocks(8)[0], encoding="utf-8")
    case, call, checked = blocks(9)
    # The formatter makes a tuple of the case.
    insert(tests / "test_transforms.py", "]\n\nFunction = ", case.strip().removeprefix("(").removesuffix(",)") + ",\n")
    insert(tests / "test_dispatch.py", "    }\n    with FakeTensorMode()", call)
    function, entry = checked.rsplit("\n\n", 1)
    insert(folder / "tinyllm" / "check" / "cases.py", "CASES: dict", function + "\n\n")
    insert(folder / "tinyllm" / "check" / "cases.py", "}\n", entry)


@needs_extension
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_the_steps_give_an_operator(tmp_path: Path) -> None:
    for name in ("csrc", "kernels", "tests", "tinyllm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tinyllm" / "kernels").symlink_to(tmp_path / "kernels")
    follow(tmp_path)
    cpu = tmp_path / "csrc" / "cpu"
    source = (cpu / f"isa_{cpp.library.usable_isas()[0]}.cpp").read_text(encoding="utf-8")
    only, found = re.subn(r"const Kernels \w+ = .*", TABLE.format(schema=words(1)[-1]), source)
    assert found == 1
    (cpu / "table.cpp").write_text("#include <torch/csrc/stable/library.h>\n" + only, encoding="utf-8")
    flags = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # of GCC's own intrinsics, as in setup.py
    library = build_library("scale_add", [cpu / "scale_add.cpp", cpu / "table.cpp"], cpu.glob("*.h"), flags)
    with (tmp_path / "tinyllm" / "ops" / "backends" / "cpp.py").open("a", encoding="utf-8") as file:
        file.write(f"\ntorch.ops.load_library({str(library)!r})\n")  # beside _C, before shapes are told to the compiler
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not triton and not cuda"),
            *("tests/ops/test_scale_add.py", "tests/ops/test_transforms.py", "tests/ops/test_dispatch.py"),
            *("-k", "scale_add or every_operator"),
        ],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20, done.stdout
