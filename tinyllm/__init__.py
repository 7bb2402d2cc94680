"""Fused language-model kernels for PyTorch, and `SimpleLLM`, a model built on them.

Names are imported when they are first used, so that a program which needs no torch does not wait for it. The
operators are registered with PyTorch, as `torch.ops.tinyllm`, when `tinyllm.ops` is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tinyllm import nn, ops, optim
    from tinyllm._info import info
    from tinyllm._internal.allocator import tune_allocator
    from tinyllm.config.model import SimpleLLMConfig
    from tinyllm.config.training import TrainConfig
    from tinyllm.generation import generate, generate_text, stream_text
    from tinyllm.integrations.optimize import optimize, report, restore
    from tinyllm.model import SimpleLLM
    from tinyllm.runs.load import Run, load_run
    from tinyllm.training.trainer import TrainResult, resume, train

__all__ = [
    "Run",
    "SimpleLLM",
    "SimpleLLMConfig",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "generate",
    "generate_text",
    "info",
    "load_run",
    "nn",
    "ops",
    "optim",
    "optimize",
    "report",
    "restore",
    "resume",
    "stream_text",
    "train",
    "tune_allocator",
]

# Each name, and the module that has it; a module's own name has none.
_HOMES = {
    "Run": "runs.load",
    "SimpleLLM": "model",
    "SimpleLLMConfig": "config.model",
    "TrainConfig": "config.training",
    "TrainResult": "training.trainer",
    "generate": "generation",
    "generate_text": "generation",
    "info": "_info",
    "load_run": "runs.load",
    "nn": None,
    "ops": None,
    "optim": None,
    "optimize": "integrations.optimize",
    "report": "integrations.optimize",
    "restore": "integrations.optimize",
    "resume": "training.trainer",
    "stream_text": "generation",
    "train": "training.trainer",
    "tune_allocator": "_internal.allocator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    module = import_module(f"{__name__}.{home or name}")
    value = module if home is None else getattr(module, name)
    globals()[name] = value  # the next time it is simply there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
