"""The tables of writing: a row for each engine and kind of weights, a column for each batch and prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .machine import DISTURBED
from .tables import MARK, format_digits, format_reason, format_time, markdown

READING, WRITING = "reading", "writing"  # keys of `report.SECTIONS`

RowFacts = Mapping[str, Any]

NOTE = """Tokens a second of the whole batch; reading ends when the first new token is there, writing is what follows. A
percentage is that of the read bandwidth: the fewest bytes that must be read for a step (each weight once, and the keys
and values of all tokens so far) over its time. The factor is how many times as long the fastest peer takes whose
weights are as wide or wider. The prompts are random tokens, and the longest ones leave the new ones room in the
context. Keys and values have 32 bits; llama.cpp's, those of transformers with bf16, and ours beside weights in fewer
bits have 16. Memory is the most that was resident beside the libraries' own. "Same tokens" are those that transformers
writes with float32; from the first other one on, a text goes its own way."""

GUESSES = """Tokens a second of GPT-2 124M after a prompt of 512 tokens, without guesses and with as many at most.
Guesses are right as often as a text repeats itself, and random weights write none that does. So the model is computed
as ever, and what it draws is replaced by human-written text: Python's argparse, chapters of its reference, or a page of
argparse once more with a name replaced. "Tokens a pass" are those that a pass over the weights gave, in the mean.
Medians of three rounds, three excerpts each."""


def render(results: Mapping[str, Any]) -> list[str]:
    """Return the lines below the facts of a file of results."""
    lines = []
    for threads, gigabytes in results["generation"]["read_gb_per_s"].items():
        lines.append(f"Read bandwidth with {_threads(int(threads))}: {format_digits(gigabytes)} GB/s.")
    rows = [*results["rows"], *results["one_thread"]]
    for model in dict.fromkeys(row["model"] for row in rows):
        for threads in dict.fromkeys(row["threads"] for row in rows):
            same = [row for row in rows if row["model"] == model and row["threads"] == threads]
            writing, reading = ([row for row in same if row["section"] == name] for name in (WRITING, READING))
            new = writing[0]["new_tokens"]
            lines += ["", f"**{model}, {_threads(threads)}: writing {new} tokens**", "", *_matrix(writing)]
            lines += ["", f"**{model}, {_threads(threads)}: reading the prompt**", "", *_matrix(reading)]
            lines += ["", f"**{model}, {_threads(threads)}: the rest**", "", *_rest(writing)]
    return lines


def progress(rows: Sequence[RowFacts]) -> str:
    """Return the lines that a terminal shows of a case that is done."""
    lines = [f"{rows[0]['model']}, {_threads(rows[0]['threads'])}, {_case(rows[0])}:"]
    for row in (row for row in rows if row["section"] == WRITING):
        reading = next(r for r in rows if r["section"] == READING and _label(r) == _label(row))
        if "failed" in row:
            said = row["failed"]
        else:
            rates = [each["tokens"] / each["median_s"] for each in (reading, row)]
            said = f"reads {rates[0]:>8,.0f} tokens/s, writes {format_digits(rates[1]):>6} tokens/s"
        lines.append(f"  {_label(row):<34} {said}")
    return "\n".join(lines)


def render_guesses(results: Mapping[str, Any]) -> list[str]:
    """Return a table: a line for each text and kind of weights, a column for each number of guesses."""
    rows = results["rows"]
    none = {row["weights"]: row["tokens_per_s"] for row in rows if row["guesses"] == 0}
    numbers = list(dict.fromkeys(row["guesses"] for row in rows if row["guesses"]))
    lines = {(row["text"], row["weights"]): [format_digits(none[row["weights"]])] for row in rows if row["guesses"]}
    for row in (row for row in rows if row["guesses"]):
        rate, factor = row["tokens_per_s"], row["tokens_per_s"] / none[row["weights"]]
        lines[row["text"], row["weights"]].append(
            f"{format_digits(rate)}, {row['tokens_a_pass']:.2f} tokens a pass, **{factor:.2f}x**"
        )
    head = ["", "none", *(f"at most {number}" for number in numbers)]
    return markdown([head, *([f"{text}, {weights}", *cells] for (text, weights), cells in lines.items())])


def _matrix(rows: Sequence[RowFacts]) -> list[str]:
    cases = list(dict.fromkeys(map(_case, rows)))
    cells = {(_label(row), _case(row)): _cell(row) for row in rows}
    labels = dict.fromkeys(map(_label, rows))
    return markdown([["", *cases], *([label, *(cells.get((label, case), "") for case in cases)] for label in labels)])


def _cell(row: RowFacts) -> str:
    """Return rate, spread, fraction of the bandwidth or time, and factor; or why there are none."""
    if "failed" in row:
        return format_reason(row["failed"])
    spread = f" ±{row['iqr_s'] / 2 / row['median_s']:.0%}" if row["rounds"] > 1 else ", once"
    parts = [f"{format_digits(row['tokens_per_s'])}{spread}"]
    if row["section"] == READING:
        parts.append(format_time(row["median_s"]))
    else:
        parts.append(f"{row['fraction_of_bandwidth']:.0%}")
    parts += [f"**{min(row['ratios'].values()):.2f}x**"] if row.get("ratios") else []
    return ", ".join(parts) + (f" {MARK}" if (row["other_load_cores"] or 0.0) >= DISTURBED else "")


def _rest(rows: Sequence[RowFacts]) -> list[str]:
    """Return a line for each provider: load, memory and how many tokens are the same, over all cases."""
    table = [["", "load", "memory, batch 1", "memory, largest batch", "same tokens", "first difference"]]
    largest = max(row["batch"] for row in rows)
    for label in dict.fromkeys(map(_label, rows)):
        measured = [row for row in rows if _label(row) == label and "failed" not in row]
        if not measured:
            continue
        peaks = [[r["peak_bytes"] for r in measured if r["batch"] == size and r["peak_bytes"]] for size in (1, largest)]
        shares = [row["same_tokens"] for row in measured]
        first = next((row for row in measured if row["first_difference"]), None)
        said = f"{_case(first)}: {first['first_difference']}" if first else "none"
        memory = [f"{max(each) / 1e6:,.0f} MB" if each else "" for each in peaks]
        table.append([label, format_time(measured[0]["load_s"]), *memory, f"{sum(shares) / len(shares):.0%}", said])
    return markdown(table)


def _label(row: RowFacts) -> str:
    return f"{row['provider']}, {row['weights']}"


def _case(row: RowFacts) -> str:
    return f"B{row['batch']} T{row['prompt']}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
