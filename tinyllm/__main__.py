"""The command `tinyllm`, also as `python -m tinyllm`. Nothing is imported here before Ctrl-C has its one line."""

from __future__ import annotations

import sys
from importlib.metadata import version

from tinyllm._internal import interrupt
from tinyllm._internal.extras import missing


def main() -> None:
    """Run the command line; exits with 0, with 2 for bad input, with 130 after Ctrl-C."""
    interrupt.end_at_once()
    if getattr(sys.modules["tinyllm"], "__file__", None) is None:
        line = "Python takes a folder tinyllm here, such as a checkout, for the package; start it in another one"
        sys.exit(f'tinyllm: error: {line}: cd "$HOME"')
    try:
        from tinyllm.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tinyllm"):
            raise
        sys.exit(_without(error.name, sys.argv[1:]))
    app()


def _without(library: str, arguments: list[str]) -> int:
    """Run the commands that need no more than the package itself; return the exit status."""
    if arguments in (["info"], ["info", "--tune"]):
        from tinyllm._info import print_info

        print_info(tune="--tune" in arguments)
        return 0
    if arguments == ["--version"]:
        print(f"tinyllm {version('tinyllm')}")
        return 0
    if arguments == ["doctor"]:
        from tinyllm._doctor import print_diagnosis

        return print_diagnosis()
    print(
        f"tinyllm: error: {missing(library, 'train')}; only `tinyllm info [--tune]` and `tinyllm doctor` run without",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main()
