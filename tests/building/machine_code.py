"""Reading a GPU kernel's machine code, for the checks that compile without a GPU: registers, local memory, and
instructions."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

ARCHITECTURES = (80, 90, 100)
# What a program may have of shared memory, in bytes; 86, 89 and 120 are the desktops' chips, compiled for on demand.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# CUDA's tools for machine code come with Triton.
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: file and function, "layer_norm.forward_kernel".
        case: which of its instances, or for which call.
        shared, stack: bytes a block, and bytes a thread.
        code: the instructions with their modifiers and operands, in their order.
        barriers: how many of a block's 16 hardware barriers ptxas reserved; None where it was not asked.
        spills_apart: whether it spills outside of the loops over tiles alone, where that is allowed.
    """

    name: str
    case: str
    arch: int
    warps: int
    registers: int
    shared: int
    stack: int
    code: Sequence[str] = field(repr=False)
    barriers: int | None = None
    spills_apart: bool = False

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """Instruction with its modifiers -> number of times it is in the code."""
        return Counter(instruction.split()[0] for instruction in self.code)

    def count(self, *parts: str) -> int:
        """Count the instructions whose first part is parts[0], and that have the others among their modifiers."""
        return sum(
            number
            for opcode, number in self.opcodes.items()
            if opcode.split(".")[0] == parts[0] and set(parts[1:]) <= set(opcode.split("."))
        )

    def wide(self, opcode: str) -> int:
        """Count those that move at least 16 bytes a thread."""
        return self.count(opcode, "128") + self.count(opcode, "256")

    @property
    def spills(self) -> int:
        """Number of instructions that read or write local memory."""
        return self.count("LDL") + self.count("STL")


@dataclass(frozen=True)
class Claim:
    """A requirement on a kernel's machine code, on some architectures and in some cases."""

    says: str
    holds: Callable[[Kernel], bool]
    arches: Sequence[int] = ARCHITECTURES
    cases: str = ""  # only those whose names contain this


# A few narrower loads are nothing: a row's statistics are a number each.
WIDE = Claim(
    "loads and stores 16 bytes at a time",
    lambda k: k.wide("LDG") + k.wide("LDGSTS") > 0 and k.wide("STG") > 0,
)
# Shown in the table where they are in the code.
NOTED: dict[str, Callable[[Kernel], int]] = {
    "LDG.128": lambda k: k.wide("LDG"),
    "LDG narrower": lambda k: k.count("LDG") - k.wide("LDG"),
    "LDGSTS.128": lambda k: k.wide("LDGSTS"),
    "LDGSTS narrower": lambda k: k.count("LDGSTS") - k.wide("LDGSTS"),
    "STG.128": lambda k: k.wide("STG"),
    "STG narrower": lambda k: k.count("STG") - k.wide("STG"),
    "TMA": lambda k: k.count("UTMALDG") + k.count("UTMASTG") + k.count("UTMAREDG"),
    "HMMA": lambda k: k.count("HMMA"),
    "HGMMA": lambda k: k.count("HGMMA"),
    "tcgen05": lambda k: k.count("UTCHMMA") + k.count("UTCQMMA"),
    "atomics": lambda k: k.count("ATOMG") + k.count("RED") + k.count("REDG"),
    "spills": lambda k: k.spills,
}


def complaints(kernel: Kernel, claims: Mapping[str, Sequence[Claim]]) -> list[str]:
    """Return what is wrong with a kernel, nothing if all is well.

    Args:
        kernel: the compiled kernel.
        claims: kernel's name -> requirements that hold wherever it is compiled.
    """
    found = []
    if (kernel.spills or kernel.stack) and not kernel.spills_apart:
        found.append(f"spills to local memory ({kernel.stack} bytes, {kernel.spills} instructions)")
    if kernel.shared > SHARED_LIMIT[kernel.arch]:
        found.append(f"does not start: {kernel.shared} bytes of shared memory, {SHARED_LIMIT[kernel.arch]} are allowed")
    for claim in claims.get(kernel.name, ()):
        if kernel.arch in claim.arches and claim.cases in kernel.case and not claim.holds(kernel):
            found.append(f"does not hold: {claim.says}")
    return found


def read(binary: Path, sass: Path | None = None) -> Iterator[tuple[str, int, int, list[str]]]:
    """Yield the name, registers, bytes of local memory and instructions of each kernel in a file of machine code.

    Args:
        binary: the file.
        sass: a file for the disassembled code.
    """
    usage = output(TOOLS / "cuobjdump", "-res-usage", binary)
    code = output(TOOLS / "nvdisasm", "-c", binary)
    if sass is not None:
        sass.parent.mkdir(parents=True, exist_ok=True)
        sass.write_text(code, encoding="utf-8")
    sections = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\s*\.section|\Z)", code, re.MULTILINE | re.DOTALL))
    for name, numbers in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", numbers))
        # The address, perhaps a predicate, the instruction.
        line = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;{}]*?)\s*[;}]"
        instructions = re.findall(line, sections.get(name, ""))
        assert instructions, f"nothing was read of {name}:\n{code[:500]}"
        yield name, int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), instructions


def read_bytes(binary: bytes, sass: Path | None = None) -> tuple[str, int, int, list[str]]:
    """Return the same of the only kernel in a file's content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        (only,) = read(path, sass)
    return only


def output(*command: str | Path) -> str:
    """Return the output of a command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spills_apart(binary: bytes) -> bool:
    """Return whether no loop over tiles of attention scores reads or writes local memory: then spilling costs some
    instructions of a program, and not of every tile.

    Such a loop multiplies matrices and takes exponentials; a loop over chunks of a head, in it, only multiplies.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        code = output(TOOLS / "nvdisasm", "-c", path)
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes.append(found[1])
            target = re.search(r"`\((\.L_\w+)\)", line)
            if found[1].split(".")[0] == "BRA" and target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))
    over_tiles = [
        (begin, end)
        for begin, end in loops
        if all(any(re.match(used, o) for o in opcodes[begin:end]) for used in ("HMMA|HGMMA|UTC.MMA", r"MUFU\.EX2"))
    ]
    innermost = [
        opcodes[begin:end]
        for begin, end in over_tiles
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in over_tiles)
    ]
    assert innermost, "no loop multiplies and takes exponentials"
    return not any(opcode.split(".")[0] in ("LDL", "STL") for loop in innermost for opcode in loop)


HEADER = f"{'kernel':<40} {'case':<32} {'arch':>6} {'warps':>5} {'regs':>4} {'shared':>7} {'local':>5}  instructions"


def row(kernel: Kernel) -> str:
    """Return a kernel's row of the table below HEADER."""
    noted = ", ".join(f"{number} {name}" for name, count in NOTED.items() if (number := count(kernel)))
    return (
        f"{kernel.name:<40} {kernel.case:<32} {f'sm_{kernel.arch}':>6} {kernel.warps:>5} {kernel.registers:>4} "
        f"{kernel.shared:>7} {kernel.stack:>5}  {noted}"
    )
