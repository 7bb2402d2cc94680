"""Compiles every CUDA C++ kernel without a GPU, and reads from the machine code what decides its speed:

    python -m tests.building.cuda_compile [--only PATTERN] [--arch 90] [--sass DIR]

nvcc compiles csrc/cuda/*.cu as the installation does. How many threads and how much shared memory a kernel is launched
with is what its launcher says when the operators run on emulated threads (tests/emulation). Fails where a kernel spills
registers to local memory, where its launch asks for more than a multiprocessor has, where no call of `launches` reaches
it, or where its machine code lacks what `CLAIMS` says of it. Where there is no nvcc, it says so and passes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from tests.building.machine_code import (
    ARCHITECTURES,
    HEADER,
    SHARED_LIMIT,
    WIDE,
    Claim,
    Kernel,
    complaints,
    output,
    read,
    row,
)
from tests.emulation.build import SOURCES, build

WORKERS = 2
REGISTERS = 65_536  # of a multiprocessor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- What is launched


@dataclass(frozen=True)
class Launch:
    threads: int
    shared: int  # bytes a block, beyond what the kernel declares itself


def launches(arches: Sequence[int]) -> dict[int, dict[str, Launch]]:
    """Architecture -> kernel's name with its template arguments -> its largest launch, of calls that reach them all."""
    library = build()
    torch.ops.load_library(library)
    names = {
        int(address, 16): plain_name(name)
        for address, name in re.findall(r"^([0-9a-f]+) \w (.*)$", output("nm", "-C", library), re.MULTILINE)
    }
    found: dict[int, dict[str, Launch]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in arches:
            log = Path(folder, str(arch))
            os.environ.update(TINYLLM_EMULATED_LOG=str(log), TINYLLM_EMULATED_CAPABILITY=str(arch))
            for dtype in DTYPES:
                _call_everything(torch.ops.tinyllm_host, dtype, clusters=arch >= 90)
            of_arch = found[arch] = {}
            for line in set(log.read_text(encoding="utf-8").splitlines()):
                offset, threads, shared = map(int, line.split()[:3])
                before = of_arch.get(names[offset], Launch(0, 0))
                of_arch[names[offset]] = Launch(max(before.threads, threads), max(before.shared, shared))
    return found


def _call_everything(raw: Any, dtype: torch.dtype, clusters: bool) -> None:
    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    # One element at a time and 16 bytes; few columns a thread and many; as many as fit a block.
    for columns in (31, 64, 768, 5000, 5001, 16_384):
        for x in (draw(2, columns), draw(2, columns + 1)[:, 1:]):  # rows that are aligned, and not
            w, shape = draw(columns), [columns]
            _, mean, rstd = raw.layer_norm_fwd(x, shape, w, w, 1e-5)
            raw.add_layer_norm_fwd(x, x, shape, w, w, 1e-5)
            raw.rms_norm_fwd(x, shape, w, 1e-5)
            for needed in (False, True):
                raw.layer_norm_bwd(x, x, shape, w, mean, rstd, needed)
                raw.add_layer_norm_bwd(x, x, x, shape, w, mean, rstd, needed)
                raw.rms_norm_bwd(x, x, shape, w, rstd, needed)
    for columns in (32_768, 32_763) if clusters else ():
        x, shape = draw(1, columns), [columns]
        _, mean, rstd = raw.layer_norm_fwd(x, shape, None, None, 1e-5)
        raw.add_layer_norm_bwd(x, x, x, shape, None, mean, rstd, True)
    for classes in (3, 40, 1000, 5003, 20_000):
        for x in (draw(3, classes), draw(3, classes + 1)[:, 1:]):
            target, one = torch.tensor([0, 2, -100]), torch.ones((), dtype=torch.float32)
            for weight in (None, draw(classes).abs()):
                for reduction, smoothing in itertools.product((0, 1, 2), (0.0, 0.1)):
                    options = (weight, reduction, -100, smoothing)
                    raw.cross_entropy_fwd(x, target, *options, True)
                    _, statistics, _ = raw.cross_entropy_fwd(x, target, *options, False)
                    grad = one if reduction else one.expand(3)
                    raw.cross_entropy_bwd(grad, x, target, weight, statistics, *options[1:])
    for columns in (1, 33, 64, 768):
        for id_dtype in (torch.int32, torch.int64):
            ids = torch.tensor([[1, 1, 0, 4] * 20, [4, 4, 1, 1] * 20], dtype=id_dtype)
            raw.embedding_fwd(ids, draw(5, columns), draw(80, columns))
            raw.embedding_bwd(draw(2, 80, columns), ids, 5, None, True, True)
    if dtype == torch.float32:
        return
    for size in (64, 128):
        for heads, kv_heads, queries, keys in ((2, 1, 70, 90), (2, 1, 1, 700), (1, 1, 1, 20)):
            q, k = draw(1, heads, queries, size), draw(1, kv_heads, keys, size)
            for causal in (False, True):
                out, lse = raw.attention_fwd(q, k, k, None, causal, 0.1)
                raw.attention_bwd(q, q, k, k, None, out, lse, causal, 0.1)


# ---- What is expected of the machine code

HOPPER = Claim(
    "multiplies asynchronously from shared memory (HGMMA), which the copy engine fills (UTMALDG), and gives registers "
    "from warpgroup to warpgroup (USETMAXREG)",
    lambda k: k.count("HGMMA") > 0 and k.count("UTMALDG") > 0 and k.count("USETMAXREG") == 2,
    arches=(90,),
)

PAIRS = Claim(
    "multiplies on the tensor cores (HMMA), from shared memory that asynchronous copies of 16 bytes fill",
    lambda k: k.count("HMMA") > 0 and k.count("LDSM") > 0 and k.wide("LDGSTS") > 0,
)


def before_the_second_wait(kernel: Kernel) -> int:
    """Count exponentials between the first wait that leaves a group of matmuls running and the next wait."""
    waits = [i for i, instruction in enumerate(kernel.code) if instruction.startswith("WARPGROUP.DEPBAR")]
    for wait, following in itertools.pairwise(waits):
        if kernel.code[wait].endswith("0x1"):
            return sum(instruction.startswith("MUFU.EX2") for instruction in kernel.code[wait:following])
    return 0


def overlaps(least: Callable[[str], int]) -> Claim:
    """Return a claim; `least` tells from an instance's template arguments how many numbers of a tile a thread has."""
    return Claim(
        "computes a tile's exponentials while a product is under way: between the two waits of its loop",
        lambda k: before_the_second_wait(k) >= least(k.case),
        arches=(90,),
    )


# The order of place_of takes three divisions (by the blocks of a bunch of heads, by its heads, and by the heads of a
# sequence), a key's head a fourth; one head's blocks after the other's would take one less.
PLACED = Claim(
    "finds its place as the kernels for 8.0 do (place_of): the longest blocks of several heads first",
    lambda k: k.count("I2F") >= 4,
)

# Of a multiprocessor's 64, which reserving 16 would leave for four blocks.
ONE_BARRIER = Claim(
    "uses one hardware barrier, so that registers and threads alone say how many blocks a multiprocessor has",
    lambda k: (k.barriers is not None and k.barriers <= 1) or k.case.endswith("true>"),
)


def in_vectors(says: str, *instructions: str) -> Claim:
    """Return the instances that load 16 bytes at a time, whose second argument is the number of elements in them."""

    def holds(kernel: Kernel) -> bool:
        alone = kernel.case.strip("<>").split(", ")[1] == "1"
        return alone or all(kernel.wide(instruction) > 0 for instruction in instructions)

    return Claim(says, holds)


# Kernel -> what must hold wherever it is compiled.
CLAIMS: dict[str, list[Claim]] = {
    "norm_forward_kernel": [in_vectors("loads and stores 16 bytes at a time", "LDG", "STG"), ONE_BARRIER],
    "norm_backward_kernel": [in_vectors("has rows brought while it works, 16 bytes at a time", "LDGSTS", "STG")],
    "cross_entropy_forward_kernel": [WIDE],
    "cross_entropy_backward_kernel": [WIDE],
    "embedding_forward_kernel": [in_vectors("loads and stores 16 bytes at a time", "LDG", "STG")],
    "attention_forward_kernel": [PAIRS, PLACED],
    "attention_backward_keys_kernel": [PAIRS],
    "attention_backward_queries_kernel": [PAIRS, PLACED],
    "attention_decode_kernel": [PAIRS],
    "attention_forward_sm90_kernel": [HOPPER, PLACED, overlaps(lambda case: 64)],
    "attention_keys_sm90_kernel": [HOPPER, PLACED, overlaps(lambda case: 32)],
    "attention_queries_sm90_kernel": [HOPPER, PLACED, overlaps(lambda case: 64 if case.endswith(" 64>") else 32)],
}


# ---- Compiling


def plain_name(demangled: str) -> str:
    """Return a function's name and template arguments, spelled alike for the compilers for GPU and CPU."""
    for wordy in ("tinyllm::cuda::", "(anonymous namespace)::"):
        demangled = demangled.replace(wordy, "")
    demangled = demangled.replace("__nv_bfloat16", "bf16").replace("__half", "f16").removeprefix("void ")
    depth = 0
    for i, letter in enumerate(demangled):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return demangled[:i]
    return demangled


def compile_file(
    nvcc: str, source: Path, arch: int, sass: Path | None
) -> list[tuple[str, int, int, list[str], int | None]]:
    """Return a file's kernels for an architecture: name, registers, bytes of local memory, instructions, barriers."""
    target = f"{arch}a" if arch == 90 else str(arch)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.cubin")
        command = [nvcc, "-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += ["-DTINYLLM_SM90A"] if arch == 90 else []
        command += [f"-gencode=arch=compute_{target},code=sm_{target}", "-cubin", "-Xptxas=-v"]
        command += ["-o", str(binary), str(source)]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        # ptxas tells of products that it makes wait for each other, and of registers that it cannot move, as remarks.
        if done.returncode != 0 or "C75" in said:
            raise RuntimeError(said.strip())
        if not binary.exists() or binary.stat().st_size == 0:
            return []
        barriers = dict(re.findall(r"entry function '(\S+)'(?:.*\n)+?.*Used \d+ registers, used (\d+) barriers", said))
        found = read(binary, sass and sass / f"{source.stem} sm_{target}.sass")
        return [(name, *rest, int(barriers[name]) if name in barriers else None) for name, *rest in found]


def kernels_of(
    arch: int,
    compiled: list[tuple[str, int, int, list[str], int | None]],
    launched: dict[int, dict[str, Launch]],
) -> Iterator[tuple[Kernel, list[str]]]:
    """Return each kernel with what is wrong with its launch."""
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, *_ in compiled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for demangled, (_, registers, stack, code, barriers) in zip(names, compiled, strict=True):
        name = plain_name(demangled)
        if sum(instruction.split()[0] not in ("NOP", "BRA") for instruction in code) < 8:
            continue  # a kernel of other architectures: an empty shell here
        # One that this architecture has better kernels for is launched as elsewhere, where those do not take a call.
        launch = launched[arch].get(name) or next((of[name] for of in launched.values() if name in of), Launch(0, 0))
        wrong = [] if launch.threads else ["is launched by no call of this check"]
        if registers * launch.threads > REGISTERS:
            wrong.append(f"does not start: {launch.threads} threads of {registers} registers")
        base, _, arguments = name.partition("<")
        case = f"<{arguments}" if arguments else ""
        yield Kernel(base, case, arch, launch.threads // 32, registers, launch.shared, stack, code, barriers), wrong


def main(arguments: list[str] | None = None) -> int:
    """Compile the files and report; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.building.cuda_compile", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="files whose name contains this")
    parser.add_argument("--arch", type=int, choices=SHARED_LIMIT, help=f"one architecture instead of {ARCHITECTURES}")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="leave the disassembled files there")
    options = parser.parse_args(arguments)

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("CUDA C++ kernels: not compiled, there is no nvcc on PATH")
        return 0
    start = time.perf_counter()
    arches = ARCHITECTURES if options.arch is None else (options.arch,)
    jobs = [(source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in arches if options.only in source.stem]
    failed: list[str] = []
    count = 0
    print(HEADER)
    with ThreadPoolExecutor(WORKERS) as pool:
        running = [(*job, pool.submit(compile_file, nvcc, *job, options.sass)) for job in jobs]
        launched = launches(ARCHITECTURES)  # meanwhile
        for source, arch, result in running:
            try:
                compiled = result.result()
            except Exception as error:  # the others' results are wanted, too
                failed.append(f"{source.name}, sm_{arch}: {error}")
                continue
            for kernel, wrong in kernels_of(arch, compiled, launched):
                count += 1
                print(row(kernel), flush=True)
                failed += [f"{kernel.name}{kernel.case}, sm_{arch}: {said}" for said in wrong]
                failed += [f"{kernel.name}{kernel.case}, sm_{arch}: {said}" for said in complaints(kernel, CLAIMS)]
    version = re.search(r"V[\d.]+", output(nvcc, "--version"))
    print(f"{count} kernels in {time.perf_counter() - start:.0f} s, nvcc {version[0] if version else '?'}")
    for said in failed:
        print(f"FAILED {said}")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
