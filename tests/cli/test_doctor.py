"""`tinyllm doctor`, in worlds that are made up: each breakage by itself, beside a world in which nothing is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.installations import REINSTALL, World, raising
from tests.helpers.runs import ROOT, Here, environment
from tinyllm import _doctor
from tinyllm._doctor import Finding, format_findings, general, gpus, kernels
from tinyllm._internal import installation
from tinyllm.ops import _products, dispatch
from tinyllm.ops.backends import cpp

UNTUNED = "glibc's defaults: tinyllm.tune_allocator() has not been called"


def test_nothing_is_wrong(world: World) -> None:
    assert world.finds() == []
    text = format_findings([])
    assert text.startswith("Nothing is wrong. Looked at: torch, ")
    for name in (*general.CHECKS, *gpus.CHECKS, *kernels.CHECKS):
        assert name in " ".join(text.split())


def test_nothing_is_wrong_with_a_gpu(world: World) -> None:
    world.gpu()
    world.torch_for("13.0", available=True)
    assert world.finds() == []


# torch and packages


@pytest.mark.parametrize(
    ("driver", "index"), [(None, "/whl/cpu"), ("535.54.03", "/whl/cu126"), ("580.65.06", "/whl/cu130")]
)
def test_a_torch_that_does_not_import(world: World, driver: str | None, index: str) -> None:
    world.patch.setattr(_doctor, "imported", lambda name: ImportError("libc10.so: cannot\nopen"))
    if driver:
        world.gpu(driver)
    finding = world.finds_one("wrong")
    assert finding.title == "torch does not import: ImportError: libc10.so: cannot open"
    assert finding.remedy.startswith('pip install --force-reinstall "torch>=2.10" --index-url https://')
    assert finding.remedy.endswith(index)


def test_torch_is_not_installed(world: World) -> None:
    world.patch.setattr(_doctor, "imported", lambda name: ModuleNotFoundError(name))
    del world.versions["torch"]
    finding = world.finds_one("wrong")
    assert finding.title == "torch is not installed."
    assert finding.remedy == 'pip install "torch>=2.10"'


def test_a_torch_that_is_too_old_is_all_that_is_said_of_kernels_that_do_not_load(world: World) -> None:
    world.versions["torch"] = "2.9.1"
    world.patch.setattr(cpp, "why_not", "the C++ extension does not load: undefined symbol: aoti_torch_x")
    finding = world.finds_one("wrong")
    assert "2.9.1" in finding.title
    assert finding.remedy == 'pip install --force-reinstall "torch>=2.10"'


def test_a_package_of_ours_that_does_not_import(world: World) -> None:
    world.patch.setattr(_doctor, "imported", lambda name: torch if name == "torch" else AttributeError("no opcheck"))
    finding = world.finds_one("wrong")
    assert "tinyllm.ops does not import: AttributeError: no opcheck" in finding.title
    assert finding.remedy == REINSTALL


def test_packages_that_are_missing_or_too_old(world: World) -> None:
    del world.versions["numpy"]
    world.versions["triton"] = "3.5.1"
    missing, old = world.finds()
    assert (missing.level, missing.remedy) == ("wrong", 'pip install "numpy"')
    assert (old.level, old.remedy) == ("advice", 'pip install "triton>=3.6"')


def test_how_pip_is_called(world: World) -> None:
    (world.bin / "pip").unlink()
    assert installation.pip_install() == f"{sys.executable} -m pip install"
    world.program("uv")
    world.patch.setattr(installation, "find_spec", lambda name: None)
    assert installation.pip_install() == f"uv pip install --python {sys.executable}"


def test_the_command_line_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libgomp.so.1: cannot open shared object file')\n")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    command = [sys.executable, "-m", "tinyllm", "doctor"]
    done = subprocess.run(command, env={**environment(), "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "torch does not import: OSError: libgomp.so.1" in done.stdout
    assert "Remedy: " in done.stdout


# Kernels


def test_no_compiler(world: World) -> None:
    reason = "there is no C++ compiler: c++ is not on PATH"
    world.record.update(extension="skipped", reason=reason)
    world.patch.setattr(cpp, "why_not", f"the C++ extension was not built: {reason}")
    assert world.finds_one("wrong").remedy.startswith("conda install -y -c conda-forge cxx-compiler\n")
    world.program("apt-get")
    install, build = world.finds_one("wrong").remedy.splitlines()
    assert install == "sudo apt-get update && sudo apt-get install -y g++"
    assert build == f"TINYLLM_EXT=1 {REINSTALL}"
    world.program("c++")  # it has been installed since
    assert world.finds_one("wrong").remedy == build


def test_kernels_that_do_not_load(world: World) -> None:
    world.patch.setattr(cpp, "why_not", "the C++ extension does not load: undefined symbol: x")
    assert world.finds_one("wrong") == Finding(
        "wrong",
        "The C++ extension does not load: undefined symbol: x.",
        kernels._ALL_ON_PYTORCH,
        f"TINYLLM_EXT=1 {REINSTALL}",
    )
    (world.package / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    finding = world.finds_one("wrong")
    assert "for another Python: _C.cpython-27-x86_64-linux-gnu.so" in finding.title
    assert finding.remedy == f"TINYLLM_EXT=1 {REINSTALL}"


def test_kernels_that_were_left_out(world: World) -> None:
    world.record.update(extension="skipped", reason="TINYLLM_EXT=0")
    world.patch.setattr(cpp, "why_not", "the C++ extension was not built: TINYLLM_EXT=0")
    assert world.finds_one("advice").remedy == f"TINYLLM_EXT=1 {REINSTALL}"


def test_a_source_that_is_newer_than_the_library(world: World) -> None:
    source = world.site / "csrc" / "cpu" / "linear.cpp"
    source.parent.mkdir(parents=True)
    source.touch()
    library = world.package / f"_C{kernels.EXTENSION_SUFFIXES[0]}"
    library.touch()
    os.utime(library, (2e9, 2e9))
    assert world.finds() == []
    os.utime(source, (2e9 + 1, 2e9 + 1))
    finding = world.finds_one("wrong")
    assert "csrc/cpu/linear.cpp" in finding.title
    assert finding.remedy == f"cd {world.site} && {sys.executable} setup.py -q build_ext --inplace"


def test_a_library_of_another_version(world: World) -> None:
    world.patch.setattr(cpp, "has", lambda name: name not in ("linear_fwd", "quantized_embedding"))
    finding = world.finds_one("wrong")
    assert finding.title.endswith("it has no linear_fwd.")
    assert finding.remedy == REINSTALL


def test_every_operator_of_the_library_is_asked_for() -> None:
    declared = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "schemas.h").read_text())
    assert sorted(declared) == sorted({*dispatch.raw_operators} - {*kernels.WITHOUT_CPP})


def test_code_that_was_installed_as_another_version(world: World) -> None:
    world.versions["tinyllm"] = "0.0.1"
    finding = world.finds_one("wrong")
    assert "0.0.1" in finding.title
    assert finding.remedy == REINSTALL


@pytest.mark.parametrize("built", [False, True])
def test_a_checkout_that_hides_the_installation(world: World, built: bool) -> None:
    other = world.root / "site-packages"
    (other / "tinyllm").mkdir(parents=True)
    (other / "tinyllm" / "__init__.py").touch()
    installed = SimpleNamespace(read_text=lambda name: None, locate_file=lambda name: other / name)
    world.patch.setattr(metadata, "distributions", lambda **_: [installed])
    assert world.finds() == []
    (world.site / "pyproject.toml").touch()
    if built:
        (world.package / f"_C{kernels.EXTENSION_SUFFIXES[0]}").touch()
    else:
        world.patch.setattr(cpp, "why_not", "the C++ extension was not built: ...")
    assert world.finds_one("advice" if built else "wrong").remedy == 'cd "$HOME"'
    world.patch.setenv("PYTHONPATH", str(world.site))
    assert world.finds_one("advice" if built else "wrong").remedy == "unset PYTHONPATH"


def test_a_folder_in_which_python_finds_another_tinyllm(world: World) -> None:
    (world.home / "tinyllm").mkdir()
    (world.home / "tinyllm" / "__init__.py").touch()
    assert world.finds_one("advice").remedy == 'cd "$HOME"'


def test_a_folder_above_a_checkout(world: World) -> None:
    """A package on Python's path is found behind it; one that is installed editable, by a hook, is not."""
    (world.home / "tinyllm").mkdir()
    (world.home / "tinyllm" / "pyproject.toml").touch()
    (world.package / "__init__.py").touch()
    world.patch.setattr(sys, "path", [str(world.site)])
    assert world.finds() == []
    world.patch.setattr(sys, "path", [])
    assert world.finds_one("wrong").remedy == 'cd "$HOME"'


def test_the_folder_above_this_checkout(tmp_path: Path) -> None:
    """There the package may seem to be empty: a folder without files of its own."""
    code = "import sys, tinyllm._doctor as doctor; sys.modules['tinyllm'].__file__ = None\n"
    code += "del sys.modules['tinyllm'].__version__; doctor.diagnose()"
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=tmp_path, check=True, capture_output=True)
    code = "import sys; from tinyllm import __main__; del sys.modules['tinyllm'].__file__; __main__.main()"
    command = [sys.executable, "-c", code, "info"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("tinyllm: error: Python takes a folder tinyllm here")


def test_kernels_that_end_the_process(world: World) -> None:
    (world.package / f"_C{kernels.EXTENSION_SUFFIXES[0]}").touch()
    world.program("python")
    assert world.finds() == []
    (world.bin / "python").write_text("#!/bin/sh\nkill -BUS $$\n")
    finding = world.finds_one("wrong")
    assert "loading the compiled kernels ends the process: Bus error" in finding.title
    assert finding.remedy == REINSTALL


def test_kernels_of_another_installation(world: World) -> None:
    world.library.__file__ = str(world.root / "other" / "_C.so")
    finding = world.finds_one("wrong")
    assert str(world.root / "other" / "_C.so") in finding.title
    assert finding.remedy == REINSTALL
    world.patch.setenv("PYTHONPATH", str(world.site))
    assert world.finds_one("wrong").remedy == "unset PYTHONPATH"


# The processor, threads and memory


@pytest.mark.parametrize(
    ("variables", "threads", "level", "remedy"),
    [
        ({"OMP_NUM_THREADS": "64"}, 64, "wrong", "export OMP_NUM_THREADS=8"),
        ({"OMP_NUM_THREADS": "9", "MKL_NUM_THREADS": "9"}, 9, "wrong", "export OMP_NUM_THREADS=8 MKL_NUM_THREADS=8"),
        ({}, 64, "advice", "torch.set_num_threads(8)"),
        ({"OMP_NUM_THREADS": "1"}, 1, "advice", "unset OMP_NUM_THREADS"),
    ],
)
def test_threads(world: World, variables: dict[str, str], threads: int, level: str, remedy: str) -> None:
    for name, value in variables.items():
        world.patch.setenv(name, value)
    world.patch.setattr(torch, "get_num_threads", lambda: threads)
    finding = world.finds_one(level)
    assert f"{threads} " in finding.title
    assert remedy in finding.remedy


def test_as_many_threads_as_cores_with_two_cpus_each_are_right(world: World) -> None:
    world.patch.setenv("OMP_NUM_THREADS", "4")
    world.patch.setattr(torch, "get_num_threads", lambda: 4)
    assert world.finds() == []


def test_an_untuned_allocator(world: World) -> None:
    world.patch.setattr(kernels, "allocator_state", lambda: UNTUNED)
    python, shell = world.finds_one("advice").remedy.splitlines()
    assert python.startswith("tinyllm.tune_allocator()")
    code = "from tinyllm._internal.allocator import allocator_state; print(allocator_state())"
    command = ["/bin/sh", "-c", f'{shell}; exec "$0" -c "{code}"', getattr(sys, "_base_executable", sys.executable)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert not done.stdout.startswith("glibc's defaults")


def test_a_lesser_instruction_set(world: World) -> None:
    world.library.cpu_isa = lambda: "avx2"
    finding = world.finds_one("advice")
    assert "TINYLLM_CPU_ISA=avx2" in finding.title
    assert finding.remedy == "unset TINYLLM_CPU_ISA"


def test_a_processor_without_bfloat16(world: World) -> None:
    world.library.cpu_family = lambda: "intel"
    assert "tinyllm train --precision 32-true" in world.finds_one("advice").remedy


def test_variables_that_are_none(world: World) -> None:
    world.patch.setattr(_products, "machine", raising(RuntimeError("TINYLLM_CPU_ISA is 'fast'")))
    assert world.finds_one("wrong").remedy == "unset TINYLLM_CPU_ISA"
    world.patch.setattr(_products, "setting", raising(ValueError("TINYLLM_LINEAR is 'fast'")))
    assert world.finds_one("wrong").remedy == "unset TINYLLM_LINEAR"


def test_products_that_are_forced_or_cannot_be_read(world: World) -> None:
    world.patch.setattr(_products, "setting", lambda: "torch")
    assert world.finds_one("advice").remedy == "unset TINYLLM_LINEAR"
    world.patch.setattr(_products, "setting", lambda: "auto")
    world.patch.setattr(_products, "current", raising(ValueError("products.json cannot be read")))
    assert world.finds_one("wrong").remedy == "tinyllm info --tune"


def test_huge_pages_are_off(world: World) -> None:
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    world.file(path, "always [madvise] never\n")
    assert world.finds() == []
    world.file(path, "always madvise [never]\n")
    assert world.finds_one("advice").remedy == f"echo madvise | sudo tee /{path}"


# What is printed


def test_what_is_wrong_comes_first_and_counts(world: World, here: Here) -> None:
    advice, wrong = Finding("advice", "a " * 90, "costs b", "c\nd"), Finding("wrong", "e", "costs f", "g")
    text = format_findings([wrong, advice])
    assert text.startswith("One thing is wrong.\n\nWrong:    e\n  Cost:   costs f\n  Remedy: g\n\nAdvice:   a a")
    assert text.endswith("\n  Remedy: c\n          d")
    assert max(map(len, text.splitlines())) <= 100
    for findings, status in (([], 0), ([advice], 0), ([wrong, wrong], 1)):
        world.patch.setattr(_doctor, "diagnose", lambda findings=findings: findings)
        code, out, _ = here("doctor")
        assert (code, out) == (status, f"{format_findings(findings)}\n")
    assert out.startswith("2 things are wrong.")


def test_the_example_of_the_documentation(world: World) -> None:
    world.program("apt-get")
    world.patch.setattr(os, "geteuid", lambda: 0)
    world.patch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: None))
    world.patch.setattr(installation, "_TREE", world.site)
    world.patch.setattr(cpp, "why_not", "the C++ extension was not built: there is no C++ compiler: c++ is not on PATH")
    world.patch.setattr(kernels, "allocator_state", lambda: UNTUNED)
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f"$ tinyllm doctor\n{format_findings(world.finds())}\n```" in page


def test_this_machine(here: Here) -> None:
    status, out, error = here("doctor")
    assert error == ""
    assert ("Wrong: " in out) == bool(status)
