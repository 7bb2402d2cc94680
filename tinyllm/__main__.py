"""The command `tinyllm`, also as `python -m tinyllm`. Nothing is imported here before Ctrl-C has its one line."""

from __future__ import annotations

from tinyllm._internal import interrupt


def main() -> None:
    """Run the command line; exits with 0, with 2 for bad input, with 130 after Ctrl-C."""
    interrupt.end_at_once()
    from tinyllm.cli import app

    app()


if __name__ == "__main__":
    main()
