"""Builds tinyllm._C where it can; everything declarative is in pyproject.toml.

TINYLLM_EXT=auto  build the C++ extension if a compiler and torch are there, else install without it and say why
(default) TINYLLM_EXT=0     do not build it
TINYLLM_EXT=1     build it; whatever is missing is an error
MAX_JOBS          compile jobs at once (default: by cores and memory)
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MODE = os.environ.get("TINYLLM_EXT", "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"TINYLLM_EXT is {MODE!r}; auto, 0 or 1 is needed")

record = {"extension": "skipped", "reason": "the build did not reach it"}


def say(text: str) -> None:
    print(f"tinyllm: {text}", flush=True)


def skip(reason: str) -> None:
    """Notes why there is no extension, for `tinyllm info`; an error where it was demanded."""
    if MODE == "1":
        raise SystemExit(f"tinyllm: TINYLLM_EXT=1, but {reason}")
    record.update(extension="skipped", reason=reason)
    say(f"skipping the C++ extension: {reason}. The package works without it, on plain PyTorch.")


def limit_jobs() -> None:
    """One compiler for each core, with 1 GB of memory for each."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, int(gigabytes)))))


def version_of(compiler: str) -> str:
    """The first line of `compiler --version`."""
    try:
        lines = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        lines = []
    return lines[0] if lines else compiler


class BuildPy(build_py):
    """Installs the build's record beside the modules."""

    def run(self) -> None:
        super().run()
        write_record(ROOT if self.editable_mode else Path(self.build_lib))


def write_record(root: Path) -> None:
    (root / "tinyllm" / "_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def extension() -> tuple[list[Extension], dict[str, Any]]:
    """The extension and the command that builds it, or nothing and the reason."""
    if MODE == "0":
        skip("TINYLLM_EXT=0")
        return [], {}
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        skip(f"{error.name} is not installed in the build environment")
        return [], {}
    limit_jobs()
    sources = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    say(f"building the C++ extension against torch {torch.__version__} (stable ABI of 2.10), {len(sources)} files")
    module = Extension(
        "tinyllm._C",
        sources,
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        # libtorch_cpu alone, found at run time because torch is imported first. Without a dependence on
        # libtorch_python or libc10, a later torch can serve the same wheel.
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-maybe-uninitialized",
        ],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
    )

    class BuildExt(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                # Whatever a toolchain does when it fails: the package must install all the same.
                skip(f"it did not compile: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}")
                self.extensions: list[Extension] = []
            else:
                compiler = (getattr(self.compiler, "compiler_cxx", None) or ["c++"])[0]
                record.update(extension="built", reason="", compiler=version_of(compiler), torch=torch.__version__)
                say("built the C++ extension tinyllm._C")
            write_record(ROOT if self.inplace else Path(self.build_lib))

    return [module], {"build_ext": BuildExt}


modules, commands = extension()
setup(ext_modules=modules, cmdclass={"build_py": BuildPy, **commands})
