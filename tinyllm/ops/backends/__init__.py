"""The sources of kernels: C++ for CPUs, CUDA C++ and Triton for GPUs. Each is a module, and all have one interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tinyllm.ops.backends import cpp, cuda, triton


class Backend(Protocol):
    """The interface that `tinyllm.ops.dispatch` uses.

    Attributes:
        why_not: why its kernels are not in this process; None where they are.
    """

    why_not: str | None

    def unavailable(self, device_type: str, forced: bool, here: bool) -> str | None:
        """Return why it serves no tensors of a device type, None where it does.

        Args:
            forced: whether `tinyllm.ops.backend` forces calls to it.
            here: count what this installation lacks.
        """

    def provide(self, raw: Sequence[str], source: str) -> str | None:
        """Return why this build lacks one of the raw operators of an operator that is declared now, None where it has
        them. Triton's launchers of these names in the file `source` become raw operators here."""

    def has(self, name: str) -> bool:
        """Return whether there is a kernel for a raw operator, such as layer_norm_fwd."""

    def operators(self) -> Any:
        """Return the namespace of its raw operators."""


# Best first.
MODULES: dict[str, Backend] = {"cpp": cpp, "cuda": cuda, "triton": triton}
