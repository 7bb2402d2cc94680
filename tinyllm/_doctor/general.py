"""Checks that need no torch: of torch itself, other packages, folders and the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from urllib.parse import unquote, urlparse

from tinyllm._doctor.commands import install_torch, sudo
from tinyllm._doctor.facts import Check, Finding, World, least, older, requirements_of, version_of
from tinyllm._internal.installation import direct_url, pip_install

_NOTHING_WORKS = "No model, operator or command works; what needs it was not looked at."


def broken_import(name: str, error: Exception, remedy: str) -> Finding:
    message = " ".join(str(error).split())
    title = f"{name} does not import: {type(error).__name__}: {message}"
    return Finding("wrong", title, _NOTHING_WORKS, remedy)


def check_torch(world: World) -> Iterator[Finding]:
    version = version_of("torch")
    floor = least("torch")
    if version is None and isinstance(world.torch, ImportError):
        yield Finding("wrong", "torch is not installed.", _NOTHING_WORKS, install_torch(world.gpu))
    elif older(version, floor):
        title = f"torch is {version}; tinyllm needs {floor} or later."
        yield Finding("wrong", title, "The compiled kernels need its stable ABI.", install_torch(world.gpu))
    elif isinstance(world.torch, Exception):
        yield broken_import("torch", world.torch, install_torch(world.gpu))


def check_requirements(world: World) -> Iterator[Finding]:
    for name, floor, always in requirements_of("tinyllm"):
        version = version_of(name)
        wanted = f'{pip_install()} "{name}{f">={floor}" if floor else ""}"'
        if name == "torch" or (version is None and not always):
            continue
        if version is None:
            yield Finding("wrong", f"{name} is not installed.", "What imports it fails.", wanted)
        elif older(version, floor):
            title = f"{name} is {version}; tinyllm needs {floor} or later."
            yield Finding("wrong" if always else "advice", title, "What uses it may fail.", wanted)


def _installed_at(distribution: metadata.Distribution) -> Path:
    """Return the folder of the package that a distribution of tinyllm has installed."""
    direct = direct_url(distribution)
    if direct.get("dir_info", {}).get("editable"):
        return Path(unquote(urlparse(direct["url"]).path), "tinyllm")
    return Path(str(distribution.locate_file("tinyllm")))


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").is_file()


def hidden_package(world: World) -> Path | None:
    """Return the installed package that a checkout hides from this process, None where it hides none."""
    if not (world.package.parent / "pyproject.toml").is_file():
        return None
    places = {_installed_at(found).resolve() for found in metadata.distributions(name="tinyllm")}
    return next((place for place in places if place != world.package.resolve() and _is_package(place)), None)


def check_folders(world: World) -> Iterator[Finding]:
    checkout, here = world.package.parent, Path.cwd()
    if (hidden := hidden_package(world)) is not None:
        title = f"The checkout {checkout} hides the installed tinyllm, {hidden}."
        paths = map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
        leave = "unset PYTHONPATH" if checkout.resolve() in (path.resolve() for path in paths) else 'cd "$HOME"'
        lacks = not any((world.package / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
        cost = "It has no compiled kernels of its own." if lacks else "The checkout's code and kernels are used."
        yield Finding("wrong" if lacks else "advice", title, cost, leave)
        return
    inner = here / "tinyllm"
    if _is_package(inner) and inner.resolve() != world.package.resolve():
        title = f"Python started in {here} imports the tinyllm of this folder, not the installed one."
        yield Finding("advice", title, "It has no compiled kernels but those that were built in it.", 'cd "$HOME"')
    elif (inner / "pyproject.toml").is_file() and not any(_is_package(Path(entry, "tinyllm")) for entry in sys.path):
        title = f"Python started in {here} takes the folder tinyllm, a checkout, for the package."
        yield Finding("wrong", title, "The package then seems to be empty.", 'cd "$HOME"')


def check_huge_pages(world: World) -> Iterator[Finding]:
    huge = world.root / "sys/kernel/mm/transparent_hugepage/enabled"
    if huge.is_file() and "[never]" in huge.read_text(encoding="ascii", errors="replace"):
        command = f"echo madvise | {sudo()}tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding(
            "advice",
            "Transparent huge pages are off.",
            "Weights are read in small pages; a token takes longer.",
            command,
        )


CHECKS: dict[str, Check] = {
    "torch": check_torch,
    "other packages": check_requirements,
    "the folder": check_folders,
    "huge pages": check_huge_pages,
}
