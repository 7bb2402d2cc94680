"""The package as it is installed: what the archives hold, and an installation without compiled kernels."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import readme_renderer.markdown
import yaml

import tinyllm

ROOT = Path(__file__).parents[2]
BESIDE = ("benchmarks", "kernels")  # tinyllm in the repository; in the wheel they are inside it
TRACKED = ("benchmarks", "csrc", "docs", "kernels", "tinyllm", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Copy what the archives are made from, without anything built in it."""
    root = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in (*TRACKED, "setup.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=ignore)
        else:
            shutil.copy(source, root / name)
    return root


def build(checkout, kind, out, **environment):
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, checkout],
        env={**os.environ, "TINYLLM_EXT": "auto", "TINYLLM_CUDA": "auto", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return result, result.stdout + result.stderr


def run(site, code, folder):
    """Return what a program prints whose tinyllm is the one unpacked in `site`."""
    # The editable installation under test would lend its compiled library to the wheel's modules.
    start = f"SITE = {str(site)!r}; import sys; sys.path.insert(0, SITE)\n"
    start += "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    done = subprocess.run([sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sdist_holds_what_the_build_needs(checkout, tmp_path):
    result, output = build(checkout, "sdist", tmp_path)
    assert result.returncode == 0, output
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        metadata = archive.extractfile(next(name for name in archive.getnames() if name.endswith("/PKG-INFO"))).read()
    kept = {path for name in ("csrc", "docs") for path in ROOT.glob(f"{name}/**/*") if path.is_file()}
    assert {str(path.relative_to(ROOT)) for path in kept} <= names
    assert {"kernels/__init__.py", "setup.py", "pyproject.toml", "tinyllm/ops/attention.py", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".so")]
    fields = email.message_from_bytes(metadata)
    assert fields["License-Expression"] == "MIT"
    assert fields["License-File"] == "LICENSE"
    assert fields["Author"] == "the tinyllm authors"


def test_the_long_description_leads_nowhere_inside_the_repository(checkout, tmp_path):
    """A package index has neither the repository's pictures nor its files."""
    (checkout / "README.md").write_text(
        "A [page](docs/training.md), [`a.file`](tinyllm/model.py#L3), a [site](https://example.org/a) and `a[0](b)`.\n"
        "![picture](docs/loss_curve.png)\n<img src='docs/loss_curve.png'>\n```\nx = table[name](argument)\n```\n"
        "```\n[not a link](code)\n```\n"
    )
    try:
        lines = described(checkout, tmp_path / "made").splitlines()
    finally:
        shutil.copy(ROOT / "README.md", checkout)
    assert lines[0] == "A page, `a.file`, a [site](https://example.org/a) and `a[0](b)`."
    assert lines[1:3] == ["", ""]
    assert lines[3:] == ["```", "x = table[name](argument)", "```", "```", "[not a link](code)", "```"]
    html = readme_renderer.markdown.render(described(checkout, tmp_path / "ours"))
    assert html
    links = re.findall(r"""(?:href|src)=["']([^"']*)""", html)
    # Those to #user-content- are the headings' own.
    assert [link for link in links if "://" not in link and not link.startswith("#user-content-")] == []


def described(checkout, out):
    """Return the long description of a checkout's wheel."""
    result, output = build(checkout, "wheel", out, TINYLLM_EXT="0")
    assert result.returncode == 0, output
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))
    return email.message_from_bytes(metadata).get_payload(decode=True).decode()


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["version"] == tinyllm.__version__
    assert f"## [{tinyllm.__version__}] - {citation['date-released']}\n" in changelog


def test_a_wheel_without_the_extension_works_and_says_why(checkout, tmp_path):
    result, output = build(checkout, "wheel", tmp_path, TINYLLM_EXT="0")
    assert result.returncode == 0, output
    assert "skipping the C++ extension: TINYLLM_EXT=0" in output
    assert "skipping the CUDA library: the C++ extension, which declares its operators, is not built" in output
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        modules = {name for name in names if name.endswith(".py")}
        assert names - modules == {"tinyllm/_build.json", "tinyllm/ops/backends/proven.json", "tinyllm/py.typed"}
        sources = {
            f"{target}/{path.relative_to(ROOT / source)}"
            for source, target in (("tinyllm", "tinyllm"), *((name, f"tinyllm/{name}") for name in BESIDE))
            for path in ROOT.glob(f"{source}/**/*.py")
        }
        assert modules == sources
        archive.extractall(site)
    lines = Path(next(site.glob("*.dist-info")), "METADATA").read_text().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert {line for line in needed if "extra ==" not in line} == {"torch>=2.10", "numpy", "safetensors"}
    # It is larger than PyTorch for CPUs, whose users have no use for it; PyTorch for GPUs brings it.
    triton = [line for line in needed if line.startswith("triton")]
    assert triton
    assert all("extra == " in line for line in triton)
    code = """
import warnings
warnings.simplefilter("error")
import torch, tinyllm, tinyllm.kernels
assert tinyllm.__file__.startswith(SITE), tinyllm.__file__
tinyllm.SimpleLLM(6, 16, 32, 2)(torch.zeros(1, 3, dtype=torch.long))
facts = tinyllm.info()["extension"]
print(tinyllm.ops.last_backend(), facts["why_not"], facts["repair"], sep=" | ")
"""
    # It was left out deliberately: nothing warns, and nothing is to be mended.
    said = run(site, code, tmp_path).strip()
    assert said == "reference | the C++ extension was not built: TINYLLM_EXT=0 | None"


@pytest.fixture(scope="module")
def site_without_a_compiler(checkout, tmp_path_factory):
    """Unpack the wheel of a machine without a compiler."""
    folder = tmp_path_factory.mktemp("no_compiler")
    result, output = build(checkout, "wheel", folder, CXX="no-such-compiler", CC="no-such-compiler")
    assert result.returncode == 0, output
    says = "skipping the C++ extension: there is no C++ compiler: no-such-compiler is not on PATH"
    assert f"tinyllm: {says}" in output
    assert len(re.findall(f"(?i)warning:? {re.escape(says)}", output)) == 1  # which pip passes on
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder / "site")
    return folder / "site"


def test_without_a_compiler_the_first_call_warns_once_and_info_says_what_mends_it(site_without_a_compiler, tmp_path):
    code = """
import warnings, torch, tinyllm
from tinyllm._info import format_info
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        tinyllm.SimpleLLM(6, 16, 32, 2)(torch.zeros(1, 3, dtype=torch.long))
ours = [warning for warning in caught if "tinyllm" in str(warning.message)]
assert [warning.category for warning in ours] == [RuntimeWarning], ours
print(ours[0].message)
print(format_info())
"""
    warning, *rest = run(site_without_a_compiler, code, tmp_path).splitlines()
    reason = "the C++ extension was not built: there is no C++ compiler: no-such-compiler is not on PATH"
    command = "pip install --no-cache-dir --force-reinstall --no-deps "
    assert warning.startswith(
        f"tinyllm runs on plain PyTorch, without its compiled kernels: {reason}. To install them: {command}"
    )
    at = rest.index(f"compiled extension   not loaded: {reason}")
    assert rest[at + 1].strip().startswith(f"to install it: {command}")


def test_a_source_tree_is_mended_from_itself(monkeypatch):
    from tinyllm.ops.backends import cpp

    monkeypatch.setattr(cpp, "why_not", "it was never built")
    monkeypatch.setattr(metadata, "distribution", mock.Mock(side_effect=metadata.PackageNotFoundError))
    assert cpp.repair().endswith(f" -e {ROOT}")


def test_an_unknown_choice_is_refused(checkout, tmp_path):
    result, output = build(checkout, "wheel", tmp_path, TINYLLM_EXT="yes")
    assert result.returncode != 0
    assert "TINYLLM_EXT is 'yes'; auto, 0 or 1 is needed" in output


def test_kernels_are_installed_as_tinyllm_kernels():
    import tinyllm.kernels

    assert Path(tinyllm.kernels.__file__) == ROOT / "kernels" / "__init__.py"


@pytest.mark.parametrize("setting", ["auto", "1"])
def test_without_what_the_build_needs_the_installation_fails(checkout, tmp_path, setting):
    """A wheel without kernels would go unnoticed; with TINYLLM_EXT=0 it is what was asked for."""
    (tmp_path / "pybind11.py").write_text("raise ModuleNotFoundError('absent', name='pybind11')")
    result, output = build(checkout, "wheel", tmp_path / "out", TINYLLM_EXT=setting, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "pybind11 is not installed" in output
    assert "pip install torch setuptools pybind11 ninja" in output
