"""The parts of the page of `benchmarks.html_report`: tables of rows, sentences about them, and the page's order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from tinyllm._internal.words import count, size

from . import html_charts as charts
from .machine import slug
from .report import RowFacts, factor, is_disturbed, is_measured, is_peer
from .tables import MARK, format_digits, format_time

MOST_NAMED = 4  # comparisons that a peer has won which a sentence names
COLUMNS: tuple[tuple[str, str, Callable[[RowFacts], str]], ...] = (
    ("tokens/s", "tokens_per_s", lambda row: format_digits(row["tokens_per_s"])),
    ("time", "median_s", lambda row: format_time(row["median_s"])),
    ("±", "iqr_s", lambda row: f"{row['iqr_s'] / 2 / row['median_s']:.0%}"),
    ("GPU busy", "gpu_s", lambda row: format_time(row["gpu_s"])),
    ("rate", "rate", lambda row: f"{format_digits(row['rate'])} {row['unit']}"),
    ("of ceiling", "fraction_of_ceiling", lambda row: f"{row['fraction_of_ceiling']:.0%}"),
    ("of bandwidth", "fraction_of_bandwidth", lambda row: f"{row['fraction_of_bandwidth']:.0%}"),
    ("tokens a pass", "tokens_a_pass", lambda row: f"{row['tokens_a_pass']:.2f}"),
    ("memory", "peak_bytes", lambda row: size(row["peak_bytes"])),
    ("load", "load_s", lambda row: format_time(row["load_s"])),
    ("same tokens", "same_tokens", lambda row: f"{row['same_tokens']:.0%}"),
)


# ---- HTML


def from_markdown(text: str) -> str:
    """Return the HTML of paragraphs and of lists with hyphens, with `code` in them."""
    parts = []
    for block in re.split(r"\n\n+", text.strip()):
        code = with_code(block)
        if code.startswith("- "):
            items = "".join(f"<li>{item}</li>" for item in re.split(r"(?m)^- ", code)[1:])
            parts.append(f"<ul>{items}</ul>")
        else:
            parts.append(f"<p>{code}</p>")
    return "\n".join(parts)


def with_code(text: str) -> str:
    """Return the HTML of a text that may have `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _plain(text: str) -> str:
    return escape(text.replace("`", ""))


def number(value: object, text: str) -> str:
    """Return a number as a reader sees it, with the one that is stored beside it."""
    return f'<data value="{escape(str(value))}">{escape(text)}</data>'


def marked_ratio(value: float, peer: str = "") -> str:
    """Return a ratio, marked with what it means."""
    arrow, name = ("▼", "slower") if value < 1 else ("▲", "faster")
    return f'<span class="{name}">{escape(f"{peer} " if peer else "")}{number(value, f"{arrow} {value:.2f}×")}</span>'


def table_of(caption: str, head: Sequence[str], bodies: Iterable[str], of_text: bool = False) -> str:
    """Return a table, which a narrow screen scrolls by itself.

    Args:
        caption: what it shows.
        head: the titles of its columns.
        bodies: the rows, or groups of them, as HTML.
        of_text: whether it has more text than numbers.
    """
    cells = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{_plain(caption)}">'
        f"<table{' class=text' if of_text else ''}>"
        f"<caption>{with_code(caption)}</caption><thead><tr>{cells}</tr></thead>{''.join(bodies)}</table></div>"
    )


def details_of(rows: int, table: str) -> str:
    return f'<details class="numbers" open><summary>Table: {count(rows, "row")}</summary>{table}</details>'


class Page:
    """The parts of the page in the order in which they come, and the figures that its script draws."""

    def __init__(self, looks: Mapping[str, charts.Look]) -> None:
        self.looks = looks
        self.figures: dict[str, charts.Figure] = {}
        self.parts: list[str] = []
        self.contents: list[tuple[int, str, str]] = []

    def heading(self, level: int, title: str) -> None:
        """Add a heading that the contents list. One of level 2 begins a section."""
        name = slug(title) or "part"
        used = {name for _, name, _ in self.contents}
        name = next(each for each in (name, *(f"{name}-{i}" for i in range(2, 1000))) if each not in used)
        if level == 2:
            self.parts += ["</section>"] * bool(self.contents) + [f'<section aria-labelledby="{name}">']
        self.contents.append((level, name, title))
        self.parts.append(f'<h{level} id="{name}">{with_code(title)}</h{level}>')

    def figure(self, figure: charts.Figure, caption: str, note: str = "") -> str:
        """Return the element of a figure; none of a figure without a point."""
        if not figure["data"]:
            return ""
        name = f"figure-{len(self.figures) + 1}"
        self.figures[name] = figure
        names = "".join(f"<li>{symbol}{escape(series)}</li>" for symbol, series in charts.legend(figure))
        return (
            f'<figure><figcaption>{with_code(caption)} {note}</figcaption><ul class="legend">{names}</ul>'
            f'<div class="plot" data-figure="{name}" '
            f'style="height: {figure["layout"]["height"]}px" role="img" '
            f'aria-label="Chart: {_plain(caption)} A table has its numbers."></div></figure>'
        )

    def text(self) -> str:
        """Return the sections."""
        return "\n".join([*self.parts, "</section>"])

    def contents_list(self) -> str:
        """Return the table of contents, two levels deep."""
        lines: list[str] = []
        for level, name, title in self.contents:
            link = f'<li><a href="#{name}">{with_code(title)}</a>'
            if level == 2:
                lines += ["</ul></li>" if lines else "", link, "<ul>"]
            else:
                lines.append(f"{link}</li>")
        return f"<ul>{''.join(lines)}</ul></li></ul>".replace("<ul></ul>", "")


# ---- The numbers of rows


def number_table(rows: Sequence[RowFacts], caption: str) -> str:
    """Return a table of rows: a group of lines for each benchmark, a line for each provider."""
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    best = {(row["benchmark"], row["one_thread"]): row for row in charts.best_of_ours(rows)}
    groups: dict[tuple[str, bool], list[RowFacts]] = {}
    for row in rows:
        groups.setdefault((row["benchmark"], row["one_thread"]), []).append(row)
    head = ["provider", *(["peer / tinyllm"] if best else []), *(title for title, _, _ in columns)]
    bodies = []
    for key, group in groups.items():
        sizes = [f"{letter} {value}" for letter, value in charts.sizes_of(group[0]).items()]
        threads = [count(group[0]["threads"], "thread")] if "threads" in group[0] else []
        facts = f" <small>{' · '.join([*sizes, *threads])}</small>"
        lines = [f'<tr><th scope="rowgroup" colspan="{len(head)}">{escape(key[0])}{facts}</th></tr>']
        for row in group:
            mark = f" {MARK}" if row.get("other_load_cores") and is_disturbed(row) else ""
            name = f'<tr><th scope="row">{escape(label_of(row))}{mark}</th>'
            if not is_measured(row):
                lines.append(f'{name}<td class="text" colspan="{len(head) - 1}">{escape(str(row["failed"]))}</td></tr>')
                continue
            shown = best.get(key, {}) if is_peer(row["provider"]) else {}
            ratio = next((shown["ratios"][name] for name in _names(row) if name in shown.get("ratios", {})), None)
            cell = marked_ratio(ratio) if ratio is not None else ""
            cell = f"<strong>{cell}</strong>" if cell and ratio == factor(shown) else cell
            cells = [f"<td>{cell}</td>"] if best else []
            cells += [
                f"<td>{number(row[field], text(row)) if row.get(field) is not None else ''}</td>"
                for _, field, text in columns
            ]
            lines.append(f"{name}{''.join(cells)}</tr>")
        lines += [
            f'<tr><td class="text" colspan="{len(head)}">peers / {escape(row["provider"])}: {more}</td></tr>'
            for row in group
            if (more := _other_ratios(row, best.get(key, {}), group))
        ]
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return table_of(caption, head, bodies)


def label_of(row: RowFacts) -> str:
    """Return a row's provider, with what tells it apart from the provider's other rows."""
    if "guesses" in row:
        guesses = f"at most {count(row['guesses'], 'guess', 'guesses')}" if row["guesses"] else "no guesses"
        return f"{row['provider']}, {guesses}"
    return str(row["provider"])


def _names(row: RowFacts) -> list[str]:
    """Return the names that a row's provider may have among the ratios of ours."""
    return [row["provider"], f"{row['provider']}, {row.get('weights')}"]


def _other_ratios(row: RowFacts, best: RowFacts, group: Sequence[RowFacts]) -> str:
    """Return the ratios of a row of ours that no peer's line has: to wider weights, or of what is not our best."""
    lines = [name for each in group if row is best for name in _names(each)]
    rest = {name: ratio for name, ratio in row.get("ratios", {}).items() if name not in lines}
    return " · ".join(marked_ratio(ratio, name) for name, ratio in rest.items())


def score(best: Sequence[RowFacts]) -> str:
    """Return in how many of the comparisons that `html_charts.best_of_ours` gives the fastest peer is faster."""
    return f"A peer is faster in {sum(factor(row) < 1 for row in best)} of {count(len(best), 'comparison')}"


def verdict(rows: Iterable[RowFacts]) -> str:
    """Return in how many comparisons of one machine the fastest peer is faster, and in which most."""
    best = charts.best_of_ours(rows)
    if not best:
        return ""
    slower = sorted((row for row in best if factor(row) < 1), key=factor)
    named = [
        f"{escape(row['benchmark'])}{', 1 thread' if row['one_thread'] else ''} {marked_ratio(factor(row))}"
        for row in slower[:MOST_NAMED]
    ]
    more = f", and {len(slower) - MOST_NAMED} more" if len(slower) > MOST_NAMED else ""
    return f"{score(best)}{': ' if named else ''}{', '.join(named)}{more}."
