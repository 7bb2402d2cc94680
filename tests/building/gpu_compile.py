"""Compiles every Triton kernel without a GPU, and reads from the machine code what decides its speed:

    python -m tests.building.gpu_compile [--only PATTERN] [--arch 90] [--every-tile] [--sass DIR]

The launchers of `kernels/` run as they are, on CPU tensors, but for a driver that names a GPU which is not there and
launches that end once their kernel is compiled. So what is compiled is what a GPU of that kind would run, with the
tiles, warps and specialisations that the launcher chooses. Fails where a kernel spills registers to local memory (those
of `SPILLING_APART` where they do in a loop over tiles), or where its machine code lacks what `CLAIMS` says of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

# Before triton reads them. Interpreted kernels are not compiled; and newer versions warn of a default to come.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import (
    add_rms_norm,
    attention,
    cross_entropy,
    embedding,
    gated_activation,
    launch,
    layer_norm,
    losses,
    quantized_linear,
    random,
    rotary_embedding,
    tuning,
)
from tests.building.machine_code import (
    ARCHITECTURES,
    HEADER,
    SHARED_LIMIT,
    WIDE,
    Claim,
    Kernel,
    complaints,
    read_bytes,
    row,
    spills_apart,
)  # fmt: skip

MULTIPROCESSORS = 132  # an H200's
WORKERS = 2

Call = Callable[[], object]


# ---- What is compiled


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor of any content, since nothing runs. A few rows suffice: their number decides only the grid."""
    return torch.empty(shape, dtype=dtype)


def _norm_cases() -> Iterator[tuple[str, Call]]:
    rows = 4096
    widths = {
        torch.bfloat16: (768, 1024, 4096, 8192, 12288),
        torch.float32: (768, 4096, 8192),
        torch.float64: (2048,),
    }
    for dtype, widths_of_dtype in widths.items():
        for columns in widths_of_dtype:
            x = tensor(rows, columns, dtype=dtype)
            w, rstd, shape = x[0].clone(), tensor(rows, dtype=torch.float32), [columns]
            name = f"{str(dtype).removeprefix('torch.')} {columns}"
            # A loop's variables would all have their last values when the cases are called.
            forward = (x, shape, w, w, 1e-5)
            backward = (x, x, shape, w, rstd, rstd, True)
            yield f"layer_norm fwd {name}", lambda a=forward: layer_norm.layer_norm_fwd(*a)
            yield f"layer_norm bwd {name}", lambda a=backward: layer_norm.layer_norm_bwd(*a)
            if columns in (1024, 8192):
                added = (x, x, *backward[1:])
                yield f"add_layer_norm fwd {name}", lambda a=forward: layer_norm.add_layer_norm_fwd(a[0], *a)
                yield f"add_layer_norm bwd {name}", lambda a=added: layer_norm.add_layer_norm_bwd(*a)
                if dtype == torch.float32:
                    continue
                yield f"rms_norm fwd {name}", lambda a=forward: layer_norm.rms_norm_fwd(*a[:3], a[4])
                yield f"rms_norm bwd {name}", lambda a=backward: layer_norm.rms_norm_bwd(*a[:4], *a[5:])
                yield f"add_rms_norm fwd {name}", lambda a=forward: add_rms_norm.add_rms_norm_fwd(a[0], *a[:3], a[4])
                yield f"add_rms_norm bwd {name}", lambda a=added: add_rms_norm.add_rms_norm_bwd(*a[:5], *a[6:])
    wide = tensor(64, 20_480)
    yield "layer_norm fwd bfloat16 20480", lambda: layer_norm.layer_norm_fwd(wide, [20_480], wide[0], wide[0], 1e-5)


def _attention_cases() -> Iterator[tuple[str, Call]]:
    def both(q: Tensor, mask: Tensor | None = None, dropout: bool = False, causal: bool = True) -> Call:
        arguments = (causal, 0.1, 0.1 if dropout else 0.0, torch.zeros(2, dtype=torch.int64) if dropout else None)

        def call() -> None:
            _, lse = attention.attention_fwd(q, q, q, mask, *arguments)
            attention.attention_bwd(q, q, q, q, mask, q, lse, *arguments)

        return call

    def with_numbers(q: Tensor, causal: bool, *names: str) -> Call:
        numbers = dict.fromkeys(names, torch.zeros(q.size(0), dtype=torch.int64))

        def call() -> None:
            out, lse = attention.attention_fwd(q, q, q, None, causal, 0.1, **numbers)
            attention.attention_bwd(q, q, q, q, None, out, lse, causal, 0.1, **numbers)

        return call

    rows, heads = 1024, 8
    # Of 63 and 127 columns no descriptor can be made. 512 goes in chunks.
    for size in (64, 128, 256, 512, 63, 127):
        q = tensor(2, heads, rows, size)
        yield f"causal bfloat16 D{size}", both(q)
        if size < 512:
            yield f"causal dropout bfloat16 D{size}", both(q, dropout=True)
    for size in (64, 128):
        q = tensor(2, heads, rows, size)
        yield f"bool mask bfloat16 D{size}", both(q, tensor(2, heads, rows, rows, dtype=torch.bool), causal=False)
        yield f"additive mask bfloat16 D{size}", both(q, tensor(2, heads, rows, rows), causal=False)
    for size in (64, 128):
        yield f"causal float32 D{size}", both(tensor(2, heads, rows, size, dtype=torch.float32))
    for size, causal in ((64, False), (128, True)):
        case = f"{'causal ' if causal else ''}key lengths bfloat16 D{size}"
        yield case, with_numbers(tensor(2, heads, rows, size), causal, "key_lengths")
    for size in (64, 128):
        yield f"causal offset bfloat16 D{size}", with_numbers(tensor(2, heads, rows, size), True, "causal_offset")
    for dtype in (torch.bfloat16, torch.float32):
        few, keys = tensor(2, 32, 1, 64, dtype=dtype), tensor(2, 8, 4096, 64, dtype=dtype)
        arguments = (few, keys, keys, None, False, 0.1)
        offset = torch.zeros(2, dtype=torch.int64)
        behind = (few.expand(-1, -1, 4, -1), keys, keys, None, True, 0.1, 0.0, None, None, offset)
        yield f"four queries {str(dtype).removeprefix('torch.')} D64", lambda a=behind: attention.attention_fwd(*a)
        yield f"one query {str(dtype).removeprefix('torch.')} D64", lambda a=arguments: attention.attention_fwd(*a)


def _loss_cases() -> Iterator[tuple[str, Call]]:
    for dtype in (torch.bfloat16, torch.float32):
        for classes in (50257, 128256):
            x, target = tensor(4, classes, dtype=dtype), torch.zeros(4, dtype=torch.int64)
            name, one = f"{str(dtype).removeprefix('torch.')} {classes}", torch.tensor(1.0)
            with_grad, without = (x, target, None, 1, -100, 0.0, True), (x, target, None, 1, -100, 0.0, False)
            weighted = (x, target, tensor(classes, dtype=torch.float32), 1, -100, 0.1, True)
            backward = (one, x, target, None, tensor(4, 2, dtype=torch.float32), 1, -100, 0.0)
            yield f"cross_entropy with gradient {name}", lambda a=with_grad: cross_entropy.cross_entropy_fwd(*a)
            yield f"cross_entropy {name}", lambda a=without: cross_entropy.cross_entropy_fwd(*a)
            yield f"cross_entropy bwd {name}", lambda a=backward: cross_entropy.cross_entropy_bwd(*a)
            yield f"cross_entropy weighted {name}", lambda a=weighted: cross_entropy.cross_entropy_fwd(*a)
    x, target = tensor(4, 50257, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    yield "cross_entropy float64 50257", lambda: cross_entropy.cross_entropy_fwd(x, target, None, 1, -100, 0.0, True)
    large = tensor(1 << 22, dtype=torch.float32)
    yield "scale_unless_one", lambda: losses.scale_unless_one_(large, torch.tensor(1.0))


def _embedding_cases() -> Iterator[tuple[str, Call]]:
    ids, rng = torch.zeros(8, 1024, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        weight, positions, grad = (tensor(*shape, 768, dtype=dtype) for shape in ((100,), (1024,), (8, 1024)))
        name = str(dtype).removeprefix("torch.")
        forward, backward = (ids, weight, positions), (grad, ids, 100, None, True, True)
        yield f"embedding fwd {name}", lambda a=forward: embedding.embedding_fwd(*a)
        yield f"embedding fwd dropout {name}", lambda a=forward: embedding.embedding_fwd(*a, 0.1, rng)
        yield f"embedding bwd {name}", lambda a=backward: embedding.embedding_bwd(*a)
        yield f"embedding bwd dropout {name}", lambda a=backward: embedding.embedding_bwd(*a, 0.1, rng)


def _quantized_cases() -> Iterator[tuple[str, Call]]:
    ids, outputs = torch.zeros(8, dtype=torch.int64), 4096
    for kind, bits in (("bf16", 16), ("int8", 8), ("int4", 4)):
        for columns in (768, 4096) if bits == 8 else (768,):
            data = tensor(outputs, columns * min(bits, 8) // 8, dtype=torch.bfloat16 if bits == 16 else torch.uint8)
            scales = None if bits == 16 else tensor(outputs, columns // 64)
            for dtype in (torch.bfloat16, torch.float32):
                for rows in (1, 4):
                    x, bias = tensor(rows, columns, dtype=dtype), tensor(outputs, dtype=dtype)
                    name = f"{kind} {columns}, {rows} of {str(dtype).removeprefix('torch.')}"
                    call = (x, data, scales, bias, None, "gelu_tanh")
                    yield f"quantized_linear {name}", lambda a=call: quantized_linear.quantized_linear(*a)
            many = (
                tensor(17, columns, dtype=torch.float32),
                data[:64],
                None if scales is None else scales[:64],
                None,
                None,
                "none",
            )
            yield f"quantized_linear {kind} {columns}, many", lambda a=many: quantized_linear.quantized_linear(*a)
            table = (ids, data, scales, columns, torch.bfloat16)
            yield f"quantized_embedding {kind} {columns}", lambda a=table: quantized_linear.quantized_embedding(*a)


def _gated_cases() -> Iterator[tuple[str, Call]]:
    for dtype in (torch.bfloat16, torch.float32):
        for activation in ("silu", "gelu_tanh", "gelu"):
            x, name = tensor(64, 4864, dtype=dtype), f"{activation} {str(dtype).removeprefix('torch.')}"
            forward, backward = (x, x, activation), (x, x, x, activation)
            yield f"gated_activation fwd {name}", lambda a=forward: gated_activation.gated_activation_fwd(*a)
            yield f"gated_activation bwd {name}", lambda a=backward: gated_activation.gated_activation_bwd(*a)


def _rotary_cases() -> Iterator[tuple[str, Call]]:
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim, rotated in ((64, 64), (128, 128), (64, 16)):
            x, angles = tensor(2, 14, 64, head_dim, dtype=dtype), tensor(1, 64, rotated, dtype=dtype)
            arguments = (x, x[:, :2], angles, angles)
            name = f"{str(dtype).removeprefix('torch.')} D{head_dim}, {rotated} rotated"
            yield f"rotary_embedding fwd {name}", lambda a=arguments: rotary_embedding.rotary_embedding_fwd(*a)
            yield f"rotary_embedding bwd {name}", lambda a=arguments: rotary_embedding.rotary_embedding_bwd(*a)


# File of kernels -> cases, each a name and a call of a launcher. One more case is one more line.
CASES: dict[str, list[tuple[str, Call]]] = {
    "layer_norm": [*_norm_cases()],
    "attention": [*_attention_cases()],
    "cross_entropy": [*_loss_cases()],
    "embedding": [*_embedding_cases()],
    "quantized_linear": [*_quantized_cases()],
    "gated_activation": [*_gated_cases()],
    "rotary_embedding": [*_rotary_cases()],
    "random": [("dropout_factors", lambda: random.dropout_factors(torch.zeros(2, dtype=torch.int64), 64, 256, 0.1))],
}


# ---- What is expected of the machine code


MATRIX_UNITS = Claim(
    "multiplies asynchronously from shared memory (HGMMA), which tensor descriptors fill (UTMALDG)",
    lambda k: k.count("HGMMA") > 0 and k.count("UTMALDG") > 0,
    arches=(90,),
    cases="causal bfloat16 D128",
)
WIDE_LOADS = Claim("loads 16 bytes at a time", lambda k: k.wide("LDG") + k.wide("LDGSTS") > 0)
AHEAD = Claim("loads the next rows while it works (LDGSTS)", lambda k: k.wide("LDGSTS") > 0)

# Kernel -> what must hold wherever it is compiled.
CLAIMS: dict[str, list[Claim]] = {
    "layer_norm.forward_kernel": [WIDE],
    "layer_norm.forward_wide_kernel": [WIDE],
    "layer_norm.backward_kernel": [WIDE, AHEAD],
    "layer_norm.backward_wide_kernel": [WIDE],
    "quantized_linear.few_rows_kernel": [WIDE_LOADS],
    "quantized_linear.unpack_kernel": [WIDE],
    "attention.forward.forward_kernel": [MATRIX_UNITS],
    "attention.backward.queries_kernel": [MATRIX_UNITS],
    "attention.backward_keys.keys_kernel": [MATRIX_UNITS],
}

# They may keep in local memory what no loop over tiles needs, as that with which a second attempt begins (tiles.py):
# some instructions of a program, and none of a tile.
SPILLING_APART = (
    "attention.forward.forward_kernel",
    "attention.backward.queries_kernel",
    "attention.backward_keys.keys_kernel",
)

# ---- Compiling


class NoGPU:
    """The part of a Triton driver that compiling needs. The number of its device is the architecture, because Triton
    keeps the target and what it has compiled by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def recorded(arch: int, every_tile: bool) -> Iterator[dict[str, tuple[str, Any]]]:
    """Make launches compile their kernels without running them; yield name and result by hash."""
    kernels: dict[str, tuple[str, Any]] = {}
    compiled_by = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compiled_by(self, *arguments, grid=grid, warmup=True, **options)
        kernels[kernel.hash] = f"{self.fn.__module__.removeprefix('kernels.')}.{self.fn.__name__}", kernel
        return kernel

    def run_each(kernel: str, like: Tensor, key: Any, tiles: Sequence[Any], run: Callable[[Any], Any]) -> Any:
        for tile in tiles if every_tile else tiles[:1]:
            run(tile)
        return tiles[0]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(tuning, "choose_tile", run_each))
        stack.enter_context(mock.patch.object(launch, "_INTERPRETED_CAPABILITY", divmod(arch, 10)))
        stack.enter_context(mock.patch.object(launch, "_INTERPRETED_MULTIPROCESSORS", MULTIPROCESSORS))
        triton.runtime.driver.set_active(NoGPU(arch))
        yield kernels


def compile_case(file: str, index: int, arch: int, every_tile: bool, sass: Path | None) -> list[tuple[Kernel, str]]:
    """Return the kernels that a case launches, and their hashes."""
    case, call = CASES[file][index]
    with recorded(arch, every_tile) as kernels:
        call()
    return [(_read(name, case, arch, kernel, sass), kernel.hash) for name, kernel in kernels.values()]


def _read(name: str, case: str, arch: int, kernel: Any, sass: Path | None) -> Kernel:
    file = sass and sass / f"{name} {case} sm_{arch}.sass".replace(" ", "_")
    _, registers, stack, code = read_bytes(kernel.asm["cubin"], file)
    found = Kernel(name, case, arch, kernel.metadata.num_warps, registers, kernel.metadata.shared, stack, code)
    if found.spills and name in SPILLING_APART:
        found = replace(found, spills_apart=spills_apart(kernel.asm["cubin"]))
    return found


# ---- The table


def main(arguments: list[str] | None = None) -> int:
    """Compile the kernels and report; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.building.gpu_compile", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose file or name contains this")
    parser.add_argument("--arch", type=int, choices=SHARED_LIMIT, help=f"one architecture instead of {ARCHITECTURES}")
    parser.add_argument("--every-tile", action="store_true", help="not the default alone, but all that could be chosen")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="leave the disassembled kernels there")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    jobs = [
        (file, index, arch, options.every_tile, options.sass)
        for file, cases in CASES.items()
        for index, (case, _) in enumerate(cases)
        for arch in (ARCHITECTURES if options.arch is None else (options.arch,))
        if options.only in f"{file} {case}"
    ]
    failed: list[str] = []
    kernels: dict[str, Kernel] = {}  # cases share some
    print(HEADER)
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for (file, index, arch, *_), result in [(job, pool.submit(compile_case, *job)) for job in jobs]:
            case = f"{CASES[file][index][0]}, sm_{arch}"
            try:
                found = result.result()
            except Exception as error:  # the others' results are wanted, too
                failed.append(f"{file}, {case}: does not compile: {type(error).__name__}: {error}")
                continue
            for kernel, digest in found:
                if digest not in kernels:
                    kernels[digest] = kernel
                    print(row(kernel), flush=True)
                    failed += [f"{kernel.name}, {case}: {said}" for said in complaints(kernel, CLAIMS)]
    seconds = time.perf_counter() - start
    print(f"{len(kernels)} kernels of {len(jobs)} calls in {seconds:.0f} s, triton {triton.__version__}")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
