"""Builds tinyllm._C and tinyllm._C_cuda where it can; everything declarative is in pyproject.toml.

TINYLLM_EXT=auto      build the C++ extension; install without it and say why if there is no compiler or no torch. A
(default)             compiler that is there and fails is an error.
TINYLLM_EXT=0         do not build it
TINYLLM_EXT=1         build it; whatever is missing is an error
TINYLLM_CUDA          the same for the CUDA library: auto (default) builds it if torch is a CUDA build and there is an
                      nvcc of the same CUDA major version. A GPU is not asked for: a builder has none.
TORCH_CUDA_ARCH_LIST  for which GPUs, in torch's notation (default: 8.0+PTX;9.0a)
CUDA_HOME, CUDA_PATH  where the CUDA toolkit is (default: that of the nvcc on PATH)
MAX_JOBS              compile jobs at once (default: by cores and memory)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Machine code for 8.x, Hopper's with its own instructions, and PTX from which later GPUs' drivers make theirs.
CUDA_ARCH_LIST = "8.0+PTX;9.0a"
NO_SCHEMAS = "the C++ extension, which declares its operators, is not built"

record: dict[str, str] = {}


def say(text: str) -> None:
    print(f"tinyllm: {text}", flush=True)


class Library:
    """One of the two libraries: whether it is wanted and, for `tinyllm info`, what became of it."""

    def __init__(self, title: str, variable: str, keys: tuple[str, str], without: str, gigabytes: int) -> None:
        self.title, self.variable, self.keys, self.without, self.gigabytes = title, variable, keys, without, gigabytes
        self.mode = os.environ.get(variable, "auto")
        if self.mode not in ("auto", "0", "1"):
            raise SystemExit(f"{variable} is {self.mode!r}; auto, 0 or 1 is needed")
        self.note("skipped", "the build did not reach it")

    def note(self, state: str, reason: str) -> None:
        record.update(zip(self.keys, (state, reason), strict=True))

    def skip(self, reason: str) -> None:
        """Notes why it is not there, first of all that nobody wants it; an error where it was demanded."""
        if self.mode == "0":
            reason = f"{self.variable}=0"
        if self.mode == "1":
            raise SystemExit(f"tinyllm: {self.variable}=1, but {reason}")
        self.note("skipped", reason)
        text = f"skipping {self.title}: {reason}. {self.without}"
        say(text)
        # Newer versions of pip show nothing else of a build that succeeds; this runs also for the metadata, before.
        if self is CPP and self.mode == "auto" and not {"egg_info", "dist_info"} & set(sys.argv):
            warnings.warn(text, stacklevel=2)

    def fail(self, failure: str, torch_version: str) -> None:
        """End the installation: one without kernels that nobody asked for would go unnoticed."""
        raise SystemExit(
            f"tinyllm: {self.title} does not compile against torch {torch_version}: {failure}\n"
            f"tinyllm: {self.variable}=0 installs without {'kernels' if self is CPP else 'it'}"
        )

    def built(self, **facts: str) -> None:
        self.note("built", "")
        record.update(facts)
        say(f"built {self.title}")

    def jobs(self) -> str:
        """One compiler for each core, with memory for each."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return str(max(1, min(os.cpu_count() or 1, int(memory / self.gigabytes))))


CPP = Library(
    "the C++ extension",
    "TINYLLM_EXT",
    ("extension", "reason"),
    "The package works without it, on plain PyTorch.",
    gigabytes=1,
)
CUDA = Library(
    "the CUDA library",
    "TINYLLM_CUDA",
    ("cuda", "cuda_reason"),
    "The package works without it; GPUs are left to Triton.",
    gigabytes=2,
)


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


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cpp_module(torch: Any, pybind11: Any, cpp_extension: Any) -> Extension:
    sources = files("csrc/*.cpp", "csrc/cpu/*.cpp")
    say(f"building the C++ extension against torch {torch.__version__} (stable ABI of 2.10), {len(sources)} files")
    return Extension(
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
            "-Wno-maybe-uninitialized",  # as this and the next of GCC's own intrinsics for AVX-512
            "-Wno-uninitialized",
        ],
        depends=files("csrc/**/*.h"),
    )


def missing_compiler() -> str | None:
    """Return why there is no C++ compiler to call, or None if there is one."""
    # The one that torch's BuildExtension calls.
    command = os.environ.get("CXX") or ("cl" if os.name == "nt" else "c++")
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        return f"there is no C++ compiler: {program} is not on PATH"
    # macOS has a c++ that only offers to install one.
    if os.name != "nt" and subprocess.run([program, "--version"], capture_output=True).returncode != 0:
        return f"there is no C++ compiler: {program} --version fails"
    return None


@contextmanager
def copied_output() -> Iterator[list[str]]:
    """Collect the lines that this process and its children print, which still go where they went before."""
    lines: list[str] = []
    source, sink = os.pipe()
    before = [os.dup(descriptor) for descriptor in (1, 2)]

    def copy() -> None:
        with open(source, "rb") as stream:
            for line in stream:
                os.write(before[0], line)
                lines.append(line.decode(errors="replace").strip())

    copier = threading.Thread(target=copy, daemon=True)
    copier.start()
    try:
        for descriptor in (1, 2):
            os.dup2(sink, descriptor)
        os.close(sink)
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), before, strict=True):
            os.dup2(original, descriptor)
        # A compiler's cache may have left a server behind that holds the pipe; it must not hold the installation.
        copier.join(timeout=10)


def first_error(lines: list[str], error: Exception) -> str:
    """Return the first line in which a compiler or a linker complains, or what the build itself says."""
    pattern = re.compile(r"\berror\b.*: |\bfatal\b.*:|: error|undefined reference|cannot find ")
    text = next(filter(pattern.search, lines), str(error).strip()) or repr(error)
    return text.splitlines()[0]


def find_nvcc(torch: Any, cpp_extension: Any) -> tuple[Path, str] | str:
    """The nvcc that torch's BuildExtension will call and its version, or why the CUDA library cannot be built."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:  # torch has looked at CUDA_HOME, CUDA_PATH and PATH
        return "there is no nvcc: CUDA_HOME and CUDA_PATH are not set, and none is on PATH"
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    if not nvcc.is_file():
        return f"there is no nvcc: the toolkit (CUDA_HOME, CUDA_PATH or PATH) is {nvcc.parents[1]}, without bin/nvcc"
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return f"{nvcc} does not run: {error.strerror}"
    version = re.search(r"release (\d+)\.\d+, V([\d.]+)", output)
    if version is None:
        return f"{nvcc} does not say its version"
    if version[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is CUDA {version[2]}, torch {torch.__version__} CUDA {torch.version.cuda}: the majors differ"
    return nvcc, version[2]


def cuda_module(torch: Any, cpp_extension: Any, nvcc: Path, sources: list[str]) -> Extension:
    arches = os.environ["TORCH_CUDA_ARCH_LIST"]
    say(f"building the CUDA library for {arches}, {len(sources)} files")
    names = re.split(r"[;,\s]+", arches)
    hopper = "9.0a" in names
    plain = [name for name in names if name in ("9.0", "9.0+PTX", "Hopper")]
    if hopper and plain:
        # A GPU of 9.0 runs either's code, and only that of 9.0a holds Hopper's own instructions.
        raise SystemExit(f"tinyllm: TORCH_CUDA_ARCH_LIST is {arches!r}: {plain[0]} and 9.0a exclude each other")
    if not hopper:
        say("without Hopper's own attention kernels: TORCH_CUDA_ARCH_LIST does not name 9.0a")
    # Where nvcc itself would link the runtime from: neither a distribution's nor pip's toolkit need have a lib64.
    plan = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    options = re.findall(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
    runtime_dirs = [option[2:] for line in options for option in shlex.split(line) if option.startswith("-L")]
    return Extension(
        "tinyllm._C_cuda",
        sources,
        include_dirs=cpp_extension.include_paths("cuda"),
        library_dirs=[*cpp_extension.library_paths("cuda"), *runtime_dirs],
        # torch's stable ABI, torch's current stream, and the runtime that torch has loaded already, by the name that it
        # goes by: toolkits from pip have no other.
        libraries=["torch_cpu", "torch_cuda", f":libcudart.so.{torch.version.cuda.split('.')[0]}"],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ("USE_CUDA", None),
            *([("TINYLLM_SM90A", None)] if hopper else []),
        ],
        extra_compile_args={"cxx": [], "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"]},
        depends=files("csrc/*.h", "csrc/cuda/**/*.cuh"),
        language="c++",
    )


def libraries() -> tuple[list[Extension], dict[str, Any]]:
    """What is to be built, and the command that builds it."""
    try:
        if CPP.mode == "0":
            raise ImportError
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if CPP.mode != "0" and "sdist" not in sys.argv:
            raise SystemExit(
                f"tinyllm: {error.name} is not installed; --no-build-isolation builds with what is: "
                "pip install torch setuptools pybind11 ninja\n"
                f"tinyllm: {CPP.variable}=0 installs without kernels"
            ) from error
        CPP.skip(f"{error.name} is not installed in the build environment")
        CUDA.skip(NO_SCHEMAS)
        return [], {}
    absent = missing_compiler()
    if absent is not None:
        CPP.skip(absent)
        CUDA.skip(NO_SCHEMAS)
        return [], {}
    modules = [(CPP, cpp_module(torch, pybind11, cpp_extension))]
    sources = files("csrc/cuda/**/*.cu")
    found = find_nvcc(torch, cpp_extension)
    if not isinstance(found, str) and not sources:
        found = "there is no csrc/cuda/*.cu"
    if isinstance(found, str) or CUDA.mode == "0":
        CUDA.skip(str(found))
    else:
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCH_LIST
        modules.append((CUDA, cuda_module(torch, cpp_extension, found[0], sources)))

    class BuildExt(cpp_extension.BuildExtension):
        """Build one library after the other, so that a failure names its own."""

        inplace: bool
        build_temp: str
        compiler: Any

        def run(self) -> None:
            # An editable build would throw its objects away, and the next one compile everything again.
            ordinary = build(self.distribution)
            ordinary.ensure_finalized()
            self.build_temp = ordinary.build_temp
            inplace, compiler, jobs = self.inplace, self.compiler, os.environ.get("MAX_JOBS")
            for library, module in modules:
                self.extensions, self.inplace, self.compiler = [module], inplace, compiler
                os.environ["MAX_JOBS"] = jobs or library.jobs()
                with copied_output() as lines:
                    try:
                        super().run()
                        failure = None
                    except Exception as error:
                        failure = error
                if failure is not None:
                    library.fail(first_error(lines, failure), torch.__version__)
                if library is CPP:
                    name = (getattr(self.compiler, "compiler_cxx", None) or ["c++"])[0]
                    CPP.built(compiler=version_of(name), torch=torch.__version__)
                else:
                    CUDA.built(nvcc=found[1], cuda_arch_list=os.environ["TORCH_CUDA_ARCH_LIST"])
            self.extensions, self.inplace = [module for _, module in modules], inplace
            write_record(ROOT if inplace else Path(self.build_lib))

    return [module for _, module in modules], {"build_ext": BuildExt}


def long_description() -> str:
    """Return README.md without the pictures and links that lead into the repository, where a package index has none."""
    inside = r"\((?!https?://|mailto:)[^)]*\)"
    code, picture = r"^```.*?^```|`[^`\n]+`", rf"!\[[^]]*\]{inside}|<img[^>]*>"
    link = rf"\[(?P<text>(?:`[^`]*`|[^]`[])*)\]{inside}"
    pattern = re.compile(rf"(?P<code>{code})|{picture}|{link}", re.MULTILINE | re.DOTALL)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return pattern.sub(lambda match: match["code"] or match["text"] or "", text)


modules, commands = libraries()
# The kernels and the benchmarks stand beside tinyllm in the repository, and are installed inside it.
found = find_packages(include=["tinyllm*", "kernels*", "benchmarks*"])
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=[name if name.startswith("tinyllm") else f"tinyllm.{name}" for name in found],
    package_dir={"tinyllm.kernels": "kernels", "tinyllm.benchmarks": "benchmarks"},
    ext_modules=modules,
    cmdclass={"build_py": BuildPy, **commands},
)
