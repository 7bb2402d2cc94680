"""Tests of what setup.py decides about the CUDA library, without a build: torch and nvcc are stand-ins."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TORCH = """
import os
from types import SimpleNamespace
__version__ = "2.14.1+cu130"
version = SimpleNamespace(cuda=os.environ["TORCH_CUDA"] or None)
"""

CPP_EXTENSION = """
import os, shutil
from setuptools.command.build_ext import build_ext

_nvcc = shutil.which("nvcc")
CUDA_HOME = os.environ.get("CUDA_HOME") or (os.path.dirname(os.path.dirname(_nvcc)) if _nvcc else None)

def include_paths(device="cpu"):
    return ["/torch/include"]

library_paths = include_paths

class BuildExtension(build_ext):
    def build_extension(self, ext):
        print("compiling", ext.name, "with", os.environ["MAX_JOBS"], "jobs")
        if ext.name in os.environ.get("BROKEN", "").split():
            os.system("echo 'c++ -c csrc/broken.cpp -o no-error.o'")
            os.system(f"echo 'csrc/{ext.name}:3:5: error: no such thing' >&2")
            raise RuntimeError("Error compiling objects for extension")
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
"""

NVCC = """#!/bin/sh
case $1 in
--version) echo "Cuda compilation tools, release {major}.1, V{major}.1.66";;
--dryrun) echo '#$ LIBRARIES=  "-L{root}/far/lib"' >&2;;
esac
"""


class Machine:
    """A source tree with a torch and a toolkit as one says."""

    def __init__(self, root):
        self.root, self.site, self.source = root, root / "site", root / "source"
        shutil.copytree(ROOT / "tinyllm", self.source / "tinyllm", ignore=shutil.ignore_patterns("*.so", "_build.json"))
        for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, self.source / name)
        (self.source / "csrc" / "cuda").mkdir(parents=True)
        (self.source / "csrc" / "ops.cpp").touch()
        (self.source / "csrc" / "cuda" / "layer_norm.cu").touch()
        for name, text in (("torch/__init__.py", TORCH), ("torch/utils/cpp_extension.py", CPP_EXTENSION)):
            (self.site / name).parent.mkdir(parents=True, exist_ok=True)
            (self.site / name).write_text(text)
        (self.site / "torch" / "utils" / "__init__.py").touch()
        (self.site / "pybind11.py").write_text("get_include = lambda: '/pybind11'")
        (root / "bin").mkdir()
        self.compiler = root / "bin" / "c++"
        self.compiler.write_text("#!/bin/sh\necho 'c++ 12.2'\n")
        self.compiler.chmod(0o755)

    def add_nvcc(self, major=13):
        path = self.root / "toolkit" / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(NVCC.format(major=major, root=self.root))
        path.chmod(0o755)
        return path

    def setup(self, *commands, cuda="13.0", **environment):
        ours = ("TINYLLM", "TORCH", "CUDA", "MAX_JOBS")
        given = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        given.update(PYTHONPATH=str(self.site), PATH=str(self.root / "bin"), TORCH_CUDA=cuda, **environment)
        result = subprocess.run(
            [sys.executable, "setup.py", *(commands or ("--name",))],
            cwd=self.source,
            env=given,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return result.returncode, result.stdout + result.stderr


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def no_nvcc(machine):
    return {}


def no_nvcc_at_home(machine):
    return {"CUDA_HOME": "/nowhere"}


def another_major(machine):
    return {"CUDA_HOME": str(machine.add_nvcc(12).parents[1])}


def not_an_nvcc(machine):
    path = machine.add_nvcc()
    path.write_text("#!/bin/sh\necho hello\n")
    return {"CUDA_HOME": str(path.parents[1])}


def no_sources(machine):
    (machine.source / "csrc" / "cuda" / "layer_norm.cu").unlink()
    return {"CUDA_HOME": str(machine.add_nvcc().parents[1])}


def torch_for_cpus(machine):
    return {"CUDA_HOME": str(machine.add_nvcc().parents[1]), "cuda": ""}


def without_the_extension(machine):
    return {"CUDA_HOME": str(machine.add_nvcc().parents[1]), "TINYLLM_EXT": "0"}


REASONS = [
    (no_nvcc, "there is no nvcc: CUDA_HOME and CUDA_PATH are not set, and none is on PATH"),
    (no_nvcc_at_home, "there is no nvcc: the toolkit (CUDA_HOME, CUDA_PATH or PATH) is /nowhere, without bin/nvcc"),
    (another_major, "toolkit/bin/nvcc is CUDA 12.1.66, torch 2.14.1+cu130 CUDA 13.0: the majors differ"),
    (not_an_nvcc, "toolkit/bin/nvcc does not say its version"),
    (no_sources, "there is no csrc/cuda/*.cu"),
    (torch_for_cpus, "torch 2.14.1+cu130 is built without CUDA"),
    (without_the_extension, "the C++ extension, which declares its operators, is not built"),
]


@pytest.mark.parametrize(("lacks", "reason"), REASONS, ids=[lacks.__name__ for lacks, _ in REASONS])
def test_what_is_missing_is_said_in_one_line(machine, lacks, reason):
    environment = lacks(machine)
    status, output = machine.setup(**environment)
    assert status == 0, output
    line = next(line for line in output.splitlines() if "skipping the CUDA library" in line)
    assert line.startswith("tinyllm: skipping the CUDA library: ")
    assert line.endswith(f"{reason}. The package works without it; GPUs are left to Triton.")

    status, output = machine.setup(**environment, TINYLLM_CUDA="1")
    assert status != 0
    assert f"{reason}" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("tinyllm: TINYLLM_CUDA=1, but ")


def test_it_can_be_left_out(machine):
    home = str(machine.add_nvcc().parents[1])
    status, output = machine.setup(CUDA_HOME=home, TINYLLM_CUDA="0")
    assert status == 0, output
    assert "skipping the CUDA library: TINYLLM_CUDA=0." in output
    # Whatever else is missing.
    assert "skipping the CUDA library: TINYLLM_CUDA=0." in machine.setup(TINYLLM_EXT="0", TINYLLM_CUDA="0")[1]


@pytest.mark.parametrize("value", ["yes", "", "2"])
def test_an_unknown_choice_is_refused(machine, value):
    status, output = machine.setup(TINYLLM_CUDA=value)
    assert status != 0
    assert f"TINYLLM_CUDA is {value!r}; auto, 0 or 1 is needed" in output


def record(machine):
    (path,) = machine.source.glob("build/lib*/tinyllm/_build.json")
    return json.loads(path.read_text())


def built(machine):
    return {path.name.split(".")[0] for path in machine.source.glob("build/lib*/tinyllm/*.so")}


def test_both_libraries_are_built_and_recorded(machine):
    (machine.root / "bin" / "nvcc").symlink_to(machine.add_nvcc())  # and no CUDA_HOME
    status, output = machine.setup("build", TINYLLM_CUDA="1", MAX_JOBS="3")
    assert status == 0, output
    assert "building the CUDA library for 8.0+PTX;9.0a, 1 files" in output
    assert output.index("compiling tinyllm._C with 3 jobs") < output.index("compiling tinyllm._C_cuda with 3 jobs")
    assert built(machine) == {"_C", "_C_cuda"}
    found = record(machine)
    assert {key: found[key] for key in ("extension", "reason", "cuda", "cuda_reason", "nvcc", "cuda_arch_list")} == {
        "extension": "built",
        "reason": "",
        "cuda": "built",
        "cuda_reason": "",
        "nvcc": "13.1.66",
        "cuda_arch_list": "8.0+PTX;9.0a",
    }


def test_the_architectures_can_be_chosen(machine):
    environment = {"CUDA_HOME": str(machine.add_nvcc().parents[1]), "TORCH_CUDA_ARCH_LIST": "10.0"}
    status, output = machine.setup("build", **environment)
    assert status == 0, output
    assert record(machine)["cuda_arch_list"] == "10.0"


BROKEN_LIBRARIES = [
    ("tinyllm._C", "the C++ extension", "TINYLLM_EXT=0 installs without kernels"),
    ("tinyllm._C_cuda", "the CUDA library", "TINYLLM_CUDA=0 installs without it"),
]


@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize(("name", "title", "way_out"), BROKEN_LIBRARIES, ids=[row[0] for row in BROKEN_LIBRARIES])
@pytest.mark.parametrize("commands", [("build",), ("build_ext", "--inplace")], ids=["build", "inplace"])
def test_a_failed_build_is_an_error_of_the_installation(machine, commands, name, title, way_out, mode):
    home = str(machine.add_nvcc().parents[1])
    status, output = machine.setup(*commands, CUDA_HOME=home, BROKEN=name, TINYLLM_EXT=mode, TINYLLM_CUDA=mode)
    assert status != 0
    assert output.splitlines()[-2:] == [
        f"tinyllm: {title} does not compile against torch 2.14.1+cu130: csrc/{name}:3:5: error: no such thing",
        f"tinyllm: {way_out}",
    ]
    assert "c++ -c csrc/broken.cpp" in output  # and whatever else the compilers said


def test_a_failed_cuda_library_can_be_left_out(machine):
    environment = {"CUDA_HOME": str(machine.add_nvcc().parents[1]), "BROKEN": "tinyllm._C_cuda"}
    status, output = machine.setup("build", **environment, TINYLLM_CUDA="0")
    assert status == 0, output
    assert built(machine) == {"_C"}
    found = record(machine)
    assert (found["extension"], found["cuda_reason"]) == ("built", "TINYLLM_CUDA=0")


def no_compiler(machine):
    machine.compiler.unlink()
    return {}, "c++ is not on PATH"


def another_compiler(machine):
    return {"CXX": "no-such-compiler -O1"}, "no-such-compiler is not on PATH"


def a_compiler_to_be_installed(machine):
    machine.compiler.write_text("#!/bin/sh\nexit 1\n")
    return {}, "c++ --version fails"


@pytest.mark.parametrize("lacks", [no_compiler, another_compiler, a_compiler_to_be_installed])
def test_without_a_compiler_it_installs_plainly_and_says_so(machine, lacks):
    environment, reason = lacks(machine)
    environment["CUDA_HOME"] = str(machine.add_nvcc().parents[1])
    status, output = machine.setup("build", **environment)
    assert status == 0, output
    assert f"skipping the C++ extension: there is no C++ compiler: {reason}. The package works without it" in output
    assert "compiling tinyllm" not in output
    assert built(machine) == set()
    found = record(machine)
    assert (found["extension"], found["reason"]) == ("skipped", f"there is no C++ compiler: {reason}")
    assert found["cuda_reason"] == "the C++ extension, which declares its operators, is not built"

    status, output = machine.setup("build", **environment, TINYLLM_EXT="1")
    assert status != 0
    assert output.splitlines()[-1] == f"tinyllm: TINYLLM_EXT=1, but there is no C++ compiler: {reason}"


@pytest.mark.parametrize("arches", ["9.0;9.0a", "8.0 9.0+PTX 9.0a", "9.0a,Hopper"])
def test_9_0_beside_9_0a_is_refused(machine, arches):
    """Refuse 9.0 beside 9.0a: the loader may take the code of 9.0, whose attention kernels for Hopper are traps."""
    status, output = machine.setup(CUDA_HOME=str(machine.add_nvcc().parents[1]), TORCH_CUDA_ARCH_LIST=arches)
    assert status != 0
    assert f"TORCH_CUDA_ARCH_LIST is {arches!r}: " in output
    assert output.splitlines()[-1].endswith("and 9.0a exclude each other")
