"""Common parts of the commands: the application, how errors are shown, what a program may do to its process."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tinyllm._internal import interrupt
from tinyllm.cli._help import App, Group

SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE = 0.7  # at 1 a model this young wanders off
_TRACEBACK = "TINYLLM_TRACEBACK"  # set it to see where an error comes from

Checkpoint = Annotated[
    str,
    typer.Option(metavar="last|best|STEP", help="The weights of this checkpoint: the last, the best, or a step's."),
]

if TYPE_CHECKING:
    from tinyllm.runs.load import Which

app = App(
    name="tinyllm",
    help="Train a small language model on real text, and let it write.\n\nStart with: tinyllm train",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def prepare_process(computes: bool = True) -> None:
    """Set up the process as a program may, and a library may not.

    Args:
        computes: whether the command will import torch in any case.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model may write what the terminal cannot show
            stream.reconfigure(errors="replace")
    from tinyllm._internal.allocator import tune_allocator

    tune_allocator()  # where it does not apply, `tinyllm info` says why
    if computes:
        from tinyllm._internal.cpus import limit_threads

        limit_threads()
        from tinyllm.ops._products import check_environment

        check_environment()


def is_worker() -> bool:
    """Return whether this is a non-zero rank of a training, which leaves the talking to rank 0."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


def is_first_of_node() -> bool:
    """Return whether this process is the first one on its machine, or the only one: whoever started it reads it."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID"))


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit status 2, and Ctrl-C into one and status 130."""
    interrupt.raise_again()
    try:
        if "" in sys.argv[1:]:
            before = sys.argv[sys.argv.index("", 1) - 1]
            what = f"the value of {before}" if before.startswith("-") else "an argument"
            raise ValueError(f"{what} is empty (a shell variable that is not set?); give it a value")
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the program without a word
        if is_first_of_node():
            typer.echo("tinyllm: interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # the reader of our output has gone, such as `| head`: typer ends in silence
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError) as error:
        if os.environ.get(_TRACEBACK):
            raise
        if is_first_of_node():
            if isinstance(error, OSError) and error.filename is not None:
                line = f"{error.filename}: {error.strerror}"
            elif isinstance(error, ModuleNotFoundError) and error.name == "torch":
                line = "torch is not installed; `tinyllm doctor` names the command that installs one for this machine"
            else:  # MemoryError mostly comes without a word
                line = _as_typed(" ".join(str(error).split()) or "out of memory")
            typer.echo(f"tinyllm: error: {line}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show a warning of ours as the command line shows errors, without the place in the program that it comes from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"tinyllm: {message}", err=True)
        yield


def _as_typed(line: str) -> str:
    """Spell the parameter that an error of a Python function begins with, as in "top_k is 0", as the option it is."""
    command: Any = getattr(typer.main.get_command(app), "commands", {}).get("".join(sys.argv[1:2]))
    options = {parameter.name: parameter.opts[0] for parameter in command.params} if command else {}
    name, _, rest = line.partition(" ")
    about = rest.startswith("is ") or name in ("out", "init_from", "report")  # "out runs/a is not empty"
    if not about or not options.get(name, "").startswith("--") or name in map(os.path.normpath, sys.argv[2:]):
        return line  # of an argument, which has no dashes; or of a file of that name, which was typed
    others = re.sub(r"(?<![\w./'\"-])[a-z]+(_[a-z]+)+(?![\w./'\"=])", lambda word: options.get(word[0], word[0]), rest)
    return f"{options[name]} {others}"


def which(checkpoint: str) -> Which:
    return int(checkpoint) if checkpoint.isdecimal() else cast("Which", checkpoint)  # load_run checks the name
