"""Tests of `make abi-check` on small sources and libraries."""

import subprocess

import pytest

from tests.building import abi_check

CPP_EXTENSION = """
COMMON_NVCC_FLAGS = [
    '-D__CUDA_NO_HALF_OPERATORS__',
    '--expt-relaxed-constexpr'
]
def _jit_compile():
    extra_compile_args={'cxx': ['-g', '-std=c++20', '-fPIC']}  # an example of its documentation
    common_cflags += ['-std=c++17', '-fPIC']
"""


@pytest.fixture
def torch_of_c17(tmp_path):
    """Make a folder of torch headers whose cpp_extension compiles C++17."""
    (tmp_path / "torch" / "include").mkdir(parents=True)
    path = tmp_path / abi_check.CPP_EXTENSION
    path.parent.mkdir()
    path.write_text(CPP_EXTENSION)
    return tmp_path


def test_the_options_are_those_of_the_versions_cpp_extension(torch_of_c17):
    assert abi_check.options(torch_of_c17) == (
        "-std=c++17",
        ["-D__CUDA_NO_HALF_OPERATORS__", "--expt-relaxed-constexpr"],
    )
    (torch_of_c17 / abi_check.CPP_EXTENSION).write_text("")
    with pytest.raises(RuntimeError, match="in another way"):
        abi_check.options(torch_of_c17)


def test_what_only_a_later_standard_has_is_found(torch_of_c17, tmp_path):
    source = tmp_path / "size.cpp"
    source.write_text("#include <vector>\nlong size(std::vector<int> x) { return std::ssize(x); }\n")
    assert "error" in abi_check.complaint(source, torch_of_c17)
    source.write_text("#include <vector>\nlong size(std::vector<int> x) { return x.size(); }\n")
    assert abi_check.complaint(source, torch_of_c17) is None


def test_a_macro_that_a_versions_headers_lack_is_found(torch_of_c17, tmp_path):
    source = tmp_path / "macro.cpp"
    source.write_text("#include <torch/later.h>\nvoid f() {}\n")
    assert "torch/later.h" in abi_check.complaint(source, torch_of_c17)


def test_undefined_symbols_of_torchs_unstable_namespaces_are_found(tmp_path):
    source, library = tmp_path / "library.cpp", tmp_path / "library.so"
    source.write_text("namespace at { void on(); } namespace hat { void on(); }\nvoid f() { at::on(); hat::on(); }")
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, source], check=True)
    assert abi_check.forbidden_symbols(library) == ["at::on()"]


def test_the_built_library_needs_no_unstable_symbol():
    libraries = list((abi_check.ROOT / "tinyllm").glob("_C*.so"))
    if not libraries:
        pytest.skip("the extension is not built here")
    assert not [symbol for library in libraries for symbol in abi_check.forbidden_symbols(library)]


def test_without_an_index_the_newest_headers_here_stand_for_the_newest(tmp_path, monkeypatch, capsys):
    def no_network(*arguments):
        raise RuntimeError("pip index: no network")

    monkeypatch.setattr(abi_check, "pip", no_network)
    monkeypatch.setattr(abi_check, "CACHE", tmp_path)
    for version in ("2.9.1", "2.10.0"):
        (tmp_path / version).mkdir()
    assert abi_check.newest() == "2.10.0"
    assert "The newest torch cannot be had (pip index: no network); torch 2.10.0" in capsys.readouterr().out


def test_a_private_name_that_a_version_lacks_is_found(tmp_path):
    for name, found in abi_check.PRIVATE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(found))
    assert abi_check.missing(tmp_path) == []
    (tmp_path / "torch/autograd/forward_ad.py").write_text("current_level = -1")
    assert abi_check.missing(tmp_path) == ["  torch/autograd/forward_ad.py: no '_current_level = '"]
