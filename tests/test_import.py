"""The cost of `import tinyllm`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tinyllm
from tests.helpers.runs import environment
from tinyllm.ops._context import constant_for_compiler


def test_the_compiler_is_imported_by_those_who_compile() -> None:
    code = "import sys, tinyllm.model; print('torch._dynamo' in sys.modules, 'lightning_fabric' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_torch_is_imported_when_it_is_used() -> None:
    code = "import sys, tinyllm; print('torch' in sys.modules); tinyllm.ops; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_every_name_is_there() -> None:
    for name in tinyllm.__all__:
        assert name in dir(tinyllm)
        assert getattr(tinyllm, name) is not None
    tinyllm._info.print_info()  # whose module has the function's name in front of it
    assert callable(tinyllm.info)
    with pytest.raises(AttributeError, match="module 'tinyllm' has no attribute 'trian'"):
        tinyllm.trian  # noqa: B018


def test_what_the_compiler_is_told_is_what_torch_tells_it() -> None:
    def ours() -> None: ...

    def torchs() -> None: ...

    assert vars(constant_for_compiler(ours)) == vars(torch.compiler.assume_constant_result(torchs))
