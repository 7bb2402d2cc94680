"""All rows of a CPU in one command: `tinyllm bench`, or, from the repository's root, `python -m benchmarks.cpu`:

    tinyllm bench                    everything; a quarter of an hour
    tinyllm bench --only attention   rows whose name contains "attention" (* and ? match anything)
    tinyllm bench --quick            a first impression, in a few minutes

A whole run writes benchmarks/results/cpu/FAMILY.json, FAMILY being the processor's (amd-avx512, say), and in the
repository the page docs/benchmarks.md and the README's table. A part, or a quick run, is printed and nothing else;
`--out DIR` keeps its JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tinyllm.ops.backends import cpp

from . import machine, report
from .row import OURS, Row, Target
from .rows import rows

BENCH_FILE = Path(__file__).with_name("bench_rows.py")
ATTEMPTS = 3  # so often is a disturbed row measured at most
# glibc gives every large block back to the kernel and page-faults it in again at the next allocation: every provider
# gets an allocator that keeps them. (Our own programs do so themselves: tinyllm.tune_allocator.)
TUNED = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 32))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = report.parser_of("cpu", __doc__)
    parser.add_argument("--only", metavar="PATTERN", help="rows whose name contains this")
    options = parser.parse_args(arguments)
    return bench(options.only, options.quick, options.out)


def bench(only: str | None = None, quick: bool = False, out: Path | None = None) -> int:
    """Measure, print the table, write what there is to write; return the exit status."""
    if not cpp.loaded:
        print(f"There are no compiled kernels to benchmark: {cpp.why_not}", file=sys.stderr)
        return 2
    chosen = choose(only, quick)
    if not chosen:
        print(f"No row's name contains {only!r}.", file=sys.stderr)
        return 1
    for name, value in TUNED.items():
        os.environ.setdefault(name, value)
    start = time.perf_counter()
    facts = {**machine.describe(), "quick": quick, "only": only}
    print("Measuring what the machine can do at best ...", flush=True)
    ceilings = machine.ceilings(quick)
    gemm = ceilings["gemm_gflops"]["float32"]
    print(f"  matrix product {gemm:.0f} GFLOP/s, copy {ceilings['copy_gb_per_s']:.1f} GB/s")
    print("Median times, each after its result has been verified:", end="", flush=True)
    found = measure(chosen, quick)
    one_thread: list[dict[str, Any]] | None = []
    if found is not None and not (quick or only) and facts["machine"]["threads"] > 1:
        print("The headline's rows on one thread:", end="", flush=True)
        one_thread = measure([row for row in chosen if row.headline], threads=1)
    if found is None or one_thread is None:
        print("Nothing was written.", file=sys.stderr)
        return 1
    results = report.make_results(facts, ceilings, found, one_thread)
    print(f"\n{report.render_tables(results)}\n")
    report.publish(results, out)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def choose(only: str | None = None, quick: bool = False) -> list[Row]:
    """Return the rows whose name contains `only`; in a quick run without it, those over the length are left out."""
    pattern = f"*{(only or '').lower()}*"
    return [
        row
        for row in rows(Target(gpu=False))
        if fnmatch(row.name.lower(), pattern) and (only or not quick or row.section != "length")
    ]


def measure(chosen: Sequence[Row], quick: bool = False, threads: int | None = None) -> list[dict[str, Any]] | None:
    """Run rows in a process of their own; return what the results hold of them, or None if one failed.

    While other programs keep the machine busy, threads that wait for each other wait for those programs, and times
    are theirs. So what was disturbed is measured again in the end, unless the run is a quick one; the least disturbed
    attempt counts, whatever its times are.

    Args:
        chosen: the rows.
        quick: measure briefly, and once.
        threads: torch's default where None.
    """
    best: dict[str, dict[str, Any]] = {}
    names = [row.name for row in chosen]
    for _ in range(1 if quick else ATTEMPTS):
        found = _run(names, quick, threads)
        if found is None:
            return None
        for benchmark in found:
            name, load = benchmark["extra_info"]["benchmark"], benchmark["extra_info"]["other_load_cores"]
            if name not in best or (load or 0.0) < (best[name]["extra_info"]["other_load_cores"] or 0.0):
                best[name] = benchmark
        names = [name for name in best if report.is_disturbed(best[name]["extra_info"])]
        if not names:
            break
    return list(_by_provider(best.values()))


def _run(names: Sequence[str], quick: bool, threads: int | None) -> list[dict[str, Any]] | None:
    """Return what pytest-benchmark's JSON says of these rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmarks.json")
        command = [sys.executable, "-m", "pytest", *(f"{BENCH_FILE}::test_row[{name}]" for name in names)]
        command += [f"--rootdir={BENCH_FILE.parents[1]}", "--override-ini=addopts=", "-p", "no:cacheprovider"]
        command += ["-q", "--no-header", "--show-capture=no", "--override-ini=console_output_style=classic"]
        command += ["-W", "ignore::DeprecationWarning", f"--benchmark-max-time={0.1 if quick else 1.0}"]
        command += [f"--benchmark-json={path}", "--benchmark-quiet", f"--benchmark-storage=file://{folder}"]
        environment = dict(os.environ)
        if threads is not None:
            # The compiler writes the number of threads into its code, and would find that of another number again.
            environment |= {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": folder}
        if subprocess.run(command, cwd=BENCH_FILE.parents[1], env=environment, check=False).returncode != 0:
            return None
        return list(json.loads(path.read_text(encoding="utf-8"))["benchmarks"])


def _by_provider(benchmarks: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield what the results hold of each provider: tinyllm, then the peers that had their turns after its rounds."""
    for benchmark in benchmarks:
        facts, stats = dict(benchmark["extra_info"]), benchmark["stats"]
        peers, error = facts.pop("peers"), facts.pop("error")
        ours = {"rounds": stats["rounds"], "median_s": stats["median"], "iqr_s": stats["iqr"]}
        for name, numbers in {OURS: {"error": error, **ours}, **peers}.items():
            yield {**facts, "provider": name, **numbers}


if __name__ == "__main__":
    sys.exit(main())
