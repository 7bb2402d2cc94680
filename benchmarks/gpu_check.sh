#!/usr/bin/env bash
# Tests and benchmarks on a machine with an NVIDIA GPU: benchmarks/gpu_check.sh [OUT] [--quick] [--only-bench]
#
# Needed: Linux, Python 3.10 or later with torch for CUDA, triton and pytest (PYTHON names another than python3). No
# network. Nothing of the machine is changed: the package is installed into a temporary folder, its source copied there.
#
#   OUT            where at most five files go: machine.json tests.txt bench.json and pictures (default: gpu-results)
#   --quick        three minutes instead of nine, without the CPU extension
#   --only-bench   neither installs nor tests: from the source tree
#
# A stage that fails is noted, the next ones follow; the exit status is 1 then. Without a GPU the tables say so.
set -uo pipefail

out=gpu-results quick="" only_bench=""
for argument in "$@"; do
    case $argument in
    --quick) quick=--quick ;;
    --only-bench) only_bench=yes ;;
    -*) echo "unknown option $argument" >&2 && exit 2 ;;
    *) out=$argument ;;
    esac
done
# Seconds: for all, and for the stages before the benchmarks, which have the rest.
if [ -n "$quick" ]; then total=165 install_s=40 tests_s=50; else total=520 install_s=180 tests_s=150; fi

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python=$(command -v "${PYTHON:-python3}") || { echo "there is no ${PYTHON:-python3}" >&2 && exit 2; }
[ "${python#/}" = "$python" ] && python=$PWD/$python
export TINYLLM_COMMIT=${TINYLLM_COMMIT:-$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null)}
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONIOENCODING=utf-8
unset TRITON_INTERPRET

stages=() failed=""
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
        failed=yes
        tail -n 15 "$work/$name.txt"
    fi
    return $status
}
note() {
    stages+=("$1: $2, $3 s")
    echo "$1: $2, $3 s"
}

mkdir "$work/src" "$work/site" "$work/run"
for part in csrc kernels tinyllm benchmarks tests pyproject.toml setup.py MANIFEST.in README.md; do
    cp -r "$root/$part" "$work/src/"
done
rm -f "$work"/src/tinyllm/_C*.so "$work"/src/tinyllm/_build.json
cp -r "$work/src/tests" "$work/run/"
cd "$work/run" || exit 2 # where no source lies that would stand before what is installed

gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')" 2>/dev/null)
echo "${gpu:-There is no GPU}; commit ${TINYLLM_COMMIT:-unknown}"

from_source() {
    rm -rf "$work/site"
    mkdir "$work/site"
    cp -r "$work/src/tinyllm" "$work/site/"
    cp -r "$work/src/kernels" "$work/src/benchmarks" "$work/site/tinyllm/"
    note install "as the source is, without compiling anything" 0
}
if [ -n "$only_bench" ]; then
    from_source
else
    TINYLLM_EXT=$([ -n "$quick" ] && echo 0 || echo auto) stage install "$install_s" \
        "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation \
        --target "$work/site" "$work/src" || from_source
fi

if [ -n "$only_bench" ]; then
    note tests "not run" 0
elif [ -z "$gpu" ]; then
    note tests "not run: no GPU" 0
else
    # Compiling is most of their time: several at once where pytest can do that.
    many=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null)
    # shellcheck disable=SC2086
    stage tests "$tests_s" "$python" -m pytest -q -ra -p no:cacheprovider $many tests/gpu
fi

seconds=$((total - SECONDS - 15))
stage bench $((seconds + 15)) "$python" -m tinyllm.benchmarks.gpu --out "$out" --seconds "$seconds" $quick

{
    printf '%s\n' "${stages[@]}"
    for name in install tests bench; do
        [ -f "$work/$name.txt" ] && printf '\n== %s\n' "$name" && tail -n 400 "$work/$name.txt"
    done
} >"$out/tests.txt"

"$python" - "$out/machine.json" "${stages[@]}" <<'EOF'
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
facts = {
    "commit": os.environ.get("TINYLLM_COMMIT") or None,
    "stages": sys.argv[2:],
    "gpu": said("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
    "nvidia_smi": said("nvidia-smi"),
    "nvcc": said("nvcc", "--version"),
    "python": platform.python_version(),
    "system": platform.platform(),
    "cores": os.cpu_count(),
    "versions": {name: version(name) for name in ("torch", "triton", "liger-kernel", "numpy", "pytest")},
}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write(json.dumps(facts, indent=1) + "\n")
EOF
[ $? -eq 0 ] || failed=yes

echo
"$python" - "$out/bench.json" <<'EOF' || failed=yes
import pathlib, sys
from tinyllm.benchmarks import gpu_report
print(gpu_report.render_table(gpu_report.load(pathlib.Path(sys.argv[1])), headline=True))
EOF
echo
printf '%s\n' "${stages[@]}"
echo "$(ls "$out" | wc -l) files in $out, $SECONDS s"
[ -z "$failed" ]
