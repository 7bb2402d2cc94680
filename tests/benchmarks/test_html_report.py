"""The page in HTML has every stored number, asks no host for anything, and replaces only a page of its own."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import html_charts, html_report, report
from benchmarks.generation_tables import READING, WRITING
from benchmarks.row import COMPILED, CUDA, EAGER, OURS, TRITON
from tinyllm.cli._app import app

from .made_up import FACTS, TIMES, a_norm, a_row, measured, results_of

pytest.importorskip("plotly")
NUMBERS = ("median_s", "rate", "tokens_per_s", "peak_bytes", "gpu_s", "tokens_a_pass")
VOID = {"meta", "br", "link", "img", "input", "hr"}
GPU = {"name": "Loom 9", "multiprocessors": 4, "memory_gib": 8.0, "cuda": "13", "triton": "3", "capability": "9.0"}


class Reader(HTMLParser):
    """Collects what a test asks for, and fails where tags are not balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.values: set[str] = set()
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID | {"polygon", "circle"}:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "action"):
                self.links.append(value or "")
            if (tag, name) == ("data", "value"):
                self.values.add(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("polygon", "circle")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(next(text for text in self.scripts if text.startswith('{"figure-1"')))

    @property
    def text(self) -> str:
        return re.sub(r" (?=[.,])", "", " ".join(" ".join(self.texts).split()))


def generated() -> dict[str, Any]:
    """Results of writing: the peer of int8 weights has float32 ones, and one engine fails."""
    same = {"model": "a <model>", "batch": 1, "prompt": 4, "new_tokens": 8, "threads": 2, "headline": False}
    rows: list[dict[str, Any]] = []
    for section in (READING, WRITING):
        for provider, weights, rate in (
            (OURS, "int8", 40.0),
            ("CTranslate2", "float32", 50.0),
            ("elsewhere", "int8", 0),
        ):
            row = {**same, "benchmark": f"{section}, {weights} weights", "section": section, "provider": provider}
            row |= {"weights": weights, "other_load_cores": 0.9}
            numbers = {"median_s": 1 / rate, "iqr_s": 0.001, "tokens_per_s": rate, "peak_bytes": 2**20} if rate else {}
            rows.append({**row, **(numbers or {"failed": "left out: it </script> hangs"})})
    for row in rows:
        if row["provider"] == OURS:
            row["ratios"] = {"CTranslate2, float32": 0.8123}
    return {**FACTS, "generation": {}, "ceilings": None, "rows": rows, "one_thread": []}


def cpu(time: float = 0.1) -> dict[str, Any]:
    found = [a_norm(shape=f"{n}x{c}") for n, c in ((2, 2), (4, 8))]
    found += [
        a_row(section="length", operation="attention over T", shape=f"B1 T{n} D8", facts_of_shape={"seq_len": n})
        for n in (64, 128, 4096)
    ]
    entries = [measured(row, who, t) for row in found for who, t in {**TIMES, OURS: time}.items()]
    one = [measured(found[0], who, 2 * t) for who, t in TIMES.items()]
    return results_of(*entries, one_thread=one)


def everything() -> dict[str, dict[str, Any]]:
    """Results of every kind, and of one that nobody knows."""
    gpu = [{**measured(a_norm(), who, 0.3), "peak_bytes": 3 << 30, "gpu_s": 0.2} for who in (CUDA, TRITON, "SDPA X")]
    gpu += [{**a_norm().facts(), "provider": EAGER, "other_load_cores": None, "failed": "not | built"}]
    step = [measured(a_row(section="char", shape="8/16/2 B2 T4 V6"), who, 1.5) for who in (OURS, "plain PyTorch")]
    details = {"char": {"seeds": 2, "val_loss": {OURS: [2.125, 2.25], "plain PyTorch": [2.375]}}}
    guesses = [
        {
            "section": "guesses",
            "provider": OURS,
            "weights": "int8",
            "text": text,
            "guesses": number,
            "tokens_per_s": rate,
        }
        for text, number, rate in ((None, 0, 31.5), ("prose", 3, 33.25), ("code", 3, 61.75))
    ]
    optimized = [measured(a_row(section="optimize", shape="B4"), who, t) for who, t in ((OURS, 0.2), ("peer", 0.3))]
    return {
        "cpu": {"abacus": cpu(), "slide-rule": cpu(0.3)},
        "training": {"abacus": {**results_of(*step), "details": details}},
        "generation": {"abacus": generated()},
        "guesses": {"abacus": {**FACTS, "rows": [{**row, "other_load_cores": 0.0} for row in guesses]}},
        "optimize": {"abacus": {**results_of(*optimized), "optimize": True}},
        "gpu": {"loom-9": results_of(*gpu, facts={**FACTS, "gpu": GPU})},
        "knitting": {
            "loom-9": {"rows": [{"benchmark": "a sock", "provider": "needles", "median_s": 7.5, "iqr_s": 0.5}]}
        },
    }


def check_numbers(page: Reader, stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Fail unless the tables have each row's numbers, ratios and reasons."""
    for results in (results for found in stored.values() for results in found.values()):
        for row in [*results["rows"], *(results.get("one_thread") or [])]:
            numbers = [row[name] for name in NUMBERS if row.get(name) is not None] if "failed" not in row else []
            numbers += row.get("ratios", {}).values()
            assert {str(number) for number in numbers} <= page.values
            assert " ".join(row.get("failed", "").split()) in page.text


@pytest.fixture(scope="module")
def page() -> Reader:
    return Reader(html_report.render(everything()))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a place where results of every kind are stored."""
    for kind, found in everything().items():
        for family, results in found.items():
            path = tmp_path / "results" / kind / f"{family}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results), encoding="utf-8")
    for name in ("benchmarks.report", "tinyllm.benchmarks.report"):  # of the repository, and as it is installed
        monkeypatch.setattr(importlib.import_module(name), "RESULTS", tmp_path / "results")
    return tmp_path


# ---- The page


def test_it_asks_no_host_and_its_links_lead_into_it(page: Reader) -> None:
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert "default-src 'none'" in html_report.render({})


def test_every_number_is_in_a_table(page: Reader) -> None:
    check_numbers(page, everything())
    for name in ("Abacus", "c0ffee", "2000-01-01", "Loom 9", "2.125, 2.25", "unknown machine", "a sock", "a <model>"):
        assert name in page.text


def test_every_number_of_the_repository_is_in_a_table() -> None:
    found = html_report.stored_results()
    check_numbers(Reader(html_report.render(found)), found)


def test_it_is_a_document_that_a_machine_can_read(page: Reader) -> None:
    tags = page.tags
    assert [tags.count(tag) for tag in ("header", "nav", "main", "h1", "title", "footer")] == [1] * 6
    assert tags.count("table") == tags.count("caption") == tags.count("thead")
    assert tags.index("h1") < tags.index("h2") < tags.index("h3")


def test_it_says_where_peers_are_faster(page: Reader) -> None:
    assert "A peer is faster in 1 of 1 comparison: reading, int8 weights ▼ 0.81×." in page.text
    assert "A peer is faster in 0 of 3 comparisons." in page.text  # norms on abacus: two rows, and one on one thread
    slower = "a norm backward 2x2 ▼ 0.67×, a norm backward 4x8 ▼ 0.67×"
    assert f"A peer is faster in 2 of 3 comparisons: {slower}." in page.text
    assert "(!)" in page.text


def test_kinds_that_are_not_stored_are_said_to_be_so() -> None:
    stored = everything()
    for kind in ("gpu", "training", "generation"):
        del stored[kind]
    text = Reader(html_report.render(stored)).text
    assert "No results are stored yet in benchmarks/results/gpu." in text
    assert "No stored result has the memory" in text
    assert "No kind of results is stored of more than one machine." not in text
    del stored["cpu"]["abacus"]
    assert "No kind of results is stored of more than one machine." in Reader(html_report.render(stored)).text


# ---- The charts


def test_a_provider_looks_the_same_in_all_charts(page: Reader) -> None:
    looks: dict[str, set[str]] = {}
    for figure in page.figures.values():
        for trace in figure["data"]:
            symbol = trace["marker"]["symbol"].removesuffix("-open")
            looks.setdefault(trace["name"].removesuffix(", 1 thread"), set()).add(
                f"{trace['marker']['color']} {symbol}"
            )
    assert {EAGER, COMPILED, "CTranslate2", "SDPA X", "plain PyTorch"} <= looks.keys()
    assert all(len(found) == 1 for name, found in looks.items() if "guess" not in name)
    assert looks[EAGER] != looks[COMPILED]


def test_looks_of_unknown_providers_differ() -> None:
    looks = html_charts.looks_of(["torch", "torch, chunked", "torch via float32", "Liger", "loom"])
    assert len(set(looks.values())) == len(looks)
    assert len({looks[name].color for name in ("torch", "torch, chunked", "torch via float32")}) == 1


def test_marks_stand_at_the_ratios_on_one_thread_and_on_all() -> None:
    rows = html_report.rows_of(cpu())
    figure = html_charts.dots(html_charts.ratio_points(rows, html_charts.looks_of([])), html_charts.RATIO)
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert set(traces) == {EAGER, COMPILED, f"{EAGER}, 1 thread", f"{COMPILED}, 1 thread"}
    assert traces[EAGER]["x"] == [4.0] * 5
    assert traces[f"{EAGER}, 1 thread"]["y"] == traces[EAGER]["y"][:1]
    assert "0.4 s" in traces[EAGER]["hovertext"][0]
    assert traces[f"{EAGER}, 1 thread"]["marker"]["symbol"].endswith("-open")


def test_rows_that_differ_in_a_size_only_make_a_curve() -> None:
    rows = html_report.rows_of(cpu())
    ((name, letter),) = sweeps = html_charts.sweeps_of(rows)
    assert (name, letter) == ("attention over T forward B1 T… D8 float32", "T")
    figure = html_charts.sweep(sweeps[name, letter], letter, html_charts.looks_of([EAGER, COMPILED]))
    assert figure["layout"]["xaxis"]["ticktext"] == ["64", "128", "4k"]
    assert [trace["x"] for trace in figure["data"]] == [[64, 128, 4096]] * 5  # three rates, two ratios
    assert figure["data"][-1]["y"] == [2.0] * 3


def test_sizes_are_read_from_shapes() -> None:
    shapes = {
        ("embedding", "12x64 V65 D128"): {"T": 64, "C": 128, "V": 65},
        ("layer_norm", "768x128"): {"C": 128},
        ("linear", "1024x768->3072"): {"C": 768},
        ("losses", "1024x50257"): {"V": 50257},
        ("losses", "1024x768x50257"): {"C": 768, "V": 50257},
        ("model", "128/512/4 B12 T64 V65"): {"T": 64, "C": 128, "V": 65},
        ("attention", "B1 H32/8 T4096 D64"): {"T": 4096},
        ("optimizer", "GPT-2, 196 tensors"): {},
        ("unknown", "T4"): {},
    }
    for (section, shape), sizes in shapes.items():
        assert html_charts.sizes_of({"section": section, "shape": shape}) == sizes
    assert html_charts.sizes_of({"section": "model"}) == {}


@pytest.mark.parametrize("values", [[1.0], [0.99, 1.01], [0.2, 154.0], [1e-3, 1e9], [17.0, 18.0]], ids=str)
@pytest.mark.parametrize("axis", [html_charts.RATIO, html_charts.TOKENS], ids=lambda axis: axis.title)
def test_a_phone_has_room_for_the_ticks(values: list[float], axis: html_charts.Axis) -> None:
    points = [html_charts.Point("line", "series", value, html_charts.Look("--text", "circle"), "") for value in values]
    ticks = html_charts.dots(points, axis)["layout"]["xaxis"]["tickvals"]
    assert len(ticks) <= html_charts.MOST_TICKS
    assert 1.0 in ticks or not axis.ratio


# ---- The file and the command


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["tinyllm", "bench", *arguments])
    done = CliRunner().invoke(app, ["bench", *arguments])
    return done.exit_code, done.output


def test_only_a_page_of_ours_is_replaced(house: Path) -> None:
    path = html_report.write_report(house / "out")
    assert path == house / "out" / "index.html"
    first = path.read_text(encoding="utf-8")
    path.write_text(first[:400], encoding="utf-8")
    html_report.write_report(house / "out")
    assert path.read_text(encoding="utf-8") == first
    path.write_text("<p>my page", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"index\.html is there, and tinyllm did not write it"):
        html_report.write_report(house / "out")
    assert path.read_text(encoding="utf-8") == "<p>my page"
    with pytest.raises(NotADirectoryError, match="is a file"):
        html_report.write_report(path)


def test_nothing_is_written_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    with pytest.raises(FileNotFoundError, match="`tinyllm bench` without --report measures"):
        html_report.write_report(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_that_are_not_json_are_named(house: Path) -> None:
    (house / "results" / "cpu" / "torn.json").write_text('{"rows": [', encoding="utf-8")
    with pytest.raises(ValueError, match=r"results.cpu has a file that is not JSON"):
        html_report.write_report(house / "out")


def test_the_command(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run("--report", str(house / "out"), monkeypatch=monkeypatch)
    assert (status, text) == (0, f"Written: {house / 'out' / 'index.html'}\n")


@pytest.mark.parametrize("others", [["--quick"], ["--only", "norm"], ["--out", "there"]], ids=" ".join)
def test_the_command_refuses_options_of_measuring(
    others: list[str], house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = run("--report", str(house / "out"), *others, monkeypatch=monkeypatch)
    assert status == 2
    assert f"--report measures nothing, and goes without {others[0]}" in text
    assert not (house / "out").exists()


def test_the_command_says_which_extra_it_needs(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm._internal.extras.find_spec", lambda name: None)
    status, text = run("--report", str(house / "out"), monkeypatch=monkeypatch)
    assert status == 2
    assert "plotly is not installed" in text
    assert "tinyllm[bench]" in text
