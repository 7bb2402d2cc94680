"""A training that begins with the weights of a finished one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import TEXT, losses, small
from tinyllm.config.training import TrainConfig
from tinyllm.data.prepare import prepare
from tinyllm.runs.load import load_run
from tinyllm.training import loop
from tinyllm.training.trainer import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = "the dog saw a bird on the mat and the bird sat on the dog .\n" * 60


@pytest.fixture(scope="module", params=[None, 0.5], ids=["weights", "averages"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Make a folder with a run on TEXT, and other.txt."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(OTHER)
    train(small(preset="tiny", num_layers=1, ema=request.param), folder / "run", [folder / "text.txt"], progress=False)
    return folder


def again(base: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.from_run(base / "run", **{"steps": 1, "sample_tokens": 0, "device": "cpu", **changes})


def test_it_begins_with_the_run_s_weights_and_tokenizer(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = train(
        again(base, lr=1e-12),
        tmp_path / "new",
        [base / "other.txt"],
        init_from=base / "run",
        progress=False,
        say=said.append,
    )
    before = load_run(base / "run").model.state_dict()
    for name, value in done.model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-9, rtol=0)
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (base / "run" / "tokenizer.json").read_bytes()
    assert f"Beginning with the weights and the tokenizer of {base / 'run'}; the optimizer is new" in said
    unknown = OTHER.split().count("bird") + OTHER.split().count("saw") + OTHER.split().count("a")
    assert f"{unknown} of them stand for text that the tokenizer of {base / 'run'} does not know" in said


def test_it_goes_on_where_a_kill_left_no_checkpoint(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    text = [base / "other.txt"]
    train(again(base, steps=4), tmp_path / "whole", text, init_from=base / "run", progress=False)
    monkeypatch.setattr("tinyllm.runs.succession._put_back", lambda out: None)  # as a kill does
    monkeypatch.setattr(loop, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(again(base, steps=4), tmp_path / "killed", text, init_from=base / "run", progress=False)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "killed", tmp_path / "copy")
    resume(tmp_path / "killed", progress=False)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    weights = base / "run" / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + b"x")
        with pytest.raises(ValueError, match=r"model.safetensors has changed since the training began"):
            resume(tmp_path / "copy", progress=False)
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=r"the weights that the training in .* begins with have gone"):
            resume(tmp_path / "copy", progress=False)
    finally:
        weights.write_bytes(content)


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    def begin(config: TrainConfig, out: Path = tmp_path / "new", data: Path = base / "other.txt") -> None:
        train(config, out, [data], init_from=base / "run", overwrite=True, progress=False)

    with pytest.raises(ValueError, match="has another model than the one to train: num_layers is 1, not 2"):
        begin(small(preset="tiny", num_layers=2))
    with pytest.raises(ValueError, match=r"num_layers is 2, but the training in .*run has 1"):
        again(base, num_layers=2)
    with pytest.raises(ValueError, match="is the folder of the new run, too"):
        begin(again(base), base / "run")
    prepare([base / "other.txt"], tmp_path / "prepared", tokenizer="char", workers=1, say=lambda line: None)
    with pytest.raises(ValueError, match="is not the tokenizer of the shards"):
        begin(again(base), data=tmp_path / "prepared")
    assert not (tmp_path / "new").exists()
    prepare([base / "other.txt"], tmp_path / "p", tokenizer=base / "run", workers=1, say=lambda line: None)
    begin(again(base), data=tmp_path / "p")
    assert load_run(tmp_path / "new").tokenizer.vocab_size == load_run(base / "run").tokenizer.vocab_size
