"""Run the demo, record what it prints and its picture in docs/, and show some lines of it in README.md.

python -m benchmarks.demo
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys

from tinyllm._internal.files import write_text

from .machine import describe
from .report import README, ROOT, machine_line, replace_block

RECORD = ROOT / "docs" / "demo.txt"
BIN = ".venv/bin/"
_SHOWN_TEXT = 3  # lines of what the model wrote that the README shows


def commands() -> list[str]:
    """Return the commands of `make demo`."""
    subprocess.run(["make", ".venv/installed"], cwd=ROOT, check=True)  # so that nothing else is left to do
    planned = subprocess.run(["make", "-n", "demo"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return planned.stdout.splitlines()


def tidy(output: str) -> str:
    """Return what a command has printed, of its progress the last state only."""
    lines = [line.rstrip() for line in re.split(r"[\r\n]", output)]
    bars = [i for i, line in enumerate(lines) if line.startswith("Training ") and "%" in line]
    kept = [line for i, line in enumerate(lines) if i not in bars[:-1]]
    return re.sub(r"\n\n+(?=\n|step |Training )", "\n", "\n".join(kept)).strip("\n")


def excerpt(record: str) -> str:
    """Return the README's lines of a record."""
    machine, *parts = record.split("\n$ ")
    shown = []
    for part in parts:
        command, *lines = part.splitlines()
        if command == "tinyllm info":
            continue
        if command.startswith("tinyllm train"):
            said = [line for line in lines if re.match(r"(Text|Tokens|Model): |Training 100%", line)]
        elif command.startswith("tinyllm generate"):
            text = [line for line in lines[:-1] if line]
            said = [*text[:_SHOWN_TEXT], "...", lines[-1]]
        else:
            said = [line for line in lines if re.match(r"\s+tinyllm's|training,|writing", line)]
        shown.append("\n".join(["$ " + command, *said]))
    return "\n\n".join(["```console\n" + shown[0], *shown[1:]]) + f"\n```\n\n{machine.strip()}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    facts = describe()
    record = [f"On {machine_line(facts)}; {facts['date'][:10]}.\n"]
    for command in commands():
        done = subprocess.run(
            command, shell=True, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        record.append(f"$ {command.removeprefix(BIN)}\n{tidy(done.stdout)}\n")
    write_text(RECORD, "\n".join(record))
    shutil.copyfile(ROOT / "runs" / "demo" / "loss_curve.png", RECORD.with_name("loss_curve.png"))
    write_text(README, replace_block(README.read_text(encoding="utf-8"), "demo", excerpt("\n".join(record))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
