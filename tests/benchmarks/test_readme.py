"""What the README shows is what was printed, and what it tells to type is there."""

import re
from pathlib import Path

from tinyllm.reference import SimpleLLM

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_is_the_one_that_ran():
    """Every line that the README shows of it, in its order."""
    ran = iter((ROOT / "docs" / "demo.txt").read_text(encoding="utf-8").splitlines())
    (block,) = re.findall(r"(?s)<!-- demo:begin -->\n```console\n(.*?)```\n<!-- demo:end -->", README)
    assert all(line in ran for line in block.splitlines() if line.strip() not in ("", "..."))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "bench", "lint"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_and_pictures_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    """The examples that stand alone; the one on loading continues with a model of the reader's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    names = {"article_model": SimpleLLM(6, 16, 32, 2)}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block.replace("50257, 768, 3072, 12", "100, 768, 128, 1").replace("steps=200", "steps=2"), names)
    assert capsys.readouterr().out.startswith("def")
    assert names["normed"].shape == names["total"].shape == (3, 768)
    assert names["hidden"].shape == (3, 3072)
    assert names["loss"].isfinite()
