"""tune_allocator, by counting page faults: a process of its own for each case, for it cannot be undone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import tinyllm

glibc = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and str(os.confstr("CS_GNU_LIBC_VERSION")).startswith("glibc")),
    reason="there is only glibc's allocator to tune",
)

# A page is 4 KiB at least, so 100 MB of float32 are up to 24,414 faults each time that they are mapped anew.
FAULTS = """
import resource, torch, tinyllm
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.zeros(25_000_000)
fresh = faults()
print(tinyllm.tune_allocator(), tinyllm.tune_allocator())
faults(), faults()  # the heap grows
print(fresh, min(faults() for _ in range(3)))  # the system may have taken pages back meanwhile
print(tinyllm.info()["cpu"]["allocator"])
"""


def run(code: str, **environment: str) -> list[str]:
    ours = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@glibc
def test_large_tensors_are_not_faulted_in_again():
    returned, counts, state = run(FAULTS)
    assert returned == "None None"
    fresh, tuned = map(int, counts.split())
    huge_pages = fresh < 5 * 100  # then there is little to save, and nothing to count
    assert huge_pages or tuned < fresh / 10
    assert state == "glibc, tuned: it keeps the memory of large tensors"


@glibc
@pytest.mark.parametrize(
    ("variable", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000")],
)
def test_the_environment_has_the_last_word(variable, value):
    named = variable if variable.startswith("MALLOC") else value.split("=")[0]
    returned, counts, state = run(FAULTS, **{variable: value})
    assert returned == f"the environment sets {named} the environment sets {named}"
    assert state == f"not tuned: the environment sets {named}"
    fresh, after = map(int, counts.split())
    assert after > fresh / 2


@glibc
def test_another_allocator_is_left_alone(tmp_path):
    source = tmp_path / "other.c"
    source.write_text("""
        #include <stddef.h>
        extern void *__libc_memalign(size_t, size_t);
        int posix_memalign(void **p, size_t to, size_t size) { return (*p = __libc_memalign(to, size)) ? 0 : 12; }
    """)
    library = tmp_path / "other.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler to make another allocator with")
    lines = run("import tinyllm; print(tinyllm.tune_allocator())", LD_PRELOAD=str(library))
    assert lines == ["another allocator is loaded in front of glibc's"]


def test_a_system_without_glibc_says_so(monkeypatch):
    from tinyllm._internal import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    allocator._why_not.cache_clear()
    try:
        assert tinyllm.tune_allocator() == "the C library is not glibc"
    finally:
        allocator._why_not.cache_clear()


def test_importing_changes_nothing():
    (state,) = run('import tinyllm; print(tinyllm.info()["cpu"]["allocator"])')
    assert "glibc, tuned" not in state
