"""`tinyllm info`: the parts that are built, those that are used, and why not the rest."""

from __future__ import annotations

import os
import platform
import textwrap
from importlib import metadata
from typing import Any

import torch

from tinyllm._internal.allocator import allocator_state
from tinyllm._internal.cpus import cpu_quota, usable_cpus
from tinyllm.ops import _products
from tinyllm.ops.backends import cpp, cuda, hardware, triton
from tinyllm.ops.dispatch import OPERATORS, Operator


def info() -> dict[str, Any]:
    """Return the installation as a dict: versions, instruction sets, threads, GPUs, and for each operator and device
    the backend that serves it, for which dtypes and shapes, on which hardware it is proven, and why each other one does
    not. Where this machine has no CUDA, it is what would serve one that has; CUDA C++ is among it where it was
    built."""
    from tinyllm import __version__

    record = cpp.build_record()
    library = cpp.library
    return {
        "tinyllm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": {
            "loaded": cpp.loaded,
            "why_not": cpp.why_not,
            "repair": cpp.repair(),
            "built_with": {key: record[key] for key in ("compiler", "torch") if key in record},
        },
        "cpu": {
            "built_isas": library.built_isas() if library else [],
            "usable_isas": library.usable_isas() if library else [],
            "chosen_isa": library.cpu_isa() if library else None,
            "TINYLLM_CPU_ISA": os.environ.get("TINYLLM_CPU_ISA"),
            "threads": torch.get_num_threads(),
            "usable_cpus": usable_cpus(),
            "quota": cpu_quota(),
            "products": {**_products.noted(), "source": _products.source()},
            "allocator": allocator_state(),
        },
        "gpu": _gpu(record),
        "operators": {
            operator.name: {device: _described(operator, device) for device in ("cpu", "cuda")}
            for operator in OPERATORS.values()
        },
    }


def _described(operator: Operator, device: str) -> dict[str, Any]:
    """Return what serves an operator on a device type, and on which hardware it has run."""
    row = operator.describe(device)
    for part in filter(None, (row, row["rest"])):
        part["hardware"] = hardware.remark(operator.name, part["backend"]) if device == "cuda" else None
    return row


def _gpu(record: dict[str, str]) -> dict[str, Any]:
    try:
        version: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        version = None
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    old = [cuda.too_old(i) for i in range(len(devices))]
    no_kernels = triton.why_not if cuda.why_not is not None else None
    return {
        "devices": [f"{d.name}, {d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices],
        "cuda_library": {
            "why_not": cuda.why_not,
            "emulated": cuda.emulated,
            "built_with": {key: record[key] for key in ("nvcc", "cuda_arch_list") if key in record},
        },
        "triton": version,
        "why_not": no_kernels or next(filter(None, old), None) or (None if devices else "there is no GPU"),
        "interpreted": triton.interpreted,
    }


def format_info() -> str:
    """Return `info()` as text for a terminal."""
    facts = info()
    extension, cpu, gpu = facts["extension"], facts["cpu"], facts["gpu"]
    lines = [
        f"tinyllm {facts['tinyllm']}, torch {facts['torch']}, Python {facts['python']}, {facts['platform']}",
        "",
    ]
    if extension["loaded"]:
        lines.append(f"compiled extension   loaded ({_built(extension)})")
        lines.append(
            f"instruction sets     built: {', '.join(cpu['built_isas'])}; this processor runs: "
            f"{', '.join(cpu['usable_isas'])}; chosen: {cpu['chosen_isa']}"
        )
        lines += _products_lines(cpu["products"])
        if cpu["TINYLLM_CPU_ISA"]:
            lines.append(f"                     TINYLLM_CPU_ISA={cpu['TINYLLM_CPU_ISA']}")
    else:
        lines.append(f"compiled extension   not loaded: {extension['why_not']}")
        if extension["repair"]:
            lines.append(f"                     to install it: {extension['repair']}")
    lines.append(f"CPU threads          {cpu['threads']} (torch.set_num_threads or OMP_NUM_THREADS)")
    quota = "" if cpu["quota"] is None else f"; the cgroup's quota is {cpu['quota']:g}"
    if cpu["threads"] > cpu["usable_cpus"]:
        lines.append(f"                     more than the CPUs this process may use: {cpu['usable_cpus']}{quota}")
    elif quota:
        lines.append(f"                     CPUs this process may use: {cpu['usable_cpus']}{quota}")
    lines.append(f"allocator            {cpu['allocator']}")
    lines += [f"GPU                  {device}" for device in gpu["devices"]]
    cuda = gpu["cuda_library"]
    if cuda["why_not"] is None:
        lines.append(f"CUDA C++             loaded ({_built(cuda)})")
    else:
        lines.append(f"CUDA C++             {'' if cuda['emulated'] else 'not loaded: '}{cuda['why_not']}")
    lines.append(f"triton               {gpu['triton'] or 'not installed'}{', interpreted' * gpu['interpreted']}")
    absent = f", which are not in use here: {gpu['why_not']}" if gpu["why_not"] else ""
    tables = [("cpu", "CPU tensors"), ("cuda", f"CUDA tensors{absent}")]
    for device, title in tables if absent else reversed(tables):  # what this machine is used for comes first
        lines += ["", title, f"{'operator':<21}{'backend':<11}what it takes"]
        for operator, devices in facts["operators"].items():
            row = devices[device]
            lines.append(_row(operator, row, *_reasons(row["not"], cuda["why_not"])))
            if row["rest"]:
                lines.append(_row("", row["rest"], prefix="the rest: "))
        lines += _hardware({operator: devices[device] for operator, devices in facts["operators"].items()})
        if any(devices[device]["backend"] == "cuda" for devices in facts["operators"].values()):
            lines.append("cuda is CUDA C++; the line below it says what serves what it does not take")
    return "\n".join(lines)


def _products_lines(products: dict[str, Any]) -> list[str]:
    """Return which products PyTorch serves, by the table or by what was measured here."""
    rows = {
        dtype: [f"{rows} rows" for rows, who in choices.items() if who == "torch"]
        for dtype, choices in products["choices"].items()
    }
    served = "; ".join(f"{dtype}: {', '.join(classes)}" for dtype, classes in rows.items() if classes)
    who = f"PyTorch's for {served}; else ours" if served else "ours"
    return [
        f"matrix products      {who}, for {products['machine']}",
        f"                     from {products['source']}",
    ]


def _built(library: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in library["built_with"].items()) or "no build record"


def _row(operator: str, row: dict[str, Any], *remarks: str, prefix: str = "") -> str:
    takes = "any dtype" if row["backend"] == "reference" else ", ".join(row["dtypes"])
    return f"{operator:<21}{row['backend']:<11}{prefix}{'; '.join(filter(None, (takes, row['shapes'], *remarks)))}"


def _hardware(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is to be said of the hardware that kernels have run on, the operators of one remark together."""
    operators: dict[str, dict[str, list[str]]] = {}
    for operator, row in rows.items():
        for part in filter(None, (row, row["rest"])):
            if part["hardware"]:
                operators.setdefault(part["hardware"], {}).setdefault(part["backend"], []).append(operator)
    lines = []
    for remark, backends in operators.items():
        lines.append(f"{remark}:")
        for name, found in backends.items():
            lines += textwrap.wrap(f"{'':<21}{name:<11}{', '.join(found)}", 120, subsequent_indent=" " * 32)
    return lines


def _reasons(why_not: dict[str, str], known: str | None) -> list[str]:
    """Return why other backends do not serve an operator, the backends of one reason together."""
    backends: dict[str, list[str]] = {}
    for name, reason in why_not.items():
        # That others serve other devices goes without saying, and why a library is not there is said above.
        if " tensors" not in reason and reason != known:
            backends.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in backends.items()]


def print_info(tune: bool = False) -> None:
    """Print `format_info()`, with `tune` after it has been measured and written down whose products are faster."""
    _products.check_environment()
    if tune:
        _products.tune()
        print(f"Wrote {_products.tuned_file()}\n")
    print(format_info())
