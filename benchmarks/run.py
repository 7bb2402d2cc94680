"""All benchmarks in one command, from the repository's root:

    python -m benchmarks.run                    everything; updates benchmarks/results/ and the README's tables
    python -m benchmarks.run --only attention   rows whose name contains "attention" (* and ? match anything)
    python -m benchmarks.run --quick            a first impression
    python -m benchmarks.run --render           no measuring: README and chart anew from results/cpu.json

A part, or a quick run, is printed and nothing else; `--out DIR` keeps its JSON and chart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from tinyllm import _extension

FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about a tenth of a second for each provider of a row")
    parser.add_argument("--only", metavar="PATTERN", help="rows whose name contains this")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write cpu.json and cpu.png there, and leave the README"
    )
    parser.add_argument(
        "--render", action="store_true", help="only regenerate README and chart from the stored results"
    )
    options = parser.parse_args(arguments)

    if options.render:
        results = report.load()
        report.draw_chart(results, report.RESULTS / "cpu.png")
        report.update_readme(results)
        return 0
    if not _extension.loaded:
        print(f"There are no compiled kernels to benchmark: {_extension.why_not}", file=sys.stderr)
        return 2

    start = time.perf_counter()
    facts = {**machine.describe(), "quick": options.quick}
    print("Measuring what the machine can do at best ...", flush=True)
    ceilings = machine.ceilings(options.quick)
    print(
        f"  matrix product {ceilings['gemm_gflops']['float32']:.0f} GFLOP/s, copy {ceilings['copy_gb_per_s']:.1f} GB/s"
    )
    print("Median times, each after its result has been verified:", flush=True)
    benchmarks = measure(options.only, options.quick)
    if benchmarks is None:
        print("Nothing was written.", file=sys.stderr)
        return 1
    results = report.make_results(facts, ceilings, benchmarks)

    print(f"\n{report.render_table(results)}\n")
    partial = options.quick or options.only
    out = options.out or (None if partial else report.RESULTS)
    if out:
        report.save(results, out)
        print(f"Written: {out / 'cpu.json'}, {out / 'cpu.png'}")
    if out and not options.out:
        report.update_readme(results)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def measure(only: str | None, quick: bool) -> list[dict[str, Any]] | None:
    """Run the benchmarks in a process of their own; what pytest-benchmark says of them, or None if one failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmarks.json")
        command = [sys.executable, "-m", "pytest", *map(str, sorted(FOLDER.glob("bench_*.py")))]
        command += ["-q", "--no-header", "--show-capture=no", "--override-ini=addopts=", "-p", "no:cacheprovider"]
        command += ["--override-ini=console_output_style=classic", "-W", "ignore::DeprecationWarning"]
        command += [f"--benchmark-json={path}", "--benchmark-quiet", f"--benchmark-storage=file://{folder}"]
        command += ["--seconds=0.1", "--attempts=1"] if quick else []
        command += [f"--rows={only}"] if only else []
        status = subprocess.run(command, cwd=FOLDER.parent, check=False).returncode
        if status == 5:  # pytest's word for "nothing collected"
            print(f"No row's name contains {only!r}.", file=sys.stderr)
        if status != 0:
            return None
        return list(json.loads(path.read_text(encoding="utf-8"))["benchmarks"])


if __name__ == "__main__":
    sys.exit(main())
