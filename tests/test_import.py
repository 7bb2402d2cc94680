"""What `import tinyllm` costs, and does not."""

from __future__ import annotations

import subprocess
import sys

import torch

from tests.runs import environment
from tinyllm.ops._compiler import constant_for_compiler


def test_the_compiler_is_imported_by_those_who_compile() -> None:
    code = "import tinyllm, sys; print('torch._dynamo' in sys.modules, 'lightning_fabric' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_the_compiler_is_told_is_what_torch_tells_it() -> None:
    def ours() -> None: ...

    def torchs() -> None: ...

    assert vars(constant_for_compiler(ours)) == vars(torch.compiler.assume_constant_result(torchs))
