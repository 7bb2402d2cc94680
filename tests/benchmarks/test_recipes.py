"""The tables of recipes in docs/training.md are those of the stored runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pictures, recipes
from benchmarks.report import replace_block

STORED = json.loads(recipes.STORED.read_text(encoding="utf-8"))


def test_the_page_shows_what_is_stored() -> None:
    text = recipes.TRAINING.read_text(encoding="utf-8")
    why = "run `python -m benchmarks.recipes`"
    assert replace_block(text, "recipes", recipes.render_block(STORED)) == text, why
    assert f"Source\0{pictures.digest(STORED)}".encode() in recipes.PICTURE.read_bytes(), why


@pytest.mark.parametrize("table", recipes.TABLES)
def test_what_is_stored_is_what_the_recipes_train(table: str) -> None:
    configs = [recipes.config_of(table, recipe) for recipe in recipes.TABLES[table][2]]
    expected = [{name: getattr(config, name) for name in recipes.SHOWN} for config in configs]
    assert [{name: found[name] for name in recipes.SHOWN} for found in STORED["tables"][table]] == expected
    for found, config in zip(STORED["tables"][table], configs, strict=True):
        assert found["at"][-1] == config.steps
        assert len(found["at"]) == len(found["loss"])


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"preset": "tutorial", "tokenizer": "char", "batch_size": 2, "eval_batches": 1, "steps": 20}
    monkeypatch.setitem(recipes.TABLES, "demo", ("made up", small, [{}, {"optimizer": "muon"}]))
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 100, encoding="utf-8")
    monkeypatch.setattr(recipes, "train", lambda c, out, data, **o: whole(c, out, data or text, **o))
    found = recipes.run("demo", tmp_path)
    assert [each["optimizer"] for each in found] == ["adamw", "muon"]
    for each in found:
        assert each["at"] == list(range(2, 21, 2))
        assert each["loss"][-1] < each["loss"][0]
        assert each["step_s"] > 0
    block = recipes.render_block({**STORED, "tables": {"demo": found}})
    assert f"{min(each['loss'][-1] for each in found):.3f}" in block
    recipes.draw({**STORED, "tables": {"demo": found}}, tmp_path / "recipes.png")
    assert (tmp_path / "recipes.png").stat().st_size > 10_000


whole = recipes.train
