"""Run the long checks of the kernels, but for those whose last run that passed was of the same sources:

    python -m tests.building.campaigns [TARGET ...] [--again]

They take half an hour together: the kernels under the sanitizers, those of other processors in emulators, the machine
code of those for GPUs. One that passes writes a digest of its sources to campaigns.json, to be committed with them.
Where the digest fits, as in continuous integration after such a commit, there is nothing new to find out.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_suffix(".json")
_KERNELS = ("csrc", "setup.py", "constraints.txt", "tests/emulation", "tests/building", "tinyllm/ops")
_CALLS = (*_KERNELS, "tinyllm/check", "tinyllm/reference")
# Each target of the Makefile, and what it compiles, runs or is made of.
TARGETS = {
    "gpu-compile": (*_KERNELS, "kernels"),
    "cpu-sanitize": _CALLS,
    "cuda-sanitize": (*_CALLS, "tests/helpers", "tests/kernels", "tests/ops"),
    "avx512-check": _CALLS,
    "aarch64-check": _CALLS,
}
_OTHERS = ("test_", "abi_", "wheel_", "campaigns")  # files of tests/building that have no part in them


def digest(target: str, root: Path = ROOT) -> str:
    """Return a digest of the names and contents of a target's sources, those that git knows, as they are now."""
    command = ["git", "ls-files", "-z", *TARGETS[target]]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode()
    found = hashlib.sha256()
    for path in sorted(root / name for name in listed.split("\0") if name):
        other = path.parent.name == "building" and path.name.startswith(_OTHERS)
        if path.is_file() and not other:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(root)}\0{content}\0".encode())
    return found.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    summary = (__doc__ or "").split("\n", 1)[0].rstrip(":")
    parser = argparse.ArgumentParser(prog="python -m tests.building.campaigns", description=summary)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all, {', '.join(TARGETS)}")
    parser.add_argument("--again", action="store_true", help="run them, whatever the record says")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"TARGET is {unknown[0]!r}; allowed are {', '.join(TARGETS)}")
    for target in options.targets or TARGETS:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        before = digest(target)
        if record.get(target, {}).get("digest") == before and not options.again:
            print(f"{target}: passed on {record[target]['date']} with these sources", flush=True)
            continue
        if subprocess.run(["make", target], cwd=ROOT).returncode != 0:
            return 1
        if digest(target) != before:
            print(f"{target}: the sources have changed meanwhile; nothing was recorded", file=sys.stderr)
            return 1
        record[target] = {"digest": before, "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{target}: passed, as {RECORD.relative_to(ROOT)} says, which is to be committed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
