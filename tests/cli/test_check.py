"""`tinyllm check`: what it says of kernels that are right, wrong, hang, crash or are not there."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.needs import needs_extension
from tests.ops.parity import assert_accurate
from tinyllm import cli
from tinyllm.check import run as checking
from tinyllm.check.cases import CASES
from tinyllm.check.run import FAILED, HUNG, NOT_HERE, PASSED, Check, plan, run
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cpp, cuda, triton

LAYER_NORM, RMS_NORM = (Check(name, "cpp", "cpu") for name in ("layer_norm", "rms_norm"))


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `tinyllm check` in this process; return the exit status and the output."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tinyllm", "check", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.app()
        out, err = capsys.readouterr()
        return ended.value.code, out + err

    return call


@pytest.fixture
def layer_norm_does(tmp_path, monkeypatch):
    """Make `layer_norm` do something else in every process that is started from now on."""

    def patch(what):
        lines = [
            "import os, pathlib, signal, time",
            f"pathlib.Path({str(tmp_path)!r}, f'pid-{{os.getpid()}}').touch()",
            "from tinyllm import ops",
            "real = ops.layer_norm",
            "def layer_norm(*arguments):",
            f"    {what}",
            "ops.layer_norm = layer_norm",
        ]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        monkeypatch.setenv("PYTHONPATH", path)
        return tmp_path

    return patch


@pytest.fixture
def no_emulation(monkeypatch):
    """Turn off the emulations of GPU kernels, which would be checked like kernels and take minutes."""
    for emulation, switch in ((triton, "interpreted"), (cuda, "emulated")):
        monkeypatch.setattr(emulation, switch, False)


@needs_extension
@pytest.mark.usefixtures("no_emulation")
def test_all_kernels_of_this_processor_pass(command):
    status, text = command("--device", "cpu")
    assert status == 0, text
    assert f"{len(dispatch.OPERATORS)} passed, 0 failed, 0 hung, 0 not here" in text
    for operator in dispatch.OPERATORS:
        assert operator in text


@needs_extension
def test_a_wrong_kernel_is_named_and_the_status_is_1(command, layer_norm_does, monkeypatch):
    layer_norm_does("return real(*arguments) * 1.001")
    monkeypatch.setattr(checking, "plan", lambda device, full: [LAYER_NORM, RMS_NORM])
    status, text = command()
    assert status == 1
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("cpu")}
    assert FAILED in rows["layer_norm"]
    assert "output 0: error" in rows["layer_norm"]
    assert "float32, seed 0" in rows["layer_norm"]
    assert PASSED in rows["rms_norm"]
    assert "1 passed, 1 failed, 0 hung" in text


@needs_extension
def test_a_kernel_that_hangs_is_named_and_its_process_ended(layer_norm_does):
    folder = layer_norm_does("time.sleep(1000)")
    (outcome,) = run([LAYER_NORM], limit_s=6)
    assert outcome.result == HUNG
    assert "not done after 6 s" in outcome.text
    (pid,) = (int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@needs_extension
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV in float32, seed 0"),
        ("raise RuntimeError('no such kernel image')", "RuntimeError: no such kernel image"),
        ("os._exit(7)", "ended with status 7 in float32, seed 0"),
        ("return real(*arguments).detach()", "an output has no gradient"),
    ],
)
def test_a_kernel_that_crashes_is_named(layer_norm_does, what, says):
    layer_norm_does(what)
    (outcome,) = run([LAYER_NORM])
    assert outcome.result == FAILED
    assert says in outcome.text


@needs_extension
def test_a_backend_that_takes_no_call_has_not_passed(layer_norm_does):
    layer_norm_does("from tinyllm.ops.dispatch import CannotServeError; raise CannotServeError")
    (outcome,) = run([LAYER_NORM])
    assert outcome.result == FAILED
    assert "took none of" in outcome.text


@pytest.mark.parametrize("hung", [False, True])
def test_a_hang_gives_status_1(command, monkeypatch, hung):
    outcome = checking.Outcome(LAYER_NORM, HUNG if hung else NOT_HERE, "as it happens")
    monkeypatch.setattr(checking, "run", lambda checks, full: [outcome])
    status, text = command()
    assert status == hung
    assert outcome.result in text


@pytest.mark.usefixtures("no_emulation")
def test_what_is_not_built_is_not_here_and_no_failure(command, monkeypatch):
    monkeypatch.setattr(cpp, "why_not", "the C++ extension was not built: there is no compiler")
    monkeypatch.setattr(cpp, "library", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, text = command()
    assert status == 0
    assert "there is no compiler" in text
    assert "there is no GPU" in text
    assert "0 passed, 0 failed, 0 hung" in text
    assert {check.backend for check in plan()} == {"cpp", "cuda", "triton"}
    assert {check.device for check in plan("cpu")} == {"cpu"}


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, text = command("--device", "cuda")
    assert status == 2
    assert "no GPU" in text


@needs_extension
def test_full_tries_every_instruction_set():
    found = {check.isa for check in plan("cpu", full=True) if check.backend == "cpp"}
    assert found == set(cpp.library.usable_isas())


def test_every_operator_has_calls():
    assert set(CASES) == set(dispatch.OPERATORS)


def test_the_parity_rule_allows_twice_torchs_error_and_two_steps():
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torchs = (exact + 1e-4).float()
    eps = torch.finfo(torch.float32).eps
    assert_accurate("within", (exact + 2e-4).float(), torchs, exact)
    for wrong in (exact + 2.1e-4 + 5 * eps, torch.full_like(exact, torch.nan)):
        with pytest.raises(AssertionError, match="beyond: error"):
            assert_accurate("beyond", wrong.float(), torchs, exact)


def test_the_worker_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    if not cpp.loaded:
        pytest.skip(f"the installation has no compiled kernels to check: {cpp.why_not}")
    (outcome,) = run([RMS_NORM])
    assert outcome.result == PASSED, outcome.text


def test_where_there_are_no_kernels_it_says_that_nothing_was_checked(command, monkeypatch):
    monkeypatch.setattr(checking, "plan", lambda device, full: [Check("layer_norm", "cuda", "cuda")])
    monkeypatch.setattr(checking, "run", lambda checks, full: [checking.Outcome(checks[0], NOT_HERE, "no GPU")])
    status, text = command()
    assert status == 0
    assert "Nothing was checked" in text
