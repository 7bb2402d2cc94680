# Every target makes .venv and installs what it needs; nothing else has to be run first.
#   make demo    train the tiny preset for about a minute, generate, show the speed beside plain PyTorch
#   make dev     what working on the code needs, into .venv
#   make test    all tests
#   make bench   benchmarks against PyTorch; updates benchmarks/results/, docs/benchmarks.md and the README's table
#   make train-bench    how fast training is beside plain PyTorch and Hugging Face; updates the same
#   make generation-bench    how fast models write beside Hugging Face, CTranslate2 and llama.cpp; updates the same
#   make optimize-bench    models of transformers before and after `tinyllm.optimize`; updates the same
#   make report    one page in HTML of the stored benchmark results, into build/report
#   make lint    ruff, mypy, import-linter, clang-format
#   make docs    the site of docs/, into build/site
#   make abi-check      all sources against the headers of torch 2.10, 2.11 and the newest torch
#   make campaigns      of these five those whose sources have changed since they passed; half an hour for all:
#   make gpu-compile    the GPU kernels' registers, spills and shared memory, read without a GPU
#   make cpu-sanitize   the CPU kernels of every instruction set that this machine has, watched by the sanitizers
#   make avx512-check   the CPU kernels of AVX-512, emulated on a processor that has only AVX2
#   make aarch64-check  the CPU kernels of aarch64, cross compiled and run in qemu
#   make cuda-sanitize  the CUDA C++ kernels on emulated threads, watched by the sanitizers
#   make gpu-tiles      gpu-compile of Triton's kernels with every tile that tuning may choose; it takes long
#   make wheel-check    builds the archives, installs the wheel elsewhere and uses it
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
TESTED := $(wildcard tests/emulation/*.h tests/emulation/*.cpp tests/building/*.cpp tests/building/avx512/*)

.PHONY: demo dev test bench train-bench generation-bench optimize-bench report lint abi-check gpu-compile gpu-tiles cpu-sanitize cuda-sanitize avx512-check aarch64-check campaigns wheel-check docs format clean

# What building and checking need; torch is pinned, so that no other one is downloaded.
.venv/tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch numpy "setuptools>=77" wheel pybind11 ninja
	touch $@

# What using tinyllm needs. One that is built again compiles what has changed.
.venv/installed: .venv/tools setup.py $(SOURCES)
	@echo "Building and installing tinyllm (one to three minutes)"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[train]"
	touch $@

# What developing it needs besides; tinyllm itself is installed once more by the way, which takes seconds.
.venv/dev: .venv/tools | .venv/installed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

dev: .venv/installed .venv/dev

demo: .venv/installed
	$(BIN)/tinyllm info
	$(BIN)/tinyllm train --preset tiny --steps $(or $(STEPS),380) --out runs/demo --overwrite
	$(BIN)/tinyllm generate --run runs/demo --prompt "def" --max-new-tokens 120 --seed 1
	$(BIN)/python -m benchmarks.model_speed --run runs/demo

# Two processes, since most of the tests' time is Python's; a file's tests stay in one, for what they share. Threads that
# wait leave their core to the other process.
test: .venv/installed .venv/dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile

bench: .venv/installed .venv/dev
	$(BIN)/tinyllm bench

train-bench: .venv/installed .venv/dev
	$(BIN)/python -m benchmarks.training

# llama.cpp is built for this processor, in a few minutes; where that fails, it does not take part.
generation-bench: .venv/installed .venv/dev
	$(PIP) install -q -c constraints.txt transformers ctranslate2
	-CMAKE_ARGS=-DGGML_NATIVE=ON $(PIP) install -q -c constraints.txt llama-cpp-python gguf
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.guesses

optimize-bench: .venv/installed .venv/dev
	$(BIN)/python -m benchmarks.optimizing

report: .venv/installed .venv/dev
	$(BIN)/tinyllm bench --report build/report

lint: .venv/installed .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(TESTED)

abi-check: .venv/installed .venv/dev
	$(BIN)/python -m tests.building.abi_check

gpu-compile: .venv/installed .venv/dev
	$(BIN)/python -m tests.building.cuda_compile
	$(BIN)/python -m tests.building.gpu_compile

gpu-tiles: .venv/installed .venv/dev
	$(BIN)/python -m tests.building.gpu_compile --every-tile

cpu-sanitize: .venv/installed .venv/dev
	$(BIN)/python -m tests.building.cpu_sanitize

# As root it installs the emulation's headers where they are missing, by apt-get.
avx512-check: .venv/installed .venv/dev
	$(BIN)/python -m tests.building.avx512_check

# As root it installs the cross compiler and qemu where they are missing, by apt-get.
aarch64-check: .venv/installed .venv/dev
	$(BIN)/python -m tests.building.aarch64_check

# In the other order of threads than `make test`: what asynchronous copies do then happens at once. Python itself is not
# built with the sanitizers, so their libraries come first by force, and its own leaks are left alone.
cuda-sanitize: .venv/installed .venv/dev
	library=$$($(BIN)/python -m tests.emulation.build --sanitize) && \
	export TINYLLM_EMULATED_CUDA=$$library TINYLLM_EMULATED_SCHEDULE=backward TINYLLM_TEST_BACKENDS=cuda \
	ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" && \
	$(BIN)/python -m pytest -n $(or $(WORKERS),2) -m cuda tests/ops tests/kernels

campaigns: .venv/installed .venv/dev
	$(BIN)/python -m tests.building.campaigns

# The archives as users get them, in an environment that has nothing else.
wheel-check: .venv/installed .venv/dev
	$(BIN)/python tests/building/wheel_check.py

docs: .venv/installed .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

format: .venv/installed .venv/dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(TESTED)
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .venv tinyllm/_build.json tinyllm/_C*.so
