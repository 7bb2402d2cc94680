"""From a name to a folder: one on this machine, or a copy of a model on Hugging Face's Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PATTERNS = ("*.safetensors", "*.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_SMALL = ("config.json", "tokenizer.json", "vocab.json", "merges.txt")


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder of that path; where there is none, that of the Hub's model of that name, fetched if need be.

    The Hub is asked through the package huggingface_hub, with its cache and its settings (such as HF_HUB_OFFLINE).

    Raises:
        FileNotFoundError: there is no such folder, and no such model can be had from the Hub: the message says why.
        NotADirectoryError: there is a file of that name.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; the folder with a model's config.json and weights is needed")
    name = os.fspath(path)
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no folder {name}; models of that name on Hugging Face's Hub need: pip install huggingface_hub"
        ) from error
    try:
        for weights in _PATTERNS:  # pickles only where there is nothing better
            found = Path(snapshot_download(name, allow_patterns=[*_SMALL, *weights]))
            if any(found.glob(weights[0])):
                break
    except (OSError, ValueError) as error:  # what the package's own errors are: no such model, no network, offline
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {name}, and no model of that name came from Hugging Face's Hub: {reason}"
        ) from error
    return found
