"""Settings of a training in a file: YAML, TOML or JSON. Imports no torch.

The keys are the fields of `TrainConfig`, with underscores or dashes, and besides them `data` (a path, or a list of
paths) and `out`, which are taken as if they were typed: relative to the current directory. A run's own config.json is
such a file, too; it names no data.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tinyllm._internal.extras import from_extra
from tinyllm._internal.files import replacing
from tinyllm.config.saved import CONFIG_FILE, read_config
from tinyllm.config.training import TrainConfig

TYPES: dict[str, Any] = get_type_hints(TrainConfig)
PATHS = ("data", "out")


def load(path: str | PathLike[str]) -> dict[str, Any]:
    """Read settings: the name of each that the file has -> its value; `data` is a list, and null leaves one out.

    Raises:
        FileNotFoundError, IsADirectoryError: `path` is no file.
        ValueError: the file is broken, or has an unknown key or a value of a wrong type. Whether values are in range,
            `TrainConfig` says.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; a file of settings is needed, such as a run's config.json")
    parse, _ = _format(path)
    try:
        content = parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from error
    except (ValueError, RecursionError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # A value with a wrong tag or too many digits comes out of the parsers as whatever error they ran into.
        words = " ".join(str(error).split())
        known = isinstance(error, ValueError | RecursionError) and "set_int_max_str_digits" not in words
        raise ValueError(f"{path} cannot be read: {words if known else 'a value in it is broken'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is {_shown(content)}; it must be a table of settings, such as steps and lr")
    if isinstance(content.get("training"), dict) and isinstance(content.get("model"), dict):
        content = {"optimizer": "adamw", **content["training"]}  # a run's config.json, an old one of which names none
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = _name(key, path)
        if name in settings:
            raise ValueError(f"{path}: {key} is there twice, with a dash and with an underscore")
        settings[name] = _value(key, name, value, path)
    return {name: value for name, value in settings.items() if value is not None}


def save(
    path: str | PathLike[str],
    config: TrainConfig,
    data: Sequence[str | PathLike[str]] | None = None,
    out: str | PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write every setting that is not None, so that `load` gives them back exactly.

    Raises:
        FileExistsError: there is such a file, and `overwrite` is off.
        ValueError: the file's name has none of the suffixes; a path is no valid Unicode.
    """
    path = Path(path)
    _, render = _format(path)
    settings: dict[str, Any] = {"data": [str(item) for item in data or []], "out": None if out is None else str(out)}
    settings = {name: value for name, value in settings.items() if value} | asdict(config)
    text = render({name: value for name, value in settings.items() if value is not None})
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} cannot be written: a path of data or out is not valid Unicode") from error
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    if path.name == CONFIG_FILE and _is_of_run(path.parent):
        raise FileExistsError(f"{path} is a run's own, which needs it; choose another name")
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _is_of_run(folder: Path) -> bool:
    try:
        read_config(folder)
    except (OSError, ValueError):
        return False
    return True


def _format(path: Path) -> tuple[_Parse, _Render]:
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; allowed are {', '.join(_FORMATS)}") from None


def _name(key: Any, path: Path) -> str:
    name = str(key).replace("-", "_")
    known = [*TYPES, *PATHS]
    if name in known:
        return name
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else "allowed are data, out and the settings that `tinyllm train --help` lists, without their leading dashes"
    )
    raise ValueError(f"{path}: there is no setting {key!r}; {hint}")


def _value(key: str, name: str, value: Any, path: Path) -> Any:
    """Return `value` as the setting's type has it; None: the file leaves it open."""
    if name == "data" and isinstance(value, str) and value:
        return [value]
    if name == "data" and isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
        return value
    if name in PATHS:
        kinds: tuple[Any, ...] = (str, type(None)) if name == "out" else (type(None),)
        wanted = "a path" if name == "out" else "a path or a list of paths"
    else:
        kinds = get_args(TYPES[name]) or (TYPES[name],)
        wanted = next(words for kind, words in _WANTED.items() if kind in kinds)
    if float in kinds and type(value) is int and abs(value) < 1 << 1000:
        value = float(value)
    if type(value) not in kinds or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{path}: {key} is {_shown(value)}; it must be {wanted}")
    return value


_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _shown(value: Any) -> str:
    """Return a value as a message shows it."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "empty"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | int | float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for index, (key, _) in enumerate(pairs):
        if any(key == before for before, _ in pairs[:index]):
            raise ValueError(f"{key!r} is there twice")
    return dict(pairs)


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        with from_extra("train"):
            import tomli as tomllib
    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    """Read YAML, with numbers as YAML 1.2 has them: 1e-3 is one, and 010 and 1:30 are none. A key twice is an error."""
    with from_extra("train"):
        import yaml

    tag_int, tag_float = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, rule) for tag, rule in rules if tag not in (tag_int, tag_float)]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key, _ in reversed(node.value):
                if keys.count(key.value) > 1:
                    problem = f"{key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(tag_int, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
    number = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$"
    Loader.add_implicit_resolver(tag_float, re.compile(number), list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" (at line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(f"{error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _render_json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _render_toml(settings: dict[str, Any]) -> str:
    return "".join(f"{name} = {_literal(value)}\n" for name, value in settings.items())


def _render_yaml(settings: dict[str, Any]) -> str:
    return "".join(f"{name}: {_literal(value)}\n" for name, value in settings.items())


def _literal(value: Any) -> str:
    """Return a value as both TOML and YAML write it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):
        # Both take JSON's strings, but not each character raw; a lone surrogate stays, for `save` to refuse.
        return "".join(
            char if char.isprintable() or "\ud800" <= char <= "\udfff" else f"\\U{ord(char):08x}"
            for char in json.dumps(value, ensure_ascii=False)
        )
    text = json.dumps(value)
    return text.replace("e", ".0e") if re.fullmatch(r"-?[0-9]+e.*", text) else text  # 1e-05 is text in YAML 1.1


_Parse = Callable[[str], Any]
_Render = Callable[[dict[str, Any]], str]
_FORMATS: dict[str, tuple[_Parse, _Render]] = {
    ".yaml": (_parse_yaml, _render_yaml),
    ".yml": (_parse_yaml, _render_yaml),
    ".toml": (_parse_toml, _render_toml),
    ".json": (_parse_json, _render_json),
}
