"""All benchmarks in one command: `tinyllm bench`, or, from the repository's root, `python -m benchmarks.run`:

    tinyllm bench                    everything; a quarter of an hour
    tinyllm bench --only attention   rows whose name contains "attention" (* and ? match anything)
    tinyllm bench --quick            a first impression, in a few minutes

A whole run writes JSON and pictures to benchmarks/results/, in the repository also the README's tables. A part, or a
quick run, is printed and nothing else; `--out DIR` keeps its JSON and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tinyllm.ops.backends import cpp

from . import machine, report

FOLDER = Path(__file__).parent
LENGTH_ROWS = FOLDER / "bench_attention_length.py"
# glibc gives every large block back to the kernel and page-faults it in again at the next allocation: every provider
# gets an allocator that keeps them. (Our own programs do so themselves: tinyllm.tune_allocator.)
TUNED = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 32))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about a tenth of a second for each provider of a row")
    parser.add_argument("--only", metavar="PATTERN", help="rows whose name contains this")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write cpu.json and the pictures there, and leave the README"
    )
    parser.add_argument(
        "--render", action="store_true", help="only regenerate README and pictures from the stored results"
    )
    options = parser.parse_args(arguments)
    if options.render:
        results = report.load()
        report.draw_pictures(results, report.RESULTS)
        report.update_readme(results)
        return 0
    return bench(options.only, options.quick, options.out)


def bench(only: str | None = None, quick: bool = False, out: Path | None = None) -> int:
    """Measure, print the table, write what there is to write; returns the exit status."""
    if not cpp.loaded:
        print(f"There are no compiled kernels to benchmark: {cpp.why_not}", file=sys.stderr)
        return 2
    for name, value in TUNED.items():
        os.environ.setdefault(name, value)
    start = time.perf_counter()
    facts = {**machine.describe(), "quick": quick}
    print("Measuring what the machine can do at best ...", flush=True)
    ceilings = machine.ceilings(quick)
    print(
        f"  matrix product {ceilings['gemm_gflops']['float32']:.0f} GFLOP/s, copy {ceilings['copy_gb_per_s']:.1f} GB/s"
    )
    print("Median times, each after its result has been verified:", flush=True)
    benchmarks = measure(only, quick)
    partial = bool(quick or only)
    one_thread: list[dict[str, Any]] | None = []
    if benchmarks is not None and not partial and facts["machine"]["threads"] > 1:
        print("The short table's rows on one thread:", flush=True)
        one_thread = measure(headline=True, threads=1)
    if benchmarks is None or one_thread is None:
        print("Nothing was written.", file=sys.stderr)
        return 1
    results = report.make_results(facts, ceilings, benchmarks, one_thread)

    print(f"\n{report.render_table(results)}\n")
    folder = out or (None if partial else report.RESULTS)
    if folder:
        written = ", ".join(map(str, report.save(results, folder)))
        print(f"Written: {written}")
    if folder and not out and report.README.exists():
        report.update_readme(results)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def measure(
    only: str | None = None, quick: bool = False, headline: bool = False, threads: int | None = None
) -> list[dict[str, Any]] | None:
    """Run the benchmarks in a process of their own; what pytest-benchmark says of them, or None if one failed.

    Args:
        only: rows whose name contains this.
        quick: briefly, and without the lengths.
        headline: rows of the short table.
        threads: torch's default where None.
    """
    files = [path for path in sorted(FOLDER.glob("bench_*.py")) if not (quick and not only and path == LENGTH_ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmarks.json")
        command = [sys.executable, "-m", "pytest", *map(str, files), f"--rootdir={FOLDER.parent}"]
        command += ["-q", "--no-header", "--show-capture=no", "--override-ini=addopts=", "-p", "no:cacheprovider"]
        command += ["--override-ini=console_output_style=classic", "-W", "ignore::DeprecationWarning"]
        command += [f"--benchmark-json={path}", "--benchmark-quiet", f"--benchmark-storage=file://{folder}"]
        command += ["--seconds=0.1", "--attempts=1"] if quick else []
        command += [f"--rows={only}"] if only else []
        command += ["--headline"] if headline else []
        environment = dict(os.environ)
        if threads is not None:
            # The compiler writes the number of threads into its code, and would find that of another number again.
            environment |= {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": folder}
        status = subprocess.run(command, cwd=FOLDER.parent, env=environment, check=False).returncode
        if status == 5:  # pytest's word for "nothing collected"
            print(f"No row's name contains {only!r}.", file=sys.stderr)
        if status != 0:
            return None
        return list(json.loads(path.read_text(encoding="utf-8"))["benchmarks"])


if __name__ == "__main__":
    sys.exit(main())
