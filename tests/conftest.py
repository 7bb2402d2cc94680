import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # it multiplies small tiles with NumPy, slowest on many threads

CUDA_TESTS = Path(__file__).with_name("cuda")


def pytest_configure(config):
    """Without a GPU the CUDA C++ kernels run on the CPU, with emulated threads: where their tests may run, a library of
    them is built before tinyllm is imported."""
    # pytest-benchmark does not measure in xdist's workers; benchmarks that a test starts are processes of their own.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    wanted = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if any(path in (CUDA_TESTS, *CUDA_TESTS.parents) or CUDA_TESTS in path.parents for path in wanted):
        use_emulated_cuda()


def use_emulated_cuda():
    """Has `import tinyllm`, which must come later, find the emulated kernels."""
    if torch.cuda.is_available() or "TINYLLM_EMULATED_CUDA" in os.environ:
        return
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return  # the tests say that they are skipped
    from tests.emulation.build import build

    os.environ["TINYLLM_EMULATED_CUDA"] = str(build())


def pytest_collection_modifyitems(config, items):
    """Everything below tests/ops tests the compiled kernels, except what is marked `any_build`. Where pytest-timeout
    limits every test, those that have torch.compile compile are given two minutes."""
    from tests.helpers.needs import needs_extension

    for item in items:
        if "/ops/" in str(item.path) and item.get_closest_marker("any_build") is None:
            item.add_marker(needs_extension)
        if config.pluginmanager.hasplugin("timeout") and any(word in item.name for word in ("compile", "opcheck")):
            item.add_marker(pytest.mark.timeout(120))


@pytest.fixture(scope="module")  # trainings that a module's tests compare are the same only on as many threads
def one_thread():
    """Models as small as the tests' gain nothing from more, and lose much when other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(capsys, monkeypatch):
    """Runs the command line in this process, which is quicker: (exit status, stdout, stderr)."""
    from tinyllm import cli

    def run(*arguments, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["tinyllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.app()
        out, err = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, out, err

    return run
