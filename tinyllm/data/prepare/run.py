"""Preparing data, from the first look at the inputs to the manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from tinyllm._internal.cpus import usable_cpus
from tinyllm._internal.files import is_full_disk, replacing
from tinyllm._internal.locks import owned
from tinyllm._internal.words import count
from tinyllm.data.prepare.documents import Part
from tinyllm.data.prepare.inputs import Input, Skipped
from tinyllm.data.prepare.manifest import write_manifest
from tinyllm.data.prepare.plan import MEGABYTE, Plan, giving_up, recover
from tinyllm.data.prepare.streams import stream_lines
from tinyllm.data.prepare.workers import Workers, do_unit, make_tokenizer
from tinyllm.data.shards import MANIFEST_FILE, TOKENIZER_FILE, Shards, file_sha256, open_shards
from tinyllm.tokenizer import check_vocab_size
from tinyllm.tokenizer.formats import load_vocabulary

VOCAB_SIZE = 50257  # GPT-2's
TRAINED = ("bpe", "word", "char")

_LEAST_SAMPLE = MEGABYTE  # bytes of a long part that are worth opening it for
_STREAM_EXPANDS = 4  # about: text in a compressed file, for each of its bytes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`.

    Attributes:
        shards: the result.
        seconds: how long tokenizing took in this call.
        num_bytes: bytes of text tokenized in this call.
        resumed: units that an earlier call had finished.
    """

    shards: Shards
    seconds: float
    num_bytes: int
    resumed: int


def prepare(
    data: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "bpe",
    vocab_size: int | None = None,
    text_column: str = "text",
    workers: int | None = None,
    shard_size: float = 64.0,
    val_fraction: float = 0.01,
    tokenizer_sample: float = 64.0,
    skip_bad: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    say: Say = print,
) -> Prepared:
    """Tokenize text into a directory of shards. After a kill, the same call goes on where that one stopped.

    Args:
        data: text files, directories of them, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, and Hugging Face datasets as
            `hf:NAME[:CONFIG][@SPLIT]`. A text file is one document, as are a line and a row.
        out: the directory of the result.
        tokenizer: "bpe", "word" or "char", trained on the data; or a file or directory with a tokenizer, as
            `tinyllm.tokenizer.formats.load_vocabulary` reads it.
        vocab_size: the largest vocabulary to train; None: 50,257, and every character for "char".
        text_column: under which name JSON lines, Parquet files and datasets hold the text.
        workers: processes that tokenize; None: one for each core.
        shard_size: megabytes of text in a shard, about.
        val_fraction: the share of documents for validation, chosen by `seed`. If these come to less than half of
            that share of the tokens, the end of the largest training shard makes up for it.
        tokenizer_sample: megabytes of text that a tokenizer is trained on, from all over the input. Training takes
            about three times as much memory.
        skip_bad: leave out what cannot be read, count it and name it in the manifest.
        seed: chooses the documents for validation.
        overwrite: start anew where other data has been prepared. Finished data are moved aside, and removed when the
            new data are finished; should these fail before a part of them is, they are put back. Other files stay.
        say: called with each line of a report.

    Returns:
        The shards, and how long it took.

    Raises:
        FileNotFoundError: an input does not exist.
        ImportError: a library for some kind of input is missing; says what to install.
        BlockingIOError: another process is preparing data in `out`; names it.
        NotADirectoryError: `out` is a file.
        ValueError: a setting is wrong, an input cannot be read (names it), `out` holds other data (names what
            differs), or the text is too short.
        OSError: a file cannot be read or written; a full disk is named.
        RuntimeError: a worker died; names what it was at.
    """
    _check_settings(workers, shard_size, val_fraction, tokenizer_sample)
    out = Path(out)
    with _naming_full_disk(out), owned(out, "prepared", say):
        settings = {
            **_tokenizer_settings(tokenizer, vocab_size, tokenizer_sample),
            "text_column": text_column,
            "shard_size": shard_size,
            "val_fraction": val_fraction,
            "seed": seed,
        }
        recover(out)
        plan = Plan.make(data, out, settings, skip_bad, overwrite)
        for line in plan.notes:
            say(line)
        if (out / MANIFEST_FILE).is_file():
            say(f"{out} is ready: the same data was prepared there before")
            return Prepared(open_shards(out), 0.0, 0, len(plan.units))
        with giving_up(plan):
            _make_tokenizer(plan, tokenizer, skip_bad, say)
            plan.tokenizer_sha256 = file_sha256(out / TOKENIZER_FILE)
            start = time.perf_counter()
            num_bytes, resumed = _tokenize(plan, workers or usable_cpus(), skip_bad, say)
            seconds = time.perf_counter() - start
            left_out, names = plan.skipped
            write_manifest(out, settings, plan.sidecars(), (left_out + len(plan.damaged), names + plan.damaged))
            plan.clean_up()
            return Prepared(open_shards(out), seconds, num_bytes, resumed)


@contextmanager
def _naming_full_disk(directory: Path) -> Iterator[None]:
    """Say where there is no room, which the system does not, and what to do about it."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise OSError(
                error.errno,
                f"the disk is full: no space left in {directory}; finished shards are kept, so make room and run the "
                f"same command again",
            ) from error
        raise


def _check_settings(workers: int | None, shard_size: float, val_fraction: float, tokenizer_sample: float) -> None:
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    for name, value in (("shard_size", shard_size), ("tokenizer_sample", tokenizer_sample)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; a positive number of megabytes is needed")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be above 0 and below 1")


def _tokenizer_settings(tokenizer: str | os.PathLike[str], vocab_size: int | None, sample: float) -> dict[str, Any]:
    """Return what of the tokenizer decides the result: how it is trained, or what is in its files."""
    if tokenizer in TRAINED:
        check_vocab_size(str(tokenizer), vocab_size)
        size = VOCAB_SIZE if vocab_size is None and tokenizer != "char" else vocab_size
        return {"tokenizer": tokenizer, "vocab_size": size, "tokenizer_sample": sample}
    if vocab_size is not None:
        raise ValueError(f"vocab_size is {vocab_size}, but {tokenizer} has its own; it is for one that is trained")
    loaded = load_vocabulary(tokenizer)
    with TemporaryDirectory() as folder:  # hashed as it will lie beside the shards
        path = Path(folder, TOKENIZER_FILE)
        loaded.save(path)
        return {"tokenizer": "given", "vocab_size": loaded.vocab_size, "tokenizer_sha256": file_sha256(path)}


# The tokenizer


def _make_tokenizer(plan: Plan, tokenizer: str | os.PathLike[str], skip_bad: bool, say: Say) -> None:
    """Write tokenizer.json, unless an earlier call has: the shards that are finished depend on it."""
    path = plan.out / TOKENIZER_FILE
    if path.is_file():
        return
    if tokenizer not in TRAINED:
        load_vocabulary(tokenizer).save(path)
        return
    settings = plan.settings
    size = "" if settings["vocab_size"] is None else f" of up to {settings['vocab_size']:,} tokens"
    sample_size = int(settings["tokenizer_sample"] * MEGABYTE)
    say(f"Training a {tokenizer} tokenizer{size} on up to {settings['tokenizer_sample']:g} MB of the text")
    start = time.perf_counter()
    sample = _samples(plan, sample_size), sample_size, settings["text_column"], skip_bad
    with closing(Workers(1)) as helper:  # whose end gives back the memory that training takes
        vocab_size = helper.run(
            "training the tokenizer", make_tokenizer, tokenizer, settings["vocab_size"], path, *sample
        )
    say(f"{vocab_size:,} tokens learnt in {time.perf_counter() - start:.0f} s")


def _samples(plan: Plan, size: int) -> list[tuple[Part | Input, int]]:
    """Return parts and streams, and how many bytes to take from the beginning of each: `size` in all, spread evenly.

    Each part brings its share of credit; one is opened when there is credit for all of it, or for a megabyte. What of
    it is left over goes to the streams, see `sample_texts`.
    """
    sources: list[tuple[Part | Input, int]] = [(part, part.size) for unit in plan.units for part in unit]
    sources += [(entry, entry.size * _STREAM_EXPANDS) for entry in plan.streams]
    known = sum(weight for _, weight in sources)
    datasets = sum(entry.kind == "hf" for entry in plan.streams)
    # Of a dataset nobody knows the size: it gets what the others leave if that is most of the sample, else a share as
    # if it were as long as the sample.
    unknown = (size - known) // max(1, datasets) if 2 * known <= size else size
    sources = [(source, unknown if source.kind == "hf" else weight) for source, weight in sources]
    share = min(1.0, size / max(1, sum(weight for _, weight in sources)))
    credit = 0.0
    samples = []
    for source, weight in sources:
        credit += share * weight
        if round(credit) >= min(weight, _LEAST_SAMPLE, size):
            quota = min(round(credit), weight)
            samples.append((source, quota))
            credit -= quota
    return samples


# The units


def _tokenize(plan: Plan, workers: int, skip_bad: bool, say: Say) -> tuple[int, int]:
    """Do the units that are not finished; return the bytes of text in them, and how many were finished before."""
    settings = {name: plan.settings[name] for name in ("text_column", "val_fraction", "seed")}
    task = partial(do_unit, directory=plan.out, skip_bad=skip_bad, **settings)
    _remove_leftovers(plan)
    known = None if plan.streams else sum(part.size for unit in plan.units for part in unit)
    total = resumed = 0
    with (
        tqdm(total=known, desc="tokenizing", unit="B", unit_scale=True, mininterval=0.5, smoothing=0.05) as bar,
        closing(Workers(workers, bar.update)) as pool,
    ):

        def wait(most: int) -> None:
            nonlocal total
            for num_bytes, size in pool.results(most):
                total += num_bytes
                if known is not None:  # text is not all that a file holds
                    bar.update(size - num_bytes)

        for number, parts, extra in _units(plan, skip_bad):
            if parts is None:
                resumed += 1
                bar.update(extra.get("size", 0))
                continue
            names = list(dict.fromkeys(part.name or part.path for part in parts))
            what = names[0] if len(names) == 1 else f"{names[0]} and {count(len(names) - 1, 'more file')}"
            wait(workers - 1)  # the next lines of a stream are read before that
            extra["tokenizer_sha256"] = plan.tokenizer_sha256
            pool.submit(f"tokenizing {what} (unit {number})", task, number, parts, plan.sidecar(number), extra)
        wait(0)
    if resumed:
        say(f"{count(resumed, 'unit')} {'was' if resumed == 1 else 'were'} finished before")
    return total, resumed


def _remove_leftovers(plan: Plan) -> None:
    """Remove what a killed call left half-written."""
    for folder, pattern in ((plan.out, ".*.tmp"), (plan.folder, ".*.tmp"), (plan.folder, "lines-*")):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _units(plan: Plan, skip_bad: bool) -> Iterator[tuple[int, list[Part] | None, dict[str, Any]]]:
    """Return number, parts and what its sidecar is to say, of each unit; None for the parts of one that is finished."""
    for number, parts in enumerate(plan.units):
        finished = plan.finished(number) is not None
        yield number, None if finished else parts, {"size": sum(part.size for part in parts)}
    number = len(plan.units)
    for entry in plan.streams:
        for unit in _stream_units(plan, entry, number, skip_bad):
            number = unit[0] + 1
            yield unit


def _stream_units(
    plan: Plan, entry: Input, number: int, skip_bad: bool
) -> Iterator[tuple[int, list[Part] | None, dict[str, Any]]]:
    """Yield the units of a stream, from `number` on: runs of lines, each written to a file for a worker."""
    lines = 0
    while (before := plan.finished(number)) is not None and before["stream"] == entry.path:
        yield number, None, {}
        lines = before["line"]
        number += 1
    skipped = Skipped(skip_bad)
    source = stream_lines(entry, plan.settings["text_column"], skipped, lines)
    size = int(plan.settings["shard_size"] * MEGABYTE)
    while True:
        path = plan.folder / f"lines-{number:05d}.jsonl"
        first, num_bytes = lines, 0
        with replacing(path) as temporary, temporary.open("wb") as file:
            while num_bytes < size and (line := next(source, None)) is not None:
                lines += 1
                num_bytes += len(line)
                file.write(line if line.endswith(b"\n") else line + b"\n")
        stop = path.stat().st_size
        if lines == first:
            path.unlink()
            plan.damaged += skipped.named
            return
        extra = {"stream": entry.path, "line": lines}
        if plan.finished(number) is None:
            yield number, [Part("jsonl", str(path), 0, stop, stop, name=entry.path, line=first)], extra
        else:
            path.unlink()
            yield number, None, {}
        number += 1
