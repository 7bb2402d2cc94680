"""The Triton kernels' operators take what the compiled ones take."""

import pytest
import torch

from tests.helpers.backends import on
from tinyllm.ops.backends import cpp, triton


def type_of(argument):
    """Sizes are SymInts to one and ints to the other."""
    return str(argument.type).replace("SymInt", "int")


@on("triton")
@pytest.mark.skipif(not cpp.loaded, reason=f"nothing to compare with: {cpp.why_not}")
@pytest.mark.parametrize("name", triton.defined)
def test_schema(backend, name):
    if not hasattr(torch.ops.tinyllm, name):
        pytest.skip("only Triton has it")
    theirs = getattr(torch.ops.tinyllm, name).default._schema
    ours = getattr(torch.ops.tinyllm_triton, name).default._schema
    for a, b in zip(ours.arguments, theirs.arguments, strict=False):
        assert (a.name, type_of(a), a.default_value) == (b.name, type_of(b), b.default_value)
    assert len(ours.arguments) >= len(theirs.arguments)
    assert all(more.has_default_value() for more in ours.arguments[len(theirs.arguments) :])
    assert [type_of(r) for r in ours.returns] == [type_of(r) for r in theirs.returns]
