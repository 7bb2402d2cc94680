"""benchmarks/gpu_check.sh where there is no GPU: it reaches its tables, survives a stage that fails, and calls what it
should on a machine with a GPU, which a python that only says so stands for."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script measures, for minutes")
TESTS = "tests/ops tests/kernels tests/generation/test_cuda_graph.py"  # what it runs
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"


def run(out: Path, python: str, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), str(out), *options],
        cwd=out.parent,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHON": python, "TINYLLM_COMMIT": "c0ffee", **(env or {})},
        check=False,
    )


def write_script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def stages_of(out: Path) -> dict[str, str]:
    """Name -> how it went, without its seconds."""
    stages = json.loads((out / "machine.json").read_text(encoding="utf-8"))["stages"]
    return {name: text.rsplit(", ", 1)[0] for name, text in (stage.split(": ", 1) for stage in stages)}


def test_every_row_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run(tmp_path / "out", sys.executable, "--quick", "--only-bench")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "bench.txt", "machine.json"}
    results = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert results["gpu"] is None
    assert results["rows"]
    assert {row["failed"] for row in results["rows"]} == {"not measured: no GPU"}
    assert not any("median_s" in row for row in results["rows"])
    machine = json.loads((tmp_path / "out" / "machine.json").read_text(encoding="utf-8"))
    assert machine["commit"] == results["commit"] == "c0ffee"
    assert machine["versions"]["torch"]
    assert done.stdout.count("not measured: no GPU") == len(results["rows"])
    assert stages_of(tmp_path / "out").keys() == {"install", "info", "tests", "bench"}
    assert "\noperator             backend" in (tmp_path / "out" / "bench.txt").read_text(encoding="utf-8")


def test_a_stage_that_fails_is_noted(tmp_path: Path) -> None:
    python = write_script(
        tmp_path / "python",
        f'case "$*" in *benchmarks.gpu*) echo a reason; exit 3;; esac\nexec {sys.executable} "$@"\n',
    )
    done = run(tmp_path / "out", python, "--quick", "--only-bench")
    assert done.returncode == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"machine.json", "bench.txt"}
    assert stages_of(tmp_path / "out")["bench"] == "failed with status 3"
    assert "a reason" in (tmp_path / "out" / "bench.txt").read_text(encoding="utf-8")


# ---- With a GPU


class Machine:
    """A python that says it has a GPU and does what it is told in name only, and a toolkit."""

    def __init__(self, folder: Path, nvcc: bool = True, why_no_cuda: str = "", sanitizer: str = 'exec "$@"') -> None:
        self.folder = folder
        toolkit = folder / "toolkit" if nvcc else ""
        if nvcc and sanitizer:
            skip = (
                'case $1 in --tool) echo "watched by $2"; shift 2;; esac; while [ "${1#--}" != "$1" ]; do shift 2; done'
            )
            write_script(folder / "toolkit" / "bin" / "compute-sanitizer", f"{skip}\n{sanitizer}\n")
        self.python = write_script(
            folder / "python",
            f"""for last; do :; done
case "$*" in
*get_device_name*) printf '%s\\n' Loom 9.0a "{toolkit}" ;;
"-m pip install"*) env | grep -E '^(TINYLLM_(EXT|CUDA)|TORCH_CUDA_ARCH_LIST|MAX_JOBS)=' | sort ;;
*print_info*) printf '%s' "{why_no_cuda}" >"$last" && echo what serves what ;;
*"import xdist") exit 1 ;;
*"import pytest_timeout") ;;
"-m pytest"*) echo "tested $* with $TORCHINDUCTOR_COMPILE_THREADS compiling" ;;
*gpu_sanitize) echo "cache off: $PYTORCH_NO_CUDA_MEMORY_CACHING"; exit ${{SANITIZE_STATUS:-0}} ;;
*torch.ones*) ;;
"-m tinyllm.benchmarks.gpu "*) echo "benched $* with ${{TORCHINDUCTOR_COMPILE_THREADS:-all}} compiling" ;;
*) exec {sys.executable} "$@" ;;
esac
""",
        )

    def check(self, *options: str, **env: str) -> tuple[int, dict[str, str], str]:
        """Run the script: return its exit status, its stages and their output."""
        out = self.folder / "out"
        unset = dict.fromkeys(("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"), "")
        done = run(out, self.python, *options, env={**unset, **env})
        said = out / ("bench.txt" if "--only-bench" in options else "tests.txt")
        return done.returncode, stages_of(out), said.read_text(encoding="utf-8")


def test_where_there_is_a_gpu_and_nvcc_both_backends_are_built_tested_and_watched(tmp_path: Path) -> None:
    status, stages, said = Machine(tmp_path).check()
    assert status == 0, said
    names = {"install", "info", "tests-triton", "tests-cuda", "memcheck", "racecheck"}
    assert {name: stages[name] for name in names} == dict.fromkeys(names, "ok")
    assert stages["bench"].startswith("not run: the next call measures")
    assert re.search(r"MAX_JOBS=\d+\nTINYLLM_CUDA=1\nTINYLLM_EXT=1\nTORCH_CUDA_ARCH_LIST=9\.0a\n", said)
    for text in (
        "what serves what",
        f"no:cacheprovider -m triton {TESTS} with 1 compiling",
        f"--timeout=20 --timeout-method=thread -m cuda {TESTS} with 1 compiling",
        "watched by memcheck\ncache off: 1",
    ):
        assert text in said
    assert said.index("== memcheck") < said.index("watched by racecheck")
    assert "benched" not in said


def test_what_a_sanitizer_finds_is_a_failure(tmp_path: Path) -> None:
    status, stages, _ = Machine(tmp_path).check(SANITIZE_STATUS="9")
    assert status == 1
    assert stages["memcheck"] == stages["racecheck"] == "failed with status 9"
    assert stages["tests-triton"] == "ok"


@pytest.mark.parametrize(
    ("sanitizer", "why"),
    [("", "compute-sanitizer is not there"), ("exit 1", "compute-sanitizer cannot watch this GPU")],
)
def test_without_a_sanitizer_that_works_this_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sanitizer: str, why: str
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    status, stages, _ = Machine(tmp_path, sanitizer=sanitizer).check()
    assert status == 0
    assert stages["memcheck"] == stages["racecheck"] == f"not run: {why}"


def test_without_nvcc_there_is_triton(tmp_path: Path) -> None:
    status, stages, said = Machine(tmp_path, nvcc=False, why_no_cuda="it was not built").check()
    assert status == 0
    assert "TINYLLM_CUDA=auto\nTINYLLM_EXT=auto\n" in said
    assert stages["tests-cuda"] == "not run: it was not built"
    assert stages["tests-triton"] == "ok"
    assert "memcheck" not in stages


@pytest.mark.parametrize("nvcc", [True, False])
def test_quick_compiles_where_it_can_and_watches_nothing(tmp_path: Path, nvcc: bool) -> None:
    status, stages, said = Machine(tmp_path, nvcc=nvcc).check("--quick")
    assert status == 0
    assert f"TINYLLM_CUDA={int(nvcc)}\nTINYLLM_EXT={int(nvcc)}\n" in said
    assert stages["memcheck"] == stages["racecheck"] == "not run: --quick"
    assert "--quick" in next(line for line in said.splitlines() if line.startswith("benched"))


def test_a_site_stays_for_another_benchmark(tmp_path: Path) -> None:
    machine, site = Machine(tmp_path), tmp_path / "site"
    assert machine.check("--only-bench", f"--site={site}")[1]["install"].startswith("as the source is")
    (site / "tinyllm" / "left.py").touch()
    _, stages, _ = machine.check("--only-bench", f"--site={site}")
    assert stages["install"] == "as an earlier call left it"
    assert stages["tests"] == "not run"
    assert (site / "tinyllm" / "left.py").exists()


def test_tests_and_benchmarks_are_two_calls_of_nine_minutes(tmp_path: Path) -> None:
    machine, site = Machine(tmp_path), f"--site={tmp_path / 'site'}"
    _, _, said = machine.check(site)
    assert "benched" not in said
    (tmp_path / "site" / "tinyllm").mkdir()
    (tmp_path / "site" / "tinyllm" / "__init__.py").touch()
    status, stages, said = machine.check(site, "--only-bench")
    assert status == 0
    (line,) = (line for line in said.splitlines() if line.startswith("benched"))
    assert line.endswith("with all compiling")
    assert 480 < int(line.split("--seconds ")[1].split()[0]) < 525
    # What the first call has found stays: its stages, and what its tests said.
    assert stages["memcheck"] == stages["tests-cuda"] == stages["bench"] == "ok"
    assert stages["install"] == "as an earlier call left it"
    assert "watched by memcheck" in (tmp_path / "out" / "tests.txt").read_text(encoding="utf-8")
    _, stages, _ = machine.check(site, "--only-bench", TINYLLM_COMMIT="facade")
    assert stages.keys() == {"install", "info", "tests", "bench"}


def test_the_stages_of_a_call_fit_in_its_time() -> None:
    budgets = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if " install_s=" in line]
    assert len(budgets) == 2
    for line in budgets:
        at = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", line)}
        beside = max(at["triton_s"], at["cuda_s"] + at["probe_s"] + 2 * at["sanitizer_s"])
        assert at["install_s"] + at["info_s"] + beside + 15 <= at["total"] < 540


def test_what_compiles_has_longer_and_tiles_for_tuning_come_last(tmp_path: Path) -> None:
    # A plugin that stands for pytest-timeout, which is on GPU machines alone.
    (tmp_path / "standin.py").write_text(
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(object(), 'timeout')\n"
        "    config.addinivalue_line('markers', 'timeout: seconds')\n"
        "def pytest_collection_finish(session):\n"
        "    for item in session.items:\n"
        "        mark = item.get_closest_marker('timeout')\n"
        "        print('limit', item.name, mark and mark.args[0])\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "standin"),
            *("-m", "triton", "tests/ops", "tests/kernels"),
        ],
        cwd=SCRIPT.parents[1], capture_output=True, encoding="utf-8", check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("limit ")]
    limits = [(words[1].partition("[")[0], words[-1]) for words in lines]
    assert {name for name, limit in limits if limit == "120"} >= {"test_compile_fullgraph", "test_opcheck"}
    assert dict(limits)["test_autocast"] == "None"
    tiles = [name == "test_every_tile" for name, _ in limits]
    assert any(tiles)
    assert tiles == sorted(tiles)
