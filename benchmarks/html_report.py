"""Write a page in HTML of what is stored in benchmarks/results: `tinyllm bench --report DIR`.

The page is one file that asks no host for anything: Plotly's script is in it, and its policy forbids requests. Every
number stands in a table, so that nothing is lost without scripts.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinyllm._internal.files import write_text
from tinyllm._internal.words import size

from . import html_charts as charts
from . import report
from .generation_tables import READING, WRITING
from .html_parts import (
    Page,
    details_of,
    from_markdown,
    label_of,
    marked_ratio,
    number,
    number_table,
    score,
    table_of,
    verdict,
    with_code,
)
from .html_style import CSS, SCRIPT
from .page_text import HOW_TO_READ, KIND_NOTES
from .report import KINDS, SECTIONS, Results, RowFacts, factor, is_disturbed, is_measured, machine_line
from .tables import MARK, format_digits, format_time

PAGE = "index.html"
MARKER = '<meta name="generator" content="tinyllm bench --report">'  # by which a page of ours is known
# The charts' script needs styles of its own, and no page may ask a host for anything.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
TITLES = {**SECTIONS, "length": "Causal attention over the length", "guesses": KINDS["guesses"]}
MOST_BESIDE = 20  # rows of a table beside a chart
FACTS = {  # of trainings
    "val_loss": "validation loss",
    "cost_s": "median difference a step, in s",
    "wait_s": "waiting for data, in s a step",
    "wait_fraction": "the same as a fraction of the step",
    "parameters": "weights",
}
LEGEND = """\
A ratio is a peer's time over tinyllm's. Above 1 (▲) tinyllm is faster, below 1 (▼) the peer is. In the charts, a mark
right of the line at 1 is a peer that takes longer than tinyllm. A hollow mark was measured on one thread, a full one on
all. A mark shows its numbers, as they are stored, when a pointer is over it; the tables round them to three digits.
T is the length of a sequence, C the width, V the size of the vocabulary. Rows with (!) were disturbed: other programs
used the processor meanwhile.
"""


# ---- What is stored


def write_report(folder: Path) -> Path:
    """Write DIR/index.html from the stored results; return its path.

    Raises:
        NotADirectoryError: if `folder` is a file.
        FileExistsError: if it has a page that this function did not write.
        FileNotFoundError: if no results are stored.
        ValueError: if a file of results is not JSON.
    """
    page = folder / PAGE
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"report {folder} is a file; a directory is needed")
    if page.exists() and MARKER not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise FileExistsError(f"report {page} is there, and tinyllm did not write it; choose another directory")
    found = stored_results()
    if not found:
        raise FileNotFoundError(
            f"report has nothing to show: no results are stored in {report.RESULTS.absolute()}; "
            "`tinyllm bench` without --report measures this machine and stores them there"
        )
    write_text(page, render(found))
    return page


def stored_results() -> dict[str, dict[str, Results]]:
    """Return the stored results: kind -> family -> results. Kinds that `report.KINDS` does not know come last."""
    folders = sorted(path.name for path in report.RESULTS.glob("*") if path.is_dir())
    found: dict[str, dict[str, Results]] = {}
    for kind in dict.fromkeys([*KINDS, *folders]):
        try:
            found[kind] = {**report.stored(kind)}
        except json.JSONDecodeError as error:
            raise ValueError(f"{report.RESULTS / kind} has a file that is not JSON: {error}") from error
    return {kind: families for kind, families in found.items() if families}


def rows_of(results: Results) -> list[dict[str, Any]]:
    """Return the rows on all threads and on one, each with a name, a section and whether it ran on one thread."""
    found = []
    for key in ("rows", "one_thread"):
        for row in results.get(key) or []:
            text = f"{row['text']}, {row['weights']} weights" if row.get("text") else f"{row.get('weights')} weights"
            whole = {"benchmark": text, "section": "", "provider": "unknown", **row, "one_thread": key == "one_thread"}
            found.append(whole)
    return found


# ---- Sections


def _shown(page: Page, rows: Sequence[RowFacts], what: str) -> list[str]:
    """Return the charts of rows of one section."""
    if any("guesses" in row for row in rows):
        return [page.figure(charts.dots(_guess_points(rows, page.looks), charts.TOKENS), f"Tokens a second, {what}.")]
    if any(row.get("tokens_per_s") for row in rows):
        points = charts.token_points(rows, page.looks)
        return [page.figure(charts.dots(points, charts.TOKENS), f"Tokens a second, {what}.", verdict(rows))]
    found = []
    for (name, letter), each in charts.sweeps_of(rows).items():
        caption = f"{name} over {charts.WORDS_OF_SIZES[letter]}, {what}."
        found.append(page.figure(charts.sweep(each, letter, page.looks), caption))
    points = charts.ratio_points(rows, page.looks)
    caption = f"Peers' times as multiples of tinyllm's, {what}: right of 1 tinyllm is faster."
    return [*found, page.figure(charts.dots(points, charts.RATIO), caption, verdict(rows)) if points else ""]


def _guess_points(rows: Sequence[RowFacts], looks: Mapping[str, charts.Look]) -> list[charts.Point]:
    """Return a point for each text and number of guesses; the speed without guesses is that of every text."""
    numbers = list(dict.fromkeys(row["guesses"] for row in rows))
    points = []
    for row in (row for row in rows if row["guesses"]):
        none = next((r for r in rows if not r["guesses"] and r.get("weights") == row.get("weights")), None)
        for each in (none, row):
            if each is None or (each is none and row["guesses"] != min(filter(None, numbers))):
                continue
            symbol = list(charts.SYMBOLS)[numbers.index(each["guesses"]) % len(charts.SYMBOLS)]
            look = charts.Look(looks[each["provider"]].color, symbol)
            label = label_of(each)
            text = f"<b>{escape(label)}</b><br>{charts.exact(each)}"
            points.append(charts.Point(row["benchmark"], label, each["tokens_per_s"], look, text))
    return points


def _add_kind(page: Page, found: Mapping[str, Results], wanted: Callable[[str], bool] = lambda section: True) -> None:
    """Add what is stored of a kind: a heading for each section, below it the machines beside each other."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for family, results in found.items():
        for row in rows_of(results):
            if wanted(row["section"]):
                key = row["section"], row.get("model", "") if row["section"] in (READING, WRITING) else ""
                groups.setdefault(key, {}).setdefault(family, []).append(row)
    sections = [*TITLES, *(section for section, _ in groups if section not in TITLES)]
    for section, model in sorted(groups, key=lambda key: sections.index(key[0])):
        title = TITLES.get(section, section or "Rows")
        if title != page.contents[-1][-1]:  # a kind whose only section it is
            page.heading(3, f"{title}: {model}" if model else title)
        families = groups[section, model]
        page.parts.append(f'<div class="machines {_layout([len(rows) for rows in families.values()])}">')
        for family, rows in families.items():
            what = f"on {family}"
            notes = _notes(found[family].get("details", {}), section)
            table = number_table(rows, f"{title}{', ' * bool(model)}{model}, {what}")
            figures = "".join(_shown(page, rows, what))
            page.parts.append(
                f"<article><h4>{escape(family)}</h4><div>{figures}{notes}</div>{details_of(len(rows), table)}</article>"
            )
        page.parts.append("</div>")


def _layout(lengths: Sequence[int]) -> str:
    """Return the class of machines beside each other, given the number of rows of each; a table stands beside the chart
    of a single machine unless it is much longer."""
    if len(lengths) > 1:
        return "several"
    return "one" if lengths[0] <= MOST_BESIDE else "long"


def _notes(details: Any, section: str) -> str:
    """Return what a training has stored besides its times: a line for each fact, of each provider where they differ."""
    facts = details.get(section) if isinstance(details, Mapping) else None
    if not isinstance(facts, Mapping):
        return ""
    items = []
    for name, value in facts.items():
        each = value.items() if isinstance(value, Mapping) else [("", value)]
        texts = [f"{provider} {', '.join(map(str, v)) if isinstance(v, list) else v}".strip() for provider, v in each]
        items.append(f"<li>{escape(FACTS.get(name, name.replace('_', ' ')))}: {escape('; '.join(texts))}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _add_machines(page: Page, stored: Mapping[str, Mapping[str, Results]]) -> None:
    page.heading(2, "Machines side by side")
    page.parts.append("<p>The time of the fastest peer as a multiple of tinyllm's, on each machine.</p>")
    several = {kind: found for kind, found in stored.items() if len(found) > 1}
    if not several:
        page.parts.append("<p>No kind of results is stored of more than one machine.</p>")
    for kind, found in several.items():
        page.heading(3, KINDS.get(kind, kind))
        looks = charts.machine_looks(found)
        sections: dict[str, dict[str, dict[str, RowFacts]]] = {}
        for family, results in found.items():
            for row in charts.best_of_ours(rows_of(results)):
                name = f"{row['benchmark']}{', 1 thread' if row['one_thread'] else ''}"
                sections.setdefault(row["section"], {}).setdefault(name, {})[family] = row
        page.parts.append(f'<div class="machines {"several" if len(sections) > 1 else "one"}">')
        for section in sorted(sections, key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES)):
            rows = sections[section]
            points = [
                charts.Point(name, family, factor(row), looks[family], f"<b>{escape(family)}: {factor(row)}×</b>")
                for name, by_family in rows.items()
                if len(by_family) > 1
                for family, row in by_family.items()
            ]
            title = TITLES.get(section, section)
            figure = page.figure(charts.dots(points, charts.RATIO), f"{title}, on each machine.") if points else ""
            lines = [
                f'<tr><th scope="row">{escape(name)}</th>'
                + "".join(f"<td>{_time_and_factor(by_family.get(family))}</td>" for family in found)
                + "</tr>"
                for name, by_family in rows.items()
            ]
            table = table_of(f"{title}: tinyllm's time, and the ratio of the fastest peer's", ["", *found], lines)
            page.parts.append(
                f"<article><h4>{with_code(title)}</h4><div>{figure}</div>{details_of(len(rows), table)}</article>"
            )
        page.parts.append("</div>")


def _time_and_factor(row: RowFacts | None) -> str:
    return f"{number(row['median_s'], format_time(row['median_s']))} {marked_ratio(factor(row))}" if row else ""


def _add_memory(page: Page, stored: Mapping[str, Mapping[str, Results]]) -> None:
    page.heading(2, "Memory")
    some = False
    for kind, found in stored.items():
        for family, results in found.items():
            # Reading a prompt and writing after it are one run, whose peak both have.
            rows = [row for row in rows_of(results) if row.get("peak_bytes") and row["section"] != READING]
            if not rows:
                continue
            some = True
            title = f"{KINDS.get(kind, kind)}: {family}"
            layout = _layout([len(rows)])
            page.heading(3, title)
            head = ["", "provider", "memory", "bytes"]
            lines = [
                f'<tr><th scope="row">{escape(row["benchmark"])}{", 1 thread" if row["one_thread"] else ""}</th>'
                f'<td class="text">{escape(row["provider"])}</td>'
                f"<td>{size(row['peak_bytes'])}</td><td>{number(row['peak_bytes'], str(row['peak_bytes']))}</td></tr>"
                for row in rows
            ]
            figure = page.figure(
                charts.dots(charts.memory_points(rows, page.looks), charts.MEMORY),
                f"The most memory that was in use, on {family}.",
            )
            table = details_of(len(rows), table_of(f"Memory, {title}", head, lines))
            page.parts.append(f'<div class="machines {layout}"><article><div>{figure}</div>{table}</article></div>')
    if not some:
        page.parts.append("<p>No stored result has the memory that it took.</p>")


def _add_stored(page: Page, stored: Mapping[str, Mapping[str, Results]]) -> None:
    """Add what was measured, where, with what and when, and in how many comparisons a peer is faster."""
    page.heading(2, "What is stored")
    lines = []
    for kind, found in stored.items():
        for family, results in found.items():
            rows = rows_of(results)
            best = charts.best_of_ours(rows)
            slower = sum(factor(row) < 1 for row in best)
            disturbed = sum(bool(row.get("other_load_cores")) and is_disturbed(row) for row in rows)
            failed = sum(not is_measured(row) for row in rows)
            notes = [f"{disturbed} disturbed {MARK}"] if disturbed else []
            notes += [f"{failed} without a time"] if failed else []
            notes += ["a quick run: a first impression"] if results.get("quick") else []
            cells = [
                f'<td class="text">{escape(_machine(results))}</td>',
                f'<td class="text"><code>{escape(str(results.get("commit") or "unknown"))}</code></td>',
                f'<td class="text"><time>{escape(str(results.get("date", "unknown"))[:10])}</time></td>',
                f"<td>{len(rows)}</td><td>{len(best) or ''}</td><td>{slower if best else ''}</td>",
                f'<td class="text">{escape("; ".join(notes))}</td>',
            ]
            name = f"{escape(KINDS.get(kind, kind))}: {escape(family)}"
            lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    head = ["", "machine and versions", "commit", "date", "rows", "compared", "peer faster", "notes"]
    caption = "Every file of results. Compared: with a peer; peer faster: the fastest one takes less time than tinyllm."
    page.parts.append(table_of(caption, head, lines, of_text=True))


def _machine(results: Results) -> str:
    """Return the machine, all versions, the ceilings and the allocator's settings, as far as results have them."""
    try:
        parts = [machine_line(results)]
    except (KeyError, TypeError):  # of a kind that is not known here
        parts = ["unknown machine"]
    versions = results.get("versions") or {}
    parts += [", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("torch", "python"))]
    if results.get("ceilings"):
        products = ", ".join(f"{rate:.0f} in {name}" for name, rate in results["ceilings"]["gemm_gflops"].items())
        copy = format_digits(results["ceilings"]["copy_gb_per_s"])
        parts.append(f"ceilings: matrix product {products} GFLOP/s, copy {copy} GB/s")
    allocator = ", ".join(f"{name}={value}" for name, value in (results.get("allocator") or {}).items())
    return "; ".join(part for part in [*parts, allocator] if part)


def render(stored: Mapping[str, Mapping[str, Results]]) -> str:
    """Return the page.

    Args:
        stored: kind -> family -> results.
    """
    files = [rows_of(results) for found in stored.values() for results in found.values()]
    best = [row for rows in files for row in charts.best_of_ours(rows)]
    page = Page(charts.looks_of(row["provider"] for rows in files for row in rows))
    page.heading(2, "How to read it")
    page.parts.append(f'<div class="notes">{from_markdown(LEGEND)}{from_markdown(HOW_TO_READ)}</div>')
    _add_stored(page, stored)
    _add_machines(page, stored)
    parts: list[tuple[str, list[tuple[str, Callable[[str], bool]]]]] = [
        ("Operators", [("cpu", lambda section: section != "model")]),
        ("Whole models and trainings", [("cpu", lambda section: section == "model"), ("training", lambda _: True)]),
        *((KINDS[kind], [(kind, lambda _: True)]) for kind in ("generation", "guesses", "optimize", "gpu")),
        *((kind, [(kind, lambda _: True)]) for kind in stored if kind not in KINDS),
    ]
    for title, kinds in parts:
        if title == KINDS["gpu"]:
            _add_memory(page, stored)
        page.heading(2, title)
        for kind, wanted in kinds:
            note = from_markdown(KIND_NOTES.get(kind, ""))
            page.parts.append(note if kind in stored and note not in page.parts else "")
            if kind in stored:
                _add_kind(page, stored[kind], wanted)
            else:
                page.parts.append(f"<p>No results are stored yet in benchmarks/results/{kind}.</p>")
    script = importlib.import_module("plotly.offline").get_plotlyjs()
    figures = json.dumps(page.figures, separators=(",", ":")).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARKER}
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Benchmarks of tinyllm</title>
<style>{CSS}</style>
<noscript><style>.plot, .legend {{ display: none; }}</style></noscript>
</head>
<body>
<a class="skip" href="#content">To the results</a>
<header>
<h1>Benchmarks of tinyllm</h1>
<p>{score(best)} on all machines. <a href="#what-is-stored">A table</a> counts them by machine, and all tables mark
such ratios ▼.</p>
<p class="muted">Written by <code>tinyllm bench --report</code> from the stored results.</p>
<noscript><p>Charts need a script; the tables have all numbers.</p></noscript>
<button id="tables" type="button" hidden>Open all tables</button>
</header>
<nav aria-label="Contents">{page.contents_list()}</nav>
<main id="content">
{page.text()}
</main>
<footer class="muted">The charts are Plotly's, whose license is MIT.</footer>
<script>{script}</script>
<script type="application/json" id="figures">{figures}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""
