"""Make a run folder with all that a training needs, but no checkpoint, from text or prepared data.

Whatever can be known is checked before anything is read, and what is there is not touched until all is made.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tinyllm._internal.words import count, option
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.saved import CONFIG_FILE, save_config
from tinyllm.config.training import TrainConfig, describe
from tinyllm.data.batches import TokenDataset
from tinyllm.data.corpus import Corpus, find_files, standard_library, write_shards
from tinyllm.data.shards import SPLITS, Shards, file_sha256, is_prepared, open_shards, token_dtype
from tinyllm.model import SimpleLLM
from tinyllm.ops import _products
from tinyllm.runs.folder import DATA, MODEL_FILE, OLD_TOKENS, TOKENIZER_FILE, check_out, checkpoints, owns_data
from tinyllm.runs.load import load_run
from tinyllm.runs.succession import new_files, recover
from tinyllm.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tinyllm.training.estimate import check_disk, check_memory

Say = Callable[[str], None]
Paths = Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class Source:
    """Finished weights that a training begins with, and what belongs to them.

    Attributes:
        run: the run folder.
        tokenizer: its tokenizer.
    """

    run: Path
    tokenizer: Tokenizer


def begin(
    config: TrainConfig,
    out: Path,
    data: Paths | None,
    init_from: str | PathLike[str] | None,
    device: torch.device,
    *,
    text_column: str,
    skip_bad: bool,
    overwrite: bool,
    progress: bool,
    say: Say,
) -> None:
    """Make `out`, which this process owns, a run folder. Arguments and errors are those of `training.train`."""
    recover(out)
    prepared = None if data is None or len(data) != 1 or not is_prepared(data[0]) else Path(data[0])
    check_out(out, overwrite=overwrite, writes_data=prepared is None)
    if prepared is not None and (skip_bad or text_column != "text"):
        what = option("skip_bad" if skip_bad else "text_column")
        raise ValueError(f"{what} is for text, and {prepared} is prepared already")
    if prepared is not None and prepared.resolve() == (out / DATA).resolve() and owns_data(out):
        raise ValueError(
            f"{prepared} belongs to the run in {out}, which is to be overwritten; choose another folder "
            f"with {option('out')}"
        )
    if prepared is None and init_from is None:
        _check_packing(config, config.tokenizer == "bpe")
    _check_room(config, 1, out, device, lambda line: None)  # the least: the vocabulary is not known yet
    source = None if init_from is None else _load_source(Path(init_from), config, out, say)
    with new_files(out) as folder:

        def check(tokenizer: Tokenizer) -> None:
            say(f"Tokenizer: {tokenizer.kind}, {count(tokenizer.vocab_size, 'token')}")
            _check_packing(config, tokenizer.end_of_text_id is not None)
            _check_room(config, tokenizer.vocab_size, out, device, say)

        found: Shards | Corpus
        if prepared is not None:
            found = open_shards(prepared)
        elif data is not None:
            found = find_files(data, text_column=text_column, skip_bad=skip_bad)
        else:
            found = standard_library()
        for line in describe(config).splitlines():
            say(line)
        if isinstance(found, Shards):
            tokenizer, description = _describe_shards(found, config, source, check, say)
        else:
            tokenizer, description = _tokenize(config, folder, found, source, check, progress, say)
        tokenizer.save(folder / TOKENIZER_FILE)
        content = {
            "model": config.model_config(tokenizer.vocab_size).to_dict(),
            "training": asdict(config),
            "data": description,
            "versions": _versions(),
            "products": _products.noted(),
        }
        if source is not None:
            weights = source.run.resolve() / MODEL_FILE
            content["init"] = {"weights": str(weights), "sha256": file_sha256(weights)}
        save_config(content, folder)


def _check_packing(config: TrainConfig, ends_documents: bool) -> None:
    if config.packing and not ends_documents:
        raise ValueError("packing is on, but the tokenizer has no end-of-text token to find documents by; bpe has one")


def _check_room(config: TrainConfig, vocab_size: int, out: Path, device: torch.device, say: Say) -> None:
    with torch.device("meta"):
        parameters = SimpleLLM.from_config(config.model_config(vocab_size)).num_parameters()
    check_memory(config, vocab_size, device, say)
    check_disk(config, parameters, out, say)


def _load_source(run: Path, config: TrainConfig, out: Path, say: Say) -> Source:
    """Return what `run` has to begin with; its weights are read, to know that they can be."""
    if run.resolve() == out.resolve():
        raise ValueError(f"init_from {run} is the folder of the new run, too; choose another one with {option('out')}")
    model, tokenizer, _ = load_run(run)
    wanted = config.model_config(tokenizer.vocab_size)
    if wanted != replace(model.config, dropout=wanted.dropout):
        raise ValueError(
            f"init_from {run} has another model than the one to train: {_difference(wanted, model.config)}"
        )
    say(f"Beginning with the weights and the tokenizer of {run}; the optimizer is new")
    return Source(run, tokenizer)


def _difference(wanted: SimpleLLMConfig, found: SimpleLLMConfig) -> str:
    """Return the first setting in which two models differ, in words."""
    mine, other = wanted.to_dict(), found.to_dict()
    name = next(name for name in mine if mine[name] != other.get(name))
    return f"{name} is {other.get(name)!r}, not {mine[name]!r}"


def _tokenize(
    config: TrainConfig,
    folder: Path,
    corpus: Corpus,
    source: Source | None,
    check: Callable[[Tokenizer], None],
    progress: bool,
    say: Say,
) -> tuple[Tokenizer, dict[str, Any]]:
    say(f"Text: {corpus.describe()}")
    for line in corpus.notes:
        say(line)
    if source is None:
        most = "" if config.vocab_size is None else f" of up to {count(config.vocab_size, 'token')}"
        say(f"Training a {config.tokenizer} tokenizer{most}")
        tokenizer = train_tokenizer(config.tokenizer, corpus.texts(config.seed), config.vocab_size)
    else:
        tokenizer = source.tokenizer
    check(tokenizer)
    shards = write_shards(corpus, tokenizer, folder / DATA, seed=config.seed, seq_len=config.seq_len, progress=progress)
    if corpus.left_out.count:
        say(f"Left out {count(corpus.left_out.count, 'input')}, such as {corpus.left_out.named[0]}")
    description = _description(corpus.name, DATA, shards, say)
    if source is not None and (unknown := _count_unknown(shards, tokenizer.unknown_id)):
        say(f"{unknown:,} of them stand for text that the tokenizer of {source.run} does not know")
    return tokenizer, {**description, "files": len(corpus.files)}


def _count_unknown(shards: Shards, unknown_id: int | None) -> int:
    """Return how many tokens stand for text outside the vocabulary."""
    documents = (document for split in SPLITS for document in shards.documents(split))
    return 0 if unknown_id is None else sum(int((document == unknown_id).sum()) for document in documents)


def _describe_shards(
    shards: Shards, config: TrainConfig, source: Source | None, check: Callable[[Tokenizer], None], say: Say
) -> tuple[Tokenizer, dict[str, Any]]:
    path = shards.directory
    if source is not None:
        shards.check_tokenizer(source.run / TOKENIZER_FILE)
    say(f"Data: {path}, {count(len(shards.train), 'shard')} to train on; comparing checksums")
    shards.verify()
    tokenizer = shards.tokenizer()
    check(tokenizer)
    TokenDataset(shards.train, shards.vocab_size, config.seq_len)  # is there a whole window?
    return tokenizer, _description(path.name, str(path.resolve()), shards, say)


def _description(name: str, where: str, shards: Shards, say: Say) -> dict[str, Any]:
    """Return what config.json says of the data; a path that is not absolute is one below the run folder."""
    say(f"Tokens: {shards.num_train_tokens:,} to train on, {shards.num_val_tokens:,} to validate with")
    return {
        "name": name,
        "prepared": where,
        "fingerprint": shards.fingerprint,
        "train_tokens": shards.num_train_tokens,
        "val_tokens": shards.num_val_tokens,
    }


# Going on


def check_saved(saved: dict[str, Any], config: TrainConfig, out: Path, device: torch.device, say: Say) -> None:
    """Make sure that `out` has what its training needs to go on by `config`, before anything is changed.

    Raises:
        ValueError: a file is not what it was when the training began, or not as long; `config` asks for fewer steps
            than are done; the model is another one. The message names the file.
        MemoryError: the model does not fit.
    """
    path = out / CONFIG_FILE
    there = checkpoints(out)
    done = max(there, default=0)
    if config.steps < done:
        raise ValueError(f"steps is {config.steps}, but the training in {out} has done {done:,}")
    tokenizer = load_tokenizer(out / TOKENIZER_FILE)
    wanted = config.model_config(tokenizer.vocab_size)
    try:
        model = SimpleLLMConfig.from_dict(saved["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error
    if model != wanted:
        raise ValueError(f"{path} describes another model than its training has: {_difference(wanted, model)}")
    _check_data(saved, out, tokenizer.vocab_size, say)
    if "init" in saved and not there:
        weights = Path(saved["init"]["weights"])
        if not weights.is_file():
            raise FileNotFoundError(f"the weights that the training in {out} begins with have gone: {weights}")
        _check_sum(weights, saved["init"]["sha256"])
    check_memory(config, tokenizer.vocab_size, device, say)


def _check_data(saved: dict[str, Any], out: Path, vocab_size: int, say: Say) -> None:
    description = saved.get("data")
    if not isinstance(description, dict):
        raise ValueError(f"{out / CONFIG_FILE} does not say what the training learns from")
    if "prepared" in description:
        shards = open_shards(out / description["prepared"])
        say(f"Data: {shards.directory}; comparing checksums")
        shards.verify()
        return
    for split, name in OLD_TOKENS.items():
        path = out / name
        if not path.is_file():
            raise FileNotFoundError(f"{out} has no {path.name}, the tokens that its training learns from")
        tokens = description.get(f"{split}_tokens")
        if type(tokens) is not int:
            raise ValueError(f"{out / CONFIG_FILE} does not say how many tokens {path.name} has")
        expected = tokens * token_dtype(vocab_size).itemsize
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} is damaged: it has {path.stat().st_size:,} bytes, and had {expected:,} when the training began"
            )
        if f"{split}_sha256" in description:  # the oldest versions did not note it
            _check_sum(path, description[f"{split}_sha256"])


def datasets(
    description: dict[str, Any], out: Path, tokenizer: Tokenizer, seq_len: int
) -> tuple[TokenDataset, TokenDataset]:
    """Return the tokens to train on and to validate with, as config.json describes them.

    Raises:
        FileNotFoundError: they have gone.
        ValueError: they are not those that the training began with, or of another tokenizer.
    """
    train: Sequence[Path] = (out / OLD_TOKENS["train"],)
    val: Sequence[Path] = (out / OLD_TOKENS["val"],)
    if "prepared" in description:
        shards = open_shards(out / description["prepared"])
        if shards.fingerprint != description["fingerprint"]:
            raise ValueError(
                f"{shards.directory} holds other data than those that the training in {out} began with: the manifest's "
                f"SHA-256 is {shards.fingerprint}, it was {description['fingerprint']}"
            )
        shards.check_tokenizer(out / TOKENIZER_FILE)
        train, val = shards.train, shards.val
    vocab_size = tokenizer.vocab_size
    # Of a small corpus the validation part may be shorter than a sequence.
    longest = max(path.stat().st_size for path in val) // token_dtype(vocab_size).itemsize - 1
    return TokenDataset(train, vocab_size, seq_len), TokenDataset(val, vocab_size, min(seq_len, max(longest, 1)))


def _check_sum(path: Path, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise ValueError(
            f"{path} has changed since the training began: its SHA-256 is {found}, it was {expected}; put the file "
            f"back, or begin a new training"
        )


def _versions() -> dict[str, str | None]:
    packages = ("tinyllm", "torch", "lightning-fabric", "tokenizers", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from the sources, not installed
        return None
