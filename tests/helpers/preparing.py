"""Texts to prepare, and what came of them, for the tests of `tinyllm prepare`."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tinyllm.data.prepare import Prepared, prepare
from tinyllm.data.shards import MANIFEST_FILE, Shards, Split
from tinyllm.tokenizer import BPETokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "it's",
    "Grüße",
    "42",
    "f(x):",
    "\n",
    "\n\n",
    "    return",
    "日本。\n",
    "🙂",
]


def document(seed: int, words: int = 40) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words))


DOCUMENTS = [document(seed) for seed in range(300)]


def save_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    BPETokenizer.from_texts(DOCUMENTS, 320).save(path)
    return path


def run(data: Any, out: Path, **options: Any) -> Shards:
    return full_run(data, out, **options).shards


def full_run(data: Any, out: Path, **options: Any) -> Prepared:
    given = data if isinstance(data, list) else [data]
    return prepare(given, out, **{"workers": 1, "say": lambda line: None, **options})


def finished(folder: Path, tokenizer: Path) -> Path:
    """Prepare DOCUMENTS in a folder below this one, and return it."""
    return run(as_jsonl(folder), folder / "done", tokenizer=tokenizer).directory


def unfinish(folder: Path, out: Path) -> Path:
    """Copy prepared data to `out` as a `tinyllm prepare` that was killed leaves them."""
    shutil.copytree(folder, out)
    (out / MANIFEST_FILE).unlink()
    return out


def interrupt_before_the_manifest(data: Any, out: Path, **options: Any) -> None:
    """Prepare data, but for the last step, as a kill there does."""
    with (
        patch("tinyllm.data.prepare.run.write_manifest", side_effect=OSError("interrupted before the manifest")),
        pytest.raises(OSError, match="interrupted"),
    ):
        run(data, out, **options)


def ids(shards: Shards, split: Split) -> list[list[int]]:
    return [found.tolist() for found in shards.documents(split)]


def expected(texts: list[str], tokenizer: Path) -> list[list[int]]:
    loaded = load_tokenizer(tokenizer)
    return [[*loaded.encode(text), loaded.end_of_text_id] for text in texts]  # type: ignore[list-item]


def content(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def as_texts(folder: Path) -> Path:
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number:03d}.txt").write_text(text, newline="")
    return folder


def as_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", DOCUMENTS)


def as_gz(folder: Path) -> Path:
    path = folder / "a.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(folder / "b", DOCUMENTS).read_bytes()))
    return path


def as_zst(folder: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    path = folder / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(write_jsonl(folder / "b", DOCUMENTS).read_bytes()))
    return path


def as_parquet(folder: Path) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), folder / "a.parquet", row_group_size=25)
    return folder / "a.parquet"


def as_dataset(folder: Path) -> str:
    pytest.importorskip("datasets")
    write_jsonl(folder / "train.jsonl", DOCUMENTS)
    return f"hf:{folder}@train"


# In a process of its own, without torch, which hides how little memory the rest needs.
LIGHT = """
import json, resource, sys
from tinyllm.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], workers=1, shard_size=float(sys.argv[4]))
own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss is inherited by exec
print(json.dumps([int(own.split()[1]) / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
print("torch" in sys.modules)
"""


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Processes in the background of a shell ignore SIGINT, and so would theirs.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def sidecars(out: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / ".prepare").glob("unit-*.json")}


def files(out: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*-0*.???")}
