import pytest


def pytest_collection_modifyitems(items):
    """Tiles that only tuning chooses come last: where the time does not suffice for all, they are missed least."""
    items.sort(key=lambda item: item.name.startswith("test_every_tile"))


@pytest.fixture(autouse=True)
def _on_the_triton_kernels():
    from tests.gpu.device import why_not  # not above: see tests/cuda/conftest.py
    from tinyllm import ops

    if why_not is not None:
        pytest.skip(f"Triton's kernels do not run here: {why_not}")
    with ops.backend("triton"):
        yield
