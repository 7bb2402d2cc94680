"""Commands that install: as this Python's own pip is called, and from where tinyllm came."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

_TREE = Path(__file__).parents[2]  # a checkout, or the folder of all installed packages


def pip_install() -> str:
    """Return the command of a shell that installs for this Python, to which options and names are added."""
    if find_spec("pip") is None and shutil.which("uv") is not None:  # an environment of uv's, which has no pip
        return f"uv pip install --python {shlex.quote(sys.executable)}"
    found = shutil.which("pip")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "pip install"
    return f"{shlex.quote(sys.executable)} -m pip install"


def direct_url(distribution: metadata.Distribution) -> dict[str, Any]:
    """Return where pip had a distribution from, if not from an index (PEP 610); else an empty dict."""
    return dict(json.loads(distribution.read_text("direct_url.json") or "{}"))


def reinstall() -> str:
    """Return the command that builds and installs tinyllm once more, from where it was installed."""
    origin = f"-e {shlex.quote(str(_TREE))}" if (_TREE / "pyproject.toml").exists() else "tinyllm"
    try:
        direct = direct_url(metadata.distribution("tinyllm"))
    except metadata.PackageNotFoundError:
        direct = {}
    if "url" in direct:
        vcs = direct.get("vcs_info")
        if vcs is not None:
            origin = f"{vcs['vcs']}+{direct['url']}@{vcs['commit_id']}"
        elif direct["url"].startswith("file://"):
            origin = shlex.quote(unquote(urlparse(direct["url"]).path))
        else:
            origin = direct["url"]
        if direct.get("dir_info", {}).get("editable"):
            origin = f"-e {origin}"
    # pip would install the wheel in its cache, which has no kernels either, again.
    return f"pip install --no-cache-dir --force-reinstall --no-deps {origin}"
