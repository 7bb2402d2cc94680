"""Options of the command line that are made from the settings of `TrainConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer

from tinyllm._internal.words import option
from tinyllm.config.settings import Setting
from tinyllm.config.training import SETTINGS, TrainConfig

_Command = TypeVar("_Command", bound=Callable[..., Any])


def with_settings(
    names: Iterable[str], *, groups: Sequence[str] = (), **defaults: str
) -> Callable[[_Command], _Command]:
    """Give a command an option for each of the settings, whose values it gets as keywords: None if it was not typed.

    Args:
        names: of the settings.
        groups: the order in which the help lists the groups of options; in each the command's own come first. Without
            them the help has no groups, and the command's own options come last.
        defaults: what differs from the settings' own defaults.
    """

    def decorate(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        own = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        added = [_parameter(SETTINGS[name], bool(groups), defaults) for name in names]
        parameters = sorted([*own, *added], key=lambda item: groups.index(_group(item))) if groups else [*added, *own]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(setting: Setting, grouped: bool, defaults: dict[str, str]) -> inspect.Parameter:
    kind: Any = _types[setting.name]
    if isinstance(setting.allowed, tuple):
        kind = Literal[setting.allowed]
    elif type(None) in get_args(kind):
        kind = get_args(kind)[0]
    default = defaults.get(setting.name)
    details = typer.Option(
        option(setting.name) + (f"/{option('no_' + setting.name)}" if kind is bool else ""),
        help=setting.option_help(defaults.get("preset", "tiny"), default),
        metavar=setting.metavar,
        rich_help_panel=setting.group if grouped else None,
        show_default=False,
    )
    annotation: Any = Annotated[kind if default else kind | None, details]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_types = get_type_hints(TrainConfig)


def _group(parameter: inspect.Parameter) -> Any:
    return getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
