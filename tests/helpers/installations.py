"""Machines and installations that are made up, for the tests of `tinyllm doctor`."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tinyllm
from tinyllm._doctor import Finding, diagnose, kernels
from tinyllm.ops import _products
from tinyllm.ops.backends import cpp, cuda, triton

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDA_HOME")
REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps /source"
RECORD = {"extension": "built", "reason": "", "cuda": "skipped", "cuda_reason": "TINYLLM_CUDA=0"}


class World:
    """A machine and an installation, which are healthy at first."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.root, self.bin = patch, folder / "root", folder / "bin"
        self.site, self.home = folder / "site", folder / "home"
        self.package = self.site / "tinyllm"
        self.versions = {"tinyllm": tinyllm.__version__, "torch": "2.13.0+cpu", "numpy": "2.0", "triton": "3.9.0"}
        self.requires = {
            "tinyllm": ["torch>=2.10", "numpy", 'typer; extra == "train"', 'triton>=3.6; extra == "gpu"'],
            "torch": ["filelock", 'triton==3.9.0; platform_system == "Linux"'],
        }
        self.record = dict(RECORD)
        self.library: Any = SimpleNamespace(
            usable_isas=lambda: ["avx512", "avx2", "scalar"], cpu_isa=lambda: "avx512", cpu_family=lambda: "amd-bf16"
        )
        for path in (self.root, self.bin, self.package, self.home):
            path.mkdir(parents=True)
        self.program("pip")
        for variable in (*VARIABLES, "PYTHONPATH", "CUDA_PATH", "CXX"):
            patch.delenv(variable, raising=False)
        patch.setenv("PATH", str(self.bin))
        patch.setattr(sys, "executable", str(self.bin / "python"))
        patch.setattr(os, "geteuid", lambda: 1000)
        patch.chdir(self.home)
        patch.setattr(metadata, "version", self._version)
        patch.setattr(metadata, "requires", self.requires.get)
        patch.setattr(metadata, "distributions", lambda **_: [])
        direct = json.dumps({"url": "file:///source", "dir_info": {}})
        patch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: direct))
        patch.setattr(torch.version, "cuda", None)
        patch.setattr(torch.version, "hip", None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(cuda, "emulated", False)
        patch.setattr(triton, "interpreted", False)
        patch.setattr(cpp, "why_not", None)
        patch.setattr(cpp, "loaded", True)
        patch.setattr(cpp, "has", lambda name: True)
        patch.setattr(cpp, "library", self.library)
        patch.setattr(cpp, "build_record", lambda: self.record)
        patch.setattr(_products, "setting", lambda: "auto")
        patch.setattr(_products, "current", dict)
        patch.setattr(torch, "get_num_threads", lambda: 8)
        patch.setattr(kernels, "usable_cpus", lambda: 8)
        patch.setattr(kernels, "allocator_state", lambda: "glibc, tuned")

    def _version(self, name: str) -> str:
        if name not in self.versions:
            raise metadata.PackageNotFoundError(name)
        return self.versions[name]

    def program(self, name: str, says: str = "", folder: Path | None = None) -> None:
        """Put a program on PATH, or into another folder, that prints something."""
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{says}'\n")
        path.chmod(0o755)

    def gpu(self, driver: str | None = "580.65.06", device: bool = True) -> None:
        """Have the system show an NVIDIA GPU and its driver."""
        if driver:
            text = (
                f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\nGCC version: 12\n"
            )
            self.file("proc/driver/nvidia/version", text)
        if device:
            self.file("dev/nvidia0")

    def torch_for(self, version: str, available: bool = False) -> None:
        """Have torch be a build for a version of CUDA."""
        self.patch.setattr(torch.version, "cuda", version)
        self.patch.setattr(torch.cuda, "is_available", lambda: available)
        self.patch.setattr(triton, "why_not", None)
        self.patch.setattr(torch.cuda, "device_count", lambda: 2)
        self.patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "compute_90"])
        self.patch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        self.patch.setattr(cuda, "too_old", lambda index: None)

    def file(self, path: str, text: str = "") -> Path:
        """Write a file of the machine."""
        where = self.root / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)
        return where

    def finds(self) -> list[Finding]:
        return diagnose(self.root, self.package)

    def finds_one(self, level: str) -> Finding:
        (finding,) = self.finds()
        assert finding.level == level
        assert finding.title
        assert finding.cost
        return finding


def raising(error: Exception) -> Any:
    def call() -> None:
        raise error

    return call
