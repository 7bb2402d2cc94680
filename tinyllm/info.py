"""What is built, what is used, and why not the rest."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from tinyllm import _extension
from tinyllm.allocator import allocator_state
from tinyllm.ops import dispatch


def info() -> dict[str, Any]:
    """The installation as a dict: versions, instruction sets, threads, and for each operator x device the backend that
    serves it and the reason of every one that does not."""
    from tinyllm import __version__

    record = _extension.build_record()
    library = _extension.library
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "tinyllm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": {
            "loaded": _extension.loaded,
            "why_not": _extension.why_not,
            "built_with": {key: record[key] for key in ("compiler", "torch") if key in record},
        },
        "cpu": {
            "built_isas": library.built_isas() if library else [],
            "usable_isas": library.usable_isas() if library else [],
            "chosen_isa": library.cpu_isa() if library else None,
            "TINYLLM_CPU_ISA": os.environ.get("TINYLLM_CPU_ISA"),
            "threads": torch.get_num_threads(),
            "allocator": allocator_state(),
        },
        "operators": {
            operator: {device: _backends(operator, device) for device in devices} for operator in dispatch.OPERATORS
        },
    }


def _backends(operator: str, device: str) -> dict[str, Any]:
    reasons = {name: dispatch.unavailable(name, operator, device) for name in dispatch.BACKENDS}
    chosen = next(name for name in dispatch.BACKENDS if reasons[name] is None)
    return {"backend": chosen, "not": {name: reason for name, reason in reasons.items() if reason}}


def format_info() -> str:
    """`info()` as text for a terminal."""
    facts = info()
    extension, cpu = facts["extension"], facts["cpu"]
    lines = [
        f"tinyllm {facts['tinyllm']}, torch {facts['torch']}, Python {facts['python']}, {facts['platform']}",
        "",
    ]
    if extension["loaded"]:
        built = ", ".join(f"{key} {value}" for key, value in extension["built_with"].items())
        lines.append(f"compiled extension   loaded ({built or 'no build record'})")
        lines.append(
            f"instruction sets     built: {', '.join(cpu['built_isas'])}; this processor runs: "
            f"{', '.join(cpu['usable_isas'])}; chosen: {cpu['chosen_isa']}"
        )
        if cpu["TINYLLM_CPU_ISA"]:
            lines.append(f"                     TINYLLM_CPU_ISA={cpu['TINYLLM_CPU_ISA']}")
    else:
        lines.append(f"compiled extension   not loaded: {extension['why_not']}")
    lines.append(f"CPU threads          {cpu['threads']} (torch.set_num_threads or OMP_NUM_THREADS)")
    lines.append(f"allocator            {cpu['allocator']}")
    lines += ["", f"{'operator':<16} {'device':<7} {'backend':<10} why not the others"]
    for operator, devices in facts["operators"].items():
        for device, row in devices.items():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in row["not"].items())
            lines.append(f"{operator:<16} {device:<7} {row['backend']:<10} {reasons or '-'}")
    return "\n".join(lines)


def print_info() -> None:
    """Prints `format_info()`."""
    print(format_info())
