#!/usr/bin/env bash
# Builds, tests and benchmarks on a machine with an NVIDIA GPU, in two calls of at most nine minutes each:
#
#     benchmarks/gpu_check.sh [OUT] --site=DIR                  builds, installs into DIR, and tests
#     benchmarks/gpu_check.sh [OUT] --site=DIR --only-bench     measures what the first call left in DIR
#
# or, to see whether all is well, in one call of three minutes:
#
#     benchmarks/gpu_check.sh [OUT] --quick
#
# Needed: Linux, Python 3.10 or later with torch for CUDA, triton and pytest (PYTHON names another than python3). No
# network. With an nvcc of torch's CUDA the CUDA C++ kernels are built, for this GPU alone. Nothing of the machine is
# changed: the package is installed into a temporary folder, its source copied there.
#
#   OUT            where the files go (default: gpu-results): machine.json, tests.txt, and of measuring gpu.json,
#                  pictures and, from a call of its own, bench.txt
#   --quick        tests and measures some, without compute-sanitizer and, where there is no nvcc, without compiling
#                  anything
#   --only-bench   neither installs nor tests; where DIR is empty, from the source tree, without what would have to be
#                  compiled
#   --site=DIR     installs into DIR and leaves it there (default: a folder that is removed at the end)
#
# A stage that fails is noted, the next ones follow; the exit status is 1 then. Without a GPU the tables say so.
set -uo pipefail

out=gpu-results quick="" only_bench="" site=""
for argument in "$@"; do
    case $argument in
    --quick) quick=--quick ;;
    --only-bench) only_bench=yes ;;
    --site=?*) site=${argument#--site=} ;;
    -*) echo "unknown option $argument" >&2 && exit 2 ;;
    *) out=$argument ;;
    esac
done
# Seconds: for all, and at most for each stage before the benchmarks, which have the rest. The tests of Triton's kernels,
# which compile for most of their time, run beside the stages of CUDA C++, which together may take as long.
if [ -n "$quick" ]; then
    total=175 install_s=90 info_s=15 triton_s=40 cuda_s=40 probe_s=0 sanitizer_s=0
else
    total=520 install_s=190 info_s=20 triton_s=295 cuda_s=110 probe_s=25 sanitizer_s=80
fi

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
site=${site:-$work/site}
mkdir -p "$site" && site=$(cd "$site" && pwd) || exit 2
python=$(command -v "${PYTHON:-python3}") || { echo "there is no ${PYTHON:-python3}" >&2 && exit 2; }
[ "${python#/}" = "$python" ] && python=$PWD/$python
export TINYLLM_COMMIT=${TINYLLM_COMMIT:-$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null)}
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONIOENCODING=utf-8
unset TRITON_INTERPRET TINYLLM_EMULATED_CUDA

# stage NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, keeps what it says in $work/NAME.txt, notes how it went.
stage() {
    local name=$1 limit=$2 start=$SECONDS status outcome=ok
    shift 2
    # Interrupted first, so that pytest still says what has failed.
    timeout -s INT -k 10 "$limit" "$@" >"$work/$name.txt" 2>&1
    status=$?
    if [ $status -eq 124 ] || [ $status -eq 137 ]; then outcome="not done in $limit s"; fi
    if [ $status -ne 0 ] && [ "$outcome" = ok ]; then outcome="failed with status $status"; fi
    note "$name" "$outcome" $((SECONDS - start))
    if [ $status -ne 0 ]; then
        touch "$work/failed"
        tail -n 15 "$work/$name.txt"
    fi
    return $status
}
# In a file, because stages that run beside each other note themselves.
note() {
    echo "$1: $2, ${3:-0} s" | tee -a "$work/stages"
}

mkdir "$work/src" "$work/run"
for part in csrc kernels tinyllm benchmarks tests pyproject.toml setup.py MANIFEST.in README.md; do
    cp -r "$root/$part" "$work/src/"
done
rm -f "$work"/src/tinyllm/_C*.so "$work"/src/tinyllm/_build.json
cp -r "$work/src/tests" "$work/src/benchmarks" "$work/run/"
cd "$work/run" || exit 2 # where no source lies that would stand before what is installed

# The GPU, its capability as TORCH_CUDA_ARCH_LIST writes it (wgmma and setmaxnreg are in 9.0a alone), and the toolkit
# that torch would build with.
mapfile -t facts < <("$python" -c '
import os, torch
there = torch.cuda.is_available()
capability = ".".join(map(str, torch.cuda.get_device_capability())) if there else ""
print(torch.cuda.get_device_name() if there else "")
print(capability + "a" * (capability == "9.0"))
from torch.utils.cpp_extension import CUDA_HOME
print(CUDA_HOME if CUDA_HOME and os.access(os.path.join(CUDA_HOME, "bin", "nvcc"), os.X_OK) else "")' 2>/dev/null)
gpu=${facts[0]:-} capability=${facts[1]:-} toolkit=${facts[2]:-}
echo "${gpu:-There is no GPU}; commit ${TINYLLM_COMMIT:-unknown}"

from_source() {
    rm -rf "$site/tinyllm"
    cp -r "$work/src/tinyllm" "$site/"
    cp -r "$work/src/kernels" "$work/src/benchmarks" "$site/tinyllm/"
    note install "as the source is, without compiling anything"
}
if [ -n "$only_bench" ] && [ -e "$site/tinyllm/__init__.py" ]; then
    note install "as an earlier call left it"
elif [ -n "$only_bench" ]; then
    from_source
else
    with_ext=auto with_cuda=auto
    if [ -n "$gpu" ] && [ -n "$toolkit" ]; then
        with_ext=1 with_cuda=1 # so that what stands against it is an error, and told
        export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} MAX_JOBS=${MAX_JOBS:-$(nproc)}
    elif [ -n "$quick" ]; then
        with_ext=0 with_cuda=0
    fi
    TINYLLM_EXT=$with_ext TINYLLM_CUDA=$with_cuda stage install "$install_s" \
        "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation --upgrade \
        --target "$site" "$work/src" || from_source
fi

# What is served by what; it fails where CUDA C++ was built and does not load.
stage info "$info_s" "$python" -c '
import sys
from tinyllm._info import print_info
from tinyllm.ops.backends import cpp, cuda
print_info()
with open(sys.argv[1], "w") as file:
    file.write(cuda.why_not or "")
if cpp.build_record().get("cuda") == "built" and cuda.why_not is not None:
    sys.exit(f"CUDA C++ was built, but: {cuda.why_not}")' "$work/no_cuda"
no_cuda=$(cat "$work/no_cuda" 2>/dev/null || echo "tinyllm does not load")

# Each of the many test processes compiles one kernel at a time, instead of starting a process for each core.
export TORCHINDUCTOR_COMPILE_THREADS=1

# tests NAME LIMIT BACKEND OPTIONS...: with those options whose plugin is there, named before them.
tests() {
    local name=$1 limit=$2 backend=$3 options=()
    shift 3
    while [ $# -gt 0 ]; do
        # shellcheck disable=SC2206
        if "$python" -c "import $1" 2>/dev/null; then options+=($2); fi
        shift 2
    done
    stage "$name" "$limit" "$python" -m pytest -q -ra -p no:cacheprovider ${options[@]+"${options[@]}"} \
        -m "$backend" tests/ops tests/kernels tests/generation/test_cuda_graph.py
}

sanitizer=$(command -v compute-sanitizer)
for path in "$toolkit/bin/compute-sanitizer" "$toolkit/compute-sanitizer/compute-sanitizer"; do
    if [ -z "$sanitizer" ] && [ -x "$path" ]; then sanitizer=$path; fi
done
# Small calls of every CUDA C++ operator, watched.
sanitize() {
    local tool why="" options
    if [ -n "$quick" ]; then
        why="not run: --quick"
    elif [ -z "$sanitizer" ]; then
        why="not run: compute-sanitizer is not there"
    elif ! timeout -k 5 "$probe_s" "$sanitizer" "$python" -c 'import torch; torch.ones(1).cuda()' >/dev/null 2>&1; then
        why="not run: compute-sanitizer cannot watch this GPU" # as in some virtual machines
    fi
    for tool in memcheck racecheck; do
        if [ -n "$why" ]; then
            note $tool "$why"
        else
            options=(--tool $tool --error-exitcode 9)
            # What the driver refuses PyTorch is no error of ours, and of ours every launch is checked.
            [ $tool = memcheck ] && options+=(--report-api-errors no)
            # Every tensor an allocation of its own, so that memcheck knows where it ends.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage $tool "$sanitizer_s" "$sanitizer" "${options[@]}" \
                "$python" -m tinyllm.benchmarks.gpu_sanitize
        fi
    done
}

if [ -n "$only_bench" ]; then
    note tests "not run"
elif [ -z "$gpu" ]; then
    note tests "not run: no GPU"
else
    tests tests-triton "$triton_s" triton xdist "-n 12" &
    if [ -n "$no_cuda" ]; then
        note tests-cuda "not run: $no_cuda"
    else
        # Only torch.compile compiles here, and its tests have longer (tests/conftest.py): another that takes long waits
        # for a kernel that does not end.
        tests tests-cuda "$cuda_s" cuda xdist "-n 4" pytest_timeout "--timeout=20 --timeout-method=thread"
        sanitize
    fi
    wait
fi

if [ -z "$quick$only_bench" ]; then
    note bench "not run: the next call measures, with --only-bench and this call's --site"
else
    unset TORCHINDUCTOR_COMPILE_THREADS
    seconds=$((total - SECONDS - 15))
    [ $seconds -ge 15 ] || seconds=15
    stage bench $((seconds + 15)) "$python" -m tinyllm.benchmarks.gpu --out "$out" --seconds "$seconds" $quick
fi

{
    cat "$work/stages"
    for name in install info tests-triton tests-cuda memcheck racecheck bench; do
        [ -f "$work/$name.txt" ] && printf '\n== %s\n' "$name" && tail -n 400 "$work/$name.txt"
    done
} >"$out/$([ -n "$only_bench" ] && echo bench || echo tests).txt"

mapfile -t stages <"$work/stages"
"$python" - "$out/machine.json" "$sanitizer" "${stages[@]}" <<'EOF'
import importlib.metadata, json, os, platform, subprocess, sys

def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
commit, stages = os.environ.get("TINYLLM_COMMIT") or None, sys.argv[3:]
try:  # of an earlier call's stages, those that this one has not run
    with open(sys.argv[1], encoding="utf-8") as file:
        before = json.load(file)
    names = {stage.split(":")[0] for stage in stages} | {"tests"}
    if before["commit"] == commit:
        stages = [stage for stage in before["stages"] if stage.split(":")[0] not in names] + stages
except (OSError, ValueError, KeyError):
    pass
facts = {
    "commit": commit,
    "stages": stages,
    "gpu": said("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
    "nvidia_smi": said("nvidia-smi"),
    "nvcc": said("nvcc", "--version"),
    "compute_sanitizer": said(sys.argv[2], "--version") if sys.argv[2] else None,
    "python": platform.python_version(),
    "system": platform.platform(),
    "cores": os.cpu_count(),
    "versions": {name: version(name) for name in ("torch", "triton", "liger-kernel", "numpy", "pytest")},
}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write(json.dumps(facts, indent=1) + "\n")
EOF
[ $? -eq 0 ] || touch "$work/failed"

echo
[ -f "$work/bench.txt" ] && cat "$work/bench.txt"
cat "$work/stages"
echo "$(ls "$out" | wc -l) files in $out, $SECONDS s"
[ ! -e "$work/failed" ]
