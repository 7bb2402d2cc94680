"""The operator of a block for single tokens: numbers, threads, and raw calls with arguments that do not fit."""

import pytest
import torch

from tests.helpers.backends import on
from tests.ops.parity import assert_same_bits
from tinyllm.check.draw import Draw
from tinyllm.check.model_cases import decode_block


@on("cpp")
@pytest.mark.parametrize("seed", range(60))
def test_a_random_block_against_float64(backend, seed):
    case = decode_block(Draw(seed, torch.float32, "cpu", "cpp"))
    (x,) = case.inputs
    ours, exact = case.ours(x.contiguous()), case.theirs(x.double())
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4, msg=case.text)


@on("cpp")
def test_bits_do_not_depend_on_threads(backend):
    for seed in range(6):
        case = decode_block(Draw(seed, torch.float32, "cpu", "cpp"))
        x = case.inputs[0].contiguous()
        assert_same_bits(backend.threads, lambda case=case, x=x: case.ours(x))


def arguments(**changes):
    """Return the arguments of a call: one head of 4 columns, a network of 6, two tokens before."""
    none, square = torch.empty(0), torch.ones(4, 4)
    weights = [torch.ones(4), none, torch.ones(4), none, none, none]
    for matrix in (square, square, square, square, torch.ones(6, 4), none, torch.ones(4, 6)):
        weights += [matrix, none, none]
    given = {
        "input": torch.ones(2, 1, 4), "weights": weights, "sizes": [1, 1, 4, 0, 0, 0, 0, 0],
        "keys": torch.zeros(2, 1, 3, 4), "values": torch.zeros(2, 1, 3, 4), "seen": 2, "mask": None, "cos": None,
        "sin": None, "activation": "relu", "scale": 0.5, "eps1": 1e-5, "eps2": 1e-5, "eps3": 0.0,
    }  # fmt: skip
    return given | changes


def with_weight(index, tensor):
    weights = list(arguments()["weights"])
    weights[index] = tensor
    return {"weights": weights}


@on("cpp")
def test_raw_calls_that_do_not_fit_are_refused(backend):
    raw = backend.raw.decode_block
    assert raw(**arguments()).shape == (2, 1, 4)
    for changes, says in (
        ({"input": torch.ones(2, 2, 4)}, r"input has shape \[2, 2, 4\]"),
        ({"input": torch.ones(2, 1, 4, dtype=torch.float64)}, "input has dtype Double"),
        ({"sizes": [1, 1, 4]}, "27 weights and 3 sizes"),
        ({"sizes": [3, 2, 4, 0, 0, 0, 0, 0]}, "3 heads, 2 of keys"),
        ({"keys": torch.zeros(2, 1, 2, 4)}, r"keys has shape \[2, 1, 2, 4\]"),
        ({"values": torch.zeros(2, 1, 3, 5)}, r"values has shape"),
        ({"seen": -1}, "-1 tokens"),
        ({"mask": torch.ones(2, 1, 1, 2, dtype=torch.bool)}, "mask has shape"),
        ({"cos": torch.ones(1, 1, 3), "sin": torch.ones(1, 1, 3)}, "cos has shape"),
        ({"cos": torch.ones(1, 1, 4), "sin": torch.ones(1, 1, 2)}, "sin has shape"),
        ({"activation": "swish"}, "activation is 'swish'"),
        (with_weight(0, torch.ones(5)), "a norm has shape"),
        (with_weight(6, torch.ones(4, 5)), "query has shape"),
        (with_weight(6, torch.ones(4, 4, dtype=torch.float64)), "query has dtype"),
        (with_weight(8, torch.ones(3)), "query has shape"),
        (with_weight(24, torch.ones(4, 5)), "last has shape"),
        (with_weight(24, torch.ones(4)), "must have 2 dimensions"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=says):
            raw(**arguments(**changes))


@on("cpp")
def test_opcheck(backend):
    torch.library.opcheck(backend.raw.decode_block, (), arguments(), test_utils=("test_schema", "test_faketensor"))
