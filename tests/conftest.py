import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # it multiplies small tiles with NumPy, slowest on many threads

# Where the CUDA C++ kernels are tested.
CUDA_TESTS = [Path(__file__).with_name(name) for name in ("ops", "kernels")]


def pytest_configure(config):
    """Without a GPU the CUDA C++ kernels run on the CPU, with emulated threads: where their tests may run, a library of
    them is built before tinyllm is imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background jobs, and all that they start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # pytest-benchmark does not measure in xdist's workers; benchmarks that a test starts are processes of their own.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    wanted = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    marked = Expression.compile(config.option.markexpr or "cuda").evaluate(lambda name, **_: name == "cuda")
    if marked and any(a == b or a in b.parents or b in a.parents for a in wanted for b in CUDA_TESTS):
        use_emulated_cuda()


def use_emulated_cuda():
    """Make `import tinyllm`, which must come later, find the emulated kernels."""
    if torch.cuda.is_available() or "TINYLLM_EMULATED_CUDA" in os.environ:
        return
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return  # the tests say that they are skipped
    from tests.emulation.build import build

    os.environ["TINYLLM_EMULATED_CUDA"] = str(build())


def pytest_collection_modifyitems(config, items):
    """Skip tests of the compiled kernels where there are none, and set the order and the time limits of a GPU machine.

    Everything below tests/ops tests these kernels, except what names its backend or is marked `any_build`. Where
    pytest-timeout limits every test, those that have torch.compile compile are given two minutes. Tiles that only
    tuning chooses come last: where the time does not suffice for all, they are missed least.
    """
    from tests.helpers.needs import needs_extension

    for item in items:
        chosen = any(item.get_closest_marker(name) for name in ("any_build", "cpp", "triton", "cuda"))
        if "/ops/" in str(item.path) and not chosen:
            item.add_marker(needs_extension)
        if config.pluginmanager.hasplugin("timeout") and any(word in item.name for word in ("compile", "opcheck")):
            item.add_marker(pytest.mark.timeout(120))
    # The longest file comes first: as the last one it would keep one of two workers busy alone.
    items.sort(key=lambda item: (item.name.startswith("test_every_tile"), "training/test_engine" not in str(item.path)))


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("cpp", "triton", "cuda")])
def backend(request, monkeypatch):
    """Force the backend on which a test runs, and return it: see tests/helpers/backends.py.

    Behind an underscore its name may tell the compute capability that is emulated.
    """
    from tests.helpers.backends import BACKENDS  # not above: tinyllm must not be imported before the emulation is built

    name, _, capability = request.param.partition("_")
    if capability:
        monkeypatch.setenv("TINYLLM_EMULATED_CAPABILITY", capability)
    with BACKENDS[name].forced():
        yield BACKENDS[name]


@pytest.fixture
def unforced():
    """Let the dispatcher choose. To be requested after what forces a backend, so that it is undone before that."""
    from tinyllm.ops import dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_forced", None)
        yield


@pytest.fixture(scope="module")  # trainings that a module's tests compare are the same only on as many threads
def one_thread():
    """Models as small as the tests' gain nothing from more, and lose much when other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(capsys, monkeypatch):
    """Run the command line in this process, which is quicker, and return its exit status, stdout and stderr."""
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
