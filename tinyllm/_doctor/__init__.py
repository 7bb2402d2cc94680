"""`tinyllm doctor`: what is wrong with an installation, what it costs, and the command that mends it.

Nothing at the top imports torch, because a torch that is missing or does not import is one of the things to find.
"""

from __future__ import annotations

import io
import sys
import textwrap
import warnings
from pathlib import Path

from tinyllm._doctor import general, gpus, kernels
from tinyllm._doctor.commands import install
from tinyllm._doctor.facts import Finding, World, crash, find_gpu, imported

__all__ = ["Finding", "diagnose", "format_findings", "print_diagnosis"]

_WIDTH, _INDENT = 100, len("  Remedy: ")


def diagnose(root: Path = Path("/"), package: Path = Path(__file__).parents[1]) -> list[Finding]:
    """Look at this installation, machine and process, and return what is found, what is wrong before advice.

    If torch does not import, the findings are those that take no torch.

    Args:
        root: of the file system.
        package: the folder of tinyllm's package.
    """
    found: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about what the findings tell
        world = World(root, package, find_gpu(root), imported("torch"))
        for check in general.CHECKS.values():
            found += check(world)
        if not isinstance(world.torch, Exception):
            # In a process of its own first: a library that is damaged may end the one that loads it.
            failure = crash(world) or imported("tinyllm.ops")
            if isinstance(failure, Exception):
                found.append(general.broken_import("tinyllm.ops", failure, install()))
            else:
                for check in (*gpus.CHECKS.values(), *kernels.CHECKS.values()):
                    found += check(world)
    return sorted(found, key=lambda finding: finding.level == "advice")  # which keeps the order otherwise


def format_findings(findings: list[Finding]) -> str:
    """Return findings as text for a terminal."""
    wrong = sum(finding.level == "wrong" for finding in findings)
    if wrong:
        lines = ["One thing is wrong." if wrong == 1 else f"{wrong} things are wrong."]
    else:
        looked_at = ", ".join((*general.CHECKS, *gpus.CHECKS, *kernels.CHECKS))
        lines = textwrap.wrap(f"Nothing is wrong. Looked at: {looked_at}.", _WIDTH)
    for level, title, cost, remedy in findings:
        lines += ["", *_paragraph(level.capitalize(), title), *_paragraph("  Cost", cost)]
        commands = remedy.splitlines()
        lines += [f"{'  Remedy:' if command is commands[0] else '':<{_INDENT}}{command}" for command in commands]
    return "\n".join(lines)


def print_diagnosis() -> int:
    """Print what `diagnose` finds; return the exit status of the command, 1 where something is wrong."""
    findings = diagnose()
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may have letters that the terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    print(format_findings(findings))
    return int(any(finding.level == "wrong" for finding in findings))


def _paragraph(name: str, text: str) -> list[str]:
    # Long words and hyphens are in paths, which are to be copied.
    lines = textwrap.wrap(text, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
    return [f"{f'{name}:' if line is lines[0] else '':<{_INDENT}}{line}" for line in lines]
