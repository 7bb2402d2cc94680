"""Tests that everything the README and docs/ tell the reader to type or to look at exists and works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from benchmarks import demo
from benchmarks.report import replace_block
from tests.helpers.runs import ROOT
from tinyllm.cli import app
from tinyllm.model import SimpleLLM as OurModel
from tinyllm.reference import SimpleLLM
from tinyllm.tokenizer import BPETokenizer

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}


def commands(text: str) -> list[str]:
    """Return the commands of a page's console blocks, or of one such block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ") and not line.startswith("$ #")]


TYPED = [
    (page, line) for page, text in TEXTS.items() for line in commands(text) if re.search(r"\btinyllm\s+[a-z-]", line)
]


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_the_demo_is_the_one_that_ran() -> None:
    shown = demo.excerpt(demo.RECORD.read_text(encoding="utf-8"))
    assert replace_block(TEXTS["README.md"], "demo", shown) == TEXTS["README.md"], "run `python -m benchmarks.demo`"


@pytest.mark.parametrize(("page", "line"), TYPED)
def test_commands_are_understood(page: str, line: str) -> None:
    for part in line.split("&&"):
        words = shlex.split(part.split("| ")[-1], comments=True)
        if "tinyllm" not in words:
            continue
        command, *arguments = words[words.index("tinyllm") + 1 :]
        if command.startswith("--"):
            continue
        found = typer.main.get_command(app).get_command(None, command)  # type: ignore[attr-defined]
        assert found is not None, f"{page}: there is no command {command}"
        params = found.make_context(command, arguments).params
        if params.get("devices") and params.get("batch_size") and command == "train":
            parts = (params["micro_batches"] or 1) * params["devices"] * (params["num_nodes"] or 1)
            assert params["batch_size"] % parts == 0


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(
        re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)`", TEXTS[page]) + re.findall(r"\$ make ([a-z-]+)", TEXTS[page])
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", TEXTS)
def test_links_pictures_and_paths_exist(page: str) -> None:
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", TEXTS[page])
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or ((ROOT / page).parent / link).exists(), link
    for path in re.findall(r"`((?:csrc|kernels|tinyllm|tests|benchmarks|examples|docs)/[\w/]+\.\w+)`", TEXTS[page]):
        assert (ROOT / path).exists() or "scale_add" in path, path  # the operator that docs/add-an-operator.md adds


HUB = "openai-community/gpt2"
# Pages whose Python runs in one program, from top to bottom.
PROGRAMS = [
    ["README.md"],
    ["docs/tutorial.md"],
    ["docs/train-and-write.md", "docs/python.md", "docs/generation.md"],
    ["docs/huggingface.md"],
]
# Where the tests of other pages' Python are.
ELSEWHERE = {"docs/add-an-operator.md": "tests/docs/test_add_an_operator.py"}


def test_the_python_of_every_page_runs() -> None:
    pages = {page for page, text in TEXTS.items() if re.search(r"^ *```(python|py)\b", text, re.MULTILINE)}
    assert pages == {page for program in PROGRAMS for page in program} | ELSEWHERE.keys()
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("pages", PROGRAMS, ids=str)
def test_python_examples_run(pages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("def add(a, b):\n    return a + b\n" * 900)
    options = {"causal": True, "norm_first": True, "activation": "gelu_tanh", "max_seq_len": 64}
    small = OurModel(300, 16, 32, 1, num_heads=2, position="learned", tie_embeddings=True, output_bias=False, **options)
    small.save_pretrained(HUB, tokenizer=BPETokenizer.from_texts(["def add(a, b):\n    return a + b\n"] * 9, 300))
    names: dict[str, Any] = {
        "__name__": "__main__",
        "article_model": SimpleLLM(6, 16, 32, 2),
        "transformers": pytest.importorskip("transformers"),
    }
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)]
    assert blocks
    if "docs/huggingface.md" not in pages:  # which is shown as somebody types it, into a program without imports
        exec("import tinyllm", names)
    for block in blocks:
        block = block.replace("50257, 768, 3072, 12", "100, 768, 128, 1")
        exec(block.replace("steps=200", "steps=2").replace("steps=300", "steps=3"), names)
