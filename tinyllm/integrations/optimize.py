"""optimize, restore and report: our kernels in the place of a model's own layers, and back again."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

from torch import nn

from tinyllm._internal.checks import check_choice
from tinyllm.integrations import decoding, rules
from tinyllm.integrations.layers import STORED, Stored
from tinyllm.ops.quantized_linear import KINDS

_Model = TypeVar("_Model", bound=nn.Module)
_RECORD = "_tinyllm_record"
_MISSING = "there was none"
_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")  # of a layer, in the name of a module
_ATTENTION = "scaled_dot_product_attention"
_OURS = ("tinyllm.model", "tinyllm.nn")  # whose modules put several layers into one operator
_NO_RULE = "there is no replacement for it"


@dataclass(frozen=True)
class Row:
    """A module of a model, and what became of it.

    Attributes:
        name: the module's, as in `model.named_modules()`.
        kind: its class.
        by: the operators of `tinyllm.ops` that it is replaced by; None where it is left.
        why: the reason why it is left; or what is to be said of the replacement, such as how a weight is stored.
    """

    name: str
    kind: str
    by: str | None
    why: str | None = None


@dataclass(eq=False)
class _Record:
    """The changes of one `optimize` call, and how to take them back.

    Attributes:
        rows: each module that was looked at.
        undo: the modules' attributes that were set, in their order, with the values before and after.
    """

    rows: list[Row] = field(default_factory=list)
    undo: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)

    def set(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute of a module itself, below whatever its class does when it is set."""
        self.undo.append((module, attribute, module.__dict__.get(attribute, _MISSING), value))
        module.__dict__[attribute] = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if any(row.by == _ATTENTION for row in self.rows):  # of a pickled model, whose process may be another one
            from tinyllm.integrations import attention  # noqa: F401


@dataclass(frozen=True)
class Report:
    """The modules of a model that `optimize` replaced, and those that it left. Printed, it is a table.

    Attributes:
        model: the model's class.
        rows: each module that was looked at.
    """

    model: str
    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.by is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.by is None)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} modules replaced, {len(self.left)} left"]
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            what = f"left: {row.why}" if row.by is None else row.by + (f" ({row.why})" if row.why else "")
            groups.setdefault((_INDEX.sub("*", row.name) or "(the model)", row.kind, what), []).append(row.name)
        table = [(str(len(names)), kind, name, what) for (name, kind, what), names in groups.items()]
        widths = [max((len(row[i]) for row in table), default=0) for i in range(3)]
        for count, kind, name, by in table:
            lines.append(f"  {count:>{widths[0]}} {kind:<{widths[1]}}  {name:<{widths[2]}}  {by}")
        return "\n".join(lines)


def optimize(model: _Model, weights: str | None = None, *, inplace: bool = True) -> _Model:
    """Let our kernels compute the layers of a model, of transformers or any other, and return it.

    Norms, linear layers, feed-forward networks and attention are replaced module by module, in this model alone, where
    our kernel computes the same: `report(model)` says what was replaced by what, what was left, and why. Names,
    parameters, `state_dict`, `save_pretrained` and all else stay as they are, and a model may be trained, copied and
    compiled as before. `restore(model)` puts everything back.

    With `weights`, linear layers multiply by a copy of their weight in fewer bits: reading them is most of what a token
    takes. The weights themselves stay, and are what is multiplied by where they get gradients. A copy is made anew when
    its weight has changed. What is written through `weight.data` is noticed on a CPU where it changes a whole matrix;
    after a change of a few rows call `optimize` again. With "int4" the output layer has 8 bits.

    Args:
        model: any module. One that is optimized already is restored first.
        weights: "bf16", "int8", "int4", or None: as they are.
        inplace: False: return a copy that shares the parameters and buffers, and leave `model` as it is.

    Returns:
        model, or its copy.

    Raises:
        TypeError: model is not a module.
        ValueError: there is no such way to store weights; or the model is part of one that is optimized.
    """
    _check(model)
    if weights is not None:
        check_choice("weights", weights, KINDS)
    if not inplace:
        shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, cast("dict[int, Any]", shared))
    restore(model)
    replacing = _Replacing(model, weights is not None)
    try:
        for name, module in reversed(list(model.named_modules())):  # a module after those in it
            replacing.look_at(name, module)
        replacing.record.rows.reverse()
        if weights is not None:
            replacing.store(model, weights)
        replacing.loss(model)
    except BaseException:
        _undo(replacing.record)
        raise
    model.__dict__[_RECORD] = replacing.record
    return model


def restore(model: _Model) -> _Model:
    """Put back all that `optimize` replaced in a model, or in modules of it, and return the model.

    Raises:
        TypeError: model is not a module.
        ValueError: the model is part of one that is optimized, which has to be restored.
    """
    _check(model)
    for _, module, record in list(_records(model)):
        _undo(record)
        del module.__dict__[_RECORD]
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if STORED in module.__dict__ or (type(forward) is partial and forward.func.__module__.startswith(__package__)):
            raise ValueError(f"model is part of one that is optimized, with {name or 'it'}; restore the whole")
    return model


def report(model: nn.Module) -> Report:
    """Return what `optimize` replaced in a model, and what it left and why.

    Raises:
        TypeError: model is not a module.
        ValueError: neither the model nor a module of it has been optimized.
    """
    _check(model)
    rows = [
        replace(row, name=".".join(filter(None, (name, row.name))))
        for name, _, record in _records(model)
        for row in record.rows
    ]
    if not rows:
        raise ValueError("model is as it was; tinyllm.optimize(model) replaces its layers")
    return Report(type(model).__name__, tuple(rows))


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")


def _records(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Record]]:
    for name, module in model.named_modules():
        if _RECORD in module.__dict__:
            yield name, module, module.__dict__[_RECORD]


def _undo(record: _Record) -> None:
    for module, attribute, before, value in reversed(record.undo):
        decoding.forget(module)
        if module.__dict__.get(attribute) is not value:  # somebody has set it since, and may have built on it
            continue
        if isinstance(before, str) and before == _MISSING:
            del module.__dict__[attribute]
        else:
            module.__dict__[attribute] = before


class _Replacing:
    """One call of `optimize`: goes through the modules and notes what it does."""

    def __init__(self, model: nn.Module, stores: bool) -> None:
        self.record = _Record()
        self._stores = stores
        self._trials: dict[tuple[Any, ...], str | None] = {}
        ours = (module for module in model.modules() if type(module).__module__ in _OURS)
        self._ours = {id(child) for module in ours for child in module.modules()}

    def look_at(self, name: str, module: nn.Module) -> None:
        kind, rows = type(module).__name__, self.record.rows
        if id(module) in self._ours and not (self._stores and rules.is_linear(module)):
            if any(True for _ in module.parameters(recurse=False)):
                rows.append(Row(name, kind, None, "a module of tinyllm calls our kernels itself"))
            return
        found = rules.find(module)
        if isinstance(found, rules.Found):
            why = self._try(module, found)
            if why is None:
                self.record.set(module, "forward", found.forward(module))
            rows.append(Row(name, kind, found.name if why is None else None, why or found.note))
        elif found is not None:
            rows.append(Row(name, kind, None, found))
        elif self._attention(name, module):
            pass
        elif "Attention" in kind and any(map(rules.is_linear, module.children())):
            rows.append(Row(name, kind, None, "its attention does not go through transformers' AttentionInterface"))
        elif any(True for _ in module.parameters(recurse=False)):
            rows.append(
                Row(name, kind, None, "PyTorch's own serves it" if isinstance(module, nn.Embedding) else _NO_RULE)
            )

    def _try(self, module: nn.Module, found: rules.Found) -> str | None:
        """Try a replacement out, once for all modules that differ in the numbers in their parameters alone."""
        key = rules.signature(module, found)
        if key not in self._trials:
            self._trials[key] = rules.trial(module, found)
        return self._trials[key]

    def _attention(self, name: str, module: nn.Module) -> bool:
        if "transformers.modeling_utils" not in sys.modules:
            return False
        from tinyllm.integrations import attention

        config = attention.private_config(module)
        if config is None:
            return False
        kind = type(module).__name__
        if isinstance(config, str):
            self.record.rows.append(Row(name, kind, None, config))
        else:
            self.record.set(module, "config", config)
            self.record.rows.append(Row(name, kind, _ATTENTION))
        return True

    def loss(self, model: nn.Module) -> None:
        """Replace the loss that a model of transformers computes of the labels that it is given."""
        if "transformers.modeling_utils" not in sys.modules:
            return
        from tinyllm.integrations import losses

        for name, module in model.named_modules():  # a wrapper's model has it, too
            loss = losses.loss_of(module)
            if loss is not None:
                self.record.set(module, "_loss_function", loss)
                self.record.rows.append(Row(f"{name}.loss_function".lstrip("."), "loss", "cross_entropy"))

    def store(self, model: nn.Module, weights: str) -> None:
        """Give every linear layer that is replaced a copy of its weight in fewer bits."""
        outputs = getattr(model, "get_output_embeddings", lambda: None)()
        made: dict[tuple[int, str], Stored] = {}
        for i, row in enumerate(self.record.rows):
            module = model.get_submodule(row.name)
            if row.by != "linear" or not rules.is_linear(module):
                continue
            kind = "int8" if weights == "int4" and module is outputs else weights
            weight = cast(nn.Parameter, module.weight)
            key = id(weight), kind
            try:
                if key not in made:
                    made[key] = Stored(kind)
                    made[key].of(module)
            except ValueError as error:  # not finite, or without columns
                del made[key]
                self.record.rows[i] = Row(row.name, row.kind, row.by, f"with its own weight: {error}")
                continue
            self.record.set(module, STORED, made[key])
            self.record.rows[i] = Row(row.name, row.kind, "quantized_linear", kind)
