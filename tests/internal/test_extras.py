"""Without the extra of training the base works, and what needs more says which extra brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.runs import environment
from tinyllm._internal.extras import check_extra, from_extra

BLOCKED = ("lightning_fabric", "matplotlib", "rich", "tokenizers", "tomli", "tqdm", "typer", "yaml")
START = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv[0] = "tinyllm"
import importlib.util, torch, tinyllm
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {BLOCKED} else find(name, *rest)
"""
WORKS = """
model = tinyllm.SimpleLLM(65, 16, 32, 2, num_heads=2, causal=True)
model.loss(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)).backward()
print(tinyllm.generate(model.eval(), torch.tensor([[1, 2]]), 3).shape)
tinyllm.optimize(torch.nn.Linear(4, 4), "int8")
tinyllm.info()
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that cannot import what the extra brings."""
    command = [sys.executable, "-c", START + code, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_the_base_needs_no_extra() -> None:
    done = run(WORKS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 5])\n"


NEEDS_MORE = {
    "tinyllm.train": "lightning_fabric",
    "tinyllm.resume": "lightning_fabric",
    "import tinyllm.data.corpus": "tqdm",
    "import tinyllm.evaluation": "tqdm",
    "from tinyllm.tokenizer import BPETokenizer; BPETokenizer.from_texts(['a'], 300)": "tokenizers",
    "from tinyllm.config.files import _parse_yaml; _parse_yaml('a: 1')": "yaml",
    "from tinyllm.runs.plot import _figure; _figure('a.png', 1, 1)": "matplotlib",
}


def test_what_needs_more_names_the_extra() -> None:
    code = f"""
for code in {list(NEEDS_MORE)}:
    try:
        exec(code)
    except ModuleNotFoundError as error:
        print(error)
    else:
        print("it works:", code)
"""
    done = run(code)
    expected = [
        f'{library} is not installed; pip install "tinyllm[train]" brings it' for library in NEEDS_MORE.values()
    ]
    assert done.stdout.splitlines() == expected, done.stderr


def test_the_command_line_without_its_libraries() -> None:
    main = "from tinyllm.__main__ import main; main()"
    refused = run(main, "train", "--preset", "tiny")
    assert refused.returncode == 2
    assert refused.stderr.startswith('tinyllm: error: typer is not installed; pip install "tinyllm[train]" brings it')
    shown = run(main, "info")
    assert shown.returncode == 0
    assert shown.stdout.startswith("tinyllm ")
    assert run(main, "doctor").returncode in (0, 1)


def test_errors_of_our_own_modules_stay_as_they_are() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'tinyllm\.nothing'"), from_extra("train"):
        import tinyllm.nothing  # type: ignore[import-not-found]  # noqa: F401
    check_extra("train", "json")
