"""Build the sdist and the wheel, install the wheel outside of the checkout, and use it there:

    python tests/building/wheel_check.py [--installed]

The environment is a new one, which holds tinyllm and what its metadata ask for, nothing else, first without extras and
then with that of training: a dependence that is not declared is an import that fails. Nothing is downloaded, since the
packages are those of the environment that runs this.
--installed builds and installs nothing, and uses the tinyllm of the environment that runs this.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOADED = """
import sys, tinyllm
from pathlib import Path
site = Path(tinyllm.__file__).parents[1]
assert site.is_relative_to(sys.prefix) and site.name == "site-packages", site
facts = tinyllm.info()["extension"]
assert facts["loaded"], facts["why_not"]
import tinyllm.kernels, tinyllm.benchmarks
"""
BASE = """
import torch, tinyllm
model = tinyllm.SimpleLLM(65, 16, 32, 2, num_heads=2, causal=True, norm_first=True)
loss = model.loss(torch.randint(65, (2, 9)), torch.randint(65, (2, 9)))
loss.backward()
tinyllm.generate(model.eval(), torch.tensor([[1, 2]]), 3)
tinyllm.optimize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)), "int8")
try:
    tinyllm.train
except ModuleNotFoundError as error:
    assert "tinyllm[train]" in str(error), error
else:
    raise SystemExit("training needs no extra; pyproject.toml says that it does")
"""
MOST_BYTES = 40e6  # of the wheel; what else it downloads where torch is there, numpy and safetensors, has 18 MB
TEXT = "def add(a, b):\n    return a + b\n\n\n" * 200


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command in a folder and say how long it took; end this program where it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = " ".join(str(word) for word in command if "\n" not in str(word))
    print(f"{time.perf_counter() - start:5.1f} s  {said}", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\n{said}: exit status {done.returncode}")


def archives(out: Path) -> Path:
    """Build both archives and return the wheel."""
    for folder in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:
        shutil.rmtree(folder)  # whose modules of an earlier build would be packed along; the objects stay
    for kind in ("--sdist", "--wheel"):
        run(sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", out, ROOT, cwd=out)
    run(sys.executable, "-m", "twine", "check", "--strict", *out.iterdir(), cwd=out)
    return next(out.glob("*.whl"))


def needed(wheel: Path, extra: str = "") -> list[metadata.Distribution]:
    """Return the distributions that an installation of a wheel with an extra brings along."""
    from packaging.requirements import Requirement

    (described,) = metadata.distributions(path=[str(wheel)])
    found: dict[tuple[str, str], metadata.Distribution] = {}
    queue = [(described, extra)]
    while queue:
        distribution, extra = queue.pop()
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            there = metadata.distribution(requirement.name)
            if not requirement.specifier.contains(there.version, prereleases=True):
                raise SystemExit(f"{requirement} is asked for, but {there.version} is installed")
            for more in ("", *requirement.extras):
                if (there.name, more) not in found:
                    found[there.name, more] = there
                    queue.append((there, more))
    return list(found.values())


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel and links to all that it needs in a new environment; return its folder of programs."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=folder)
    link(needed(wheel), folder)
    return folder / "bin"


def use_base(wheel: Path, programs: Path, folder: Path) -> None:
    """Use what an installation without extras has; end this program where it needs more than it should."""
    folder.mkdir()
    run(programs / "python", "-c", BASE, cwd=folder)
    for command in ("info", "doctor"):
        run(programs / "tinyllm", command, cwd=folder)
    refused = subprocess.run([programs / "tinyllm", "train"], cwd=folder, capture_output=True, text=True)
    if refused.returncode != 2 or "tinyllm[train]" not in refused.stderr:
        raise SystemExit(f"tinyllm train without its extra: status {refused.returncode}, {refused.stderr}")
    size = wheel.stat().st_size
    print(f"        the wheel has {size / 1e6:.1f} MB", flush=True)
    if size > MOST_BYTES:
        raise SystemExit(f"it should have {MOST_BYTES / 1e6:.0f} MB at most")


def link(distributions: list[metadata.Distribution], folder: Path) -> None:
    """Lend an environment distributions of this one."""
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in distributions:
        for name in {path.parts[0] for path in distribution.files or () if path.parts[0] != ".."}:
            source = Path(str(distribution.locate_file(name)))
            if name != "__pycache__" and source.exists() and not (site / name).exists():
                (site / name).symlink_to(source)


def use(programs: Path, folder: Path) -> None:
    """Import the installed package, compare its kernels with PyTorch, train five steps and generate."""
    tinyllm = programs / "tinyllm"
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    run(programs / "python", "-c", LOADED, cwd=folder)
    run(tinyllm, "--version", cwd=folder)
    run(tinyllm, "check", "--device", "cpu", cwd=folder)
    training = ["--preset", "tiny", "--steps", "5", "--seq-len", "16", "--device", "cpu", "--out", "run"]
    run(tinyllm, "train", "--data", "text.txt", *training, cwd=folder)
    run(tinyllm, "generate", "--run", "run", "--prompt", "def", "--max-new-tokens", "5", cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--installed", action="store_true", help="use the tinyllm that is installed here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if options.installed:
            use(Path(sys.executable).parent, folder / "work")
            return
        (folder / "dist").mkdir()
        wheel = archives(folder / "dist")
        programs = install(wheel, folder / "environment")
        use_base(wheel, programs, folder / "work")
        link(needed(wheel, "train"), folder / "environment")
        use(programs, folder / "work")
        link(needed(wheel, "test"), folder / "environment")
        measure = ["bench", "--quick", "--only", "embedding*positions forward 12x64", "--out", "results"]
        run(programs / "tinyllm", *measure, cwd=folder / "work")
        if not list((folder / "work" / "results").rglob("*.json")):
            raise SystemExit("tinyllm bench wrote no results where it was told to")


if __name__ == "__main__":
    main()
