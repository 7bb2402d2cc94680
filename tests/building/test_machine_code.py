"""Tests of how a GPU kernel's machine code is read, on listings as nvdisasm prints them."""

import pytest

pytest.importorskip("triton")

from tests.building import machine_code

LOAD, STORE = "LDL R4, [R1+0x8]", "STL.64 [R1+0x8], R4"
MULTIPLY, EXP = "HMMA.16816.F32.BF16 R8, R4, R6, R8", "MUFU.EX2 R3, R3"


def listing(*lines):
    """Return a kernel's disassembly of the given lines: labels end with a colon, all others are instructions."""
    text = [".text.kernel:"]
    for i, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;")
    return "\n".join(text)


def loop(name, *body):
    """Return a loop with its branch back to the beginning."""
    return (f".L_x_{name}:", *body, f"@P0 BRA `(.L_x_{name})")


@pytest.fixture
def spills_apart(monkeypatch):
    def answer(*lines):
        monkeypatch.setattr(machine_code, "output", lambda *command: listing(*lines))
        return machine_code.spills_apart(b"")

    return answer


@pytest.mark.parametrize("multiply", [MULTIPLY, "HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4]", "UTCHMMA gdesc[UR4]"])
@pytest.mark.parametrize("spill", [LOAD, STORE, f"@!P1 {LOAD}", f"@UP2 {STORE}"])
def test_a_spill_in_a_loop_over_tiles_is_not_apart(spill, multiply, spills_apart):
    assert not spills_apart("MOV R1, R2", *loop(0, multiply, EXP, spill), "EXIT")
    assert spills_apart("MOV R1, R2", *loop(0, multiply, EXP), "EXIT")


def test_a_spill_before_between_and_behind_the_loops_is_apart(spills_apart):
    first, second = loop(0, MULTIPLY, EXP), loop(1, EXP, MULTIPLY)
    assert spills_apart(STORE, *first, LOAD, STORE, *second, LOAD, "EXIT")


def test_each_loop_over_tiles_counts(spills_apart):
    clean, spilling = loop(0, MULTIPLY, EXP), loop(1, MULTIPLY, EXP, LOAD)
    assert not spills_apart(*clean, *spilling, "EXIT")
    assert not spills_apart(*spilling, *clean, "EXIT")


def test_a_spill_in_a_loop_that_multiplies_nothing_is_apart(spills_apart):
    assert spills_apart(*loop(0, STORE, EXP), *loop(1, MULTIPLY, EXP), "EXIT")


def test_a_spill_beside_a_loop_over_the_chunks_of_a_head_is_not_apart(spills_apart):
    assert not spills_apart(*loop(0, *loop(1, MULTIPLY), EXP, STORE), "EXIT")
    assert not spills_apart(*loop(0, *loop(1, MULTIPLY, LOAD), EXP), "EXIT")
    assert spills_apart(*loop(0, *loop(1, MULTIPLY), EXP), STORE, "EXIT")


def test_a_spill_in_a_loop_around_the_loop_over_tiles_is_apart(spills_apart):
    assert spills_apart(*loop(0, LOAD, *loop(1, MULTIPLY, EXP), STORE), "EXIT")
    assert not spills_apart(*loop(0, *loop(1, MULTIPLY, EXP, LOAD)), "EXIT")


def test_a_branch_forwards_is_no_loop(spills_apart):
    assert spills_apart("@P0 BRA `(.L_x_1)", *loop(0, MULTIPLY, EXP), LOAD, ".L_x_1:", "EXIT")


def test_machine_code_without_a_loop_over_tiles_is_refused(spills_apart):
    with pytest.raises(AssertionError, match="no loop multiplies"):
        spills_apart(MULTIPLY, EXP, *loop(0, LOAD), *loop(1, MULTIPLY), "EXIT")
