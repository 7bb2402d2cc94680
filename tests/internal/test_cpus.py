"""How many CPUs may be used: by affinity and by quota, and the threads that follow from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllm._internal import cpus

V1 = {"proc/self/cgroup": "5:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n1:name=systemd:/\n0::/\n"}


def quota_of(root: Path, files: dict[str, str]) -> float | None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return cpus.cpu_quota(root)


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    at = f"sys/fs/cgroup/{folder}"
    return {f"{at}/cpu.cfs_quota_us": f"{quota}\n", f"{at}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),  # not Linux
        ({"proc/self/cgroup": "0::/\n"}, None),  # the root has no file
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/pod/container\n",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/pod/container/cpu.max": "800000 100000\n",
            },
            2.0,
        ),
        # The name is the one outside the container.
        ({"proc/self/cgroup": "0::/../elsewhere\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "what is this\n"}, None),
        ({"proc/self/cgroup": "0::/a\x85b\u2028:c\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1 0\n"}, None),
        (V1 | v1("cpu", -1), None),
        (V1 | v1("cpu,cpuacct/docker/a", 50_000), 0.5),
        (V1 | v1("cpu", 400_000) | v1("cpu/docker/a", 250_000, 50_000), 4.0),
    ],
)
def test_quota(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert quota_of(tmp_path, files) == quota


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.5, 1), (1.5, 2), (2.0, 2), (99.0, 8)])
def test_usable(quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert cpus.usable_cpus() == expected


def run(code: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity() -> None:
    code = "import os; from tinyllm._internal.cpus import usable_cpus\n"
    code += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable_cpus())"
    assert run(code) == ["1"]


THREADS = """
import os, torch
from tinyllm._internal import cpus
torch.set_num_threads(6)
cpus.usable_cpus = lambda: 3
"""


@pytest.mark.parametrize(("variable", "threads"), [({}, "3"), ({"OMP_NUM_THREADS": "5"}, "6")])
def test_threads_are_limited_unless_the_environment_says_how_many(variable: dict[str, str], threads: str) -> None:
    assert run(THREADS + "cpus.limit_threads(); print(torch.get_num_threads())", **variable) == [threads]


def test_processes_share_the_cpus() -> None:
    shared = "print(torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS'))"
    assert run(f"{THREADS}cpus.share_threads(1); {shared}") == ["3 3"]
    assert run(f"{THREADS}cpus.share_threads(2); {shared}") == ["1 1"]
    assert run(f"{THREADS}cpus.share_threads(9); {shared}") == ["1 1"]
    assert run(f"{THREADS}cpus.share_threads(2); {shared}", OMP_NUM_THREADS="5") == ["6 5"]


@pytest.mark.parametrize("launcher", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_that_a_launcher_has_bound_share_nothing(launcher: str) -> None:
    code = f"{THREADS}os.cpu_count = lambda: 8\ncpus.share_threads(2); print(torch.get_num_threads())"
    assert run(code, **{launcher: "2"}) == ["3"]
    assert run(code.replace("8", "4"), **{launcher: "2"}) == ["1"]  # they may use the same ones
    assert run(code) == ["1"]


def test_info_has_a_note() -> None:
    code = """
import tinyllm._info as info
torch.set_num_threads(6)
info.usable_cpus, info.cpu_quota = (lambda: 3), (lambda: 2.5)
print(info.format_info())
torch.set_num_threads(3)
print(info.format_info())
"""
    lines = [line.strip() for line in run(THREADS + code)]
    assert "more than the CPUs this process may use: 3; the cgroup's quota is 2.5" in lines
    assert "CPUs this process may use: 3; the cgroup's quota is 2.5" in lines
