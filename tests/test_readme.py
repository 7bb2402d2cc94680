"""What the README shows is what was printed, and what it tells to type is there."""

import re
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_is_the_one_that_ran():
    assert report.render_demo() in README


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


def test_python_examples_run():
    """The examples that stand alone; the one on loading continues with a model of the reader's own."""
    names = {"article_model": __import__("tinyllm").reference.SimpleLLM(6, 16, 32, 2)}
    exec("import torch\nq = k = v = torch.randn(1, 2, 8, 16)\nx = residual = torch.randn(3, 768)", names)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("50257, 768, 3072, 12", "100, 768, 128, 1"), names)
    assert names["normed"].shape == names["total"].shape == (3, 768)
    assert names["hidden"].shape == (3, 3072)
    assert names["loss"].isfinite()
