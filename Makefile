# Needs Python >= 3.10 with venv and a C++ compiler; nvcc is optional, cmake and ninja come from PyPI where missing.
#   make demo                       environment, installation, a grid of samples and a reconstructed photograph in out/
#   make test                       environment, installation, all tests
#   make bench                      speed report of this machine, in benchmarks/reports/
#   make bench BENCH="--reference-repo PATH"    beside a checkout of the reference implementation
#   make gpu                        proves the library on a GPU in eight minutes; a rehearsal where there is none
#   make gpu-wheel                  a binary and the golden files for a GPU machine elsewhere, in build/gpu-wheel
#   make test PYTHON=python3.12 VENV=/tmp/env TORCH="torch --index-url URL"

PYTHON ?= python3
VENV ?= .venv
# Installed only where $(VENV) has no torch yet. One release by name, because a range would take the newest, which on
# Linux comes with gigabytes of CUDA libraries; where pip offers a CPU wheel of this release, it takes that.
TORCH ?= torch==2.13.0
OUT ?= out
BENCH ?=
GPU ?=
WHEEL ?=
PHOTO ?= $(OUT)/photo.png

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py build_backend.py CMakeLists.txt $(wildcard csrc/*)

CXX_FILES = $(wildcard $(addprefix csrc/*.,h cpp cu) $(addprefix tests/*/*.,h cpp cu) $(addprefix benchmarks/*/*.,h cpp cu))

.PHONY: demo test bench gpu gpu-wheel lint format build clean

demo: $(VENV)/installed-demo $(PHOTO)
	$(BIN)/alitok-fast info
	$(BIN)/alitok-fast sample --grid $(OUT)/demo.png
	$(BIN)/alitok-fast reconstruct $(PHOTO) --tile --out $(OUT)/reconstruction.png

$(OUT)/photo.png: | $(VENV)/installed-demo
	mkdir -p $(OUT)
	$(BIN)/python -c "from skimage import data, io; io.imsave('$@', data.astronaut())"

# Benchmarks without --benchmark run once each, as correctness checks.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest benchmarks -q
	$(BIN)/python -m pytest tests -q

bench: $(VENV)/installed-bench
	$(BIN)/python -m pytest benchmarks --benchmark $(BENCH)

# With a Python that has what this needs, as machines with a GPU often do, nothing is installed and nothing downloaded.
gpu:
	@if $(PYTHON) -c "import numpy, PIL, pytest, rich, safetensors, torch, typer" 2>/dev/null; then \
	  $(PYTHON) benchmarks/gpu_check.py $(GPU); \
	else \
	  $(MAKE) --no-print-directory $(VENV)/installed-test && $(BIN)/python benchmarks/gpu_check.py $(GPU); \
	fi

gpu-wheel:
	$(PYTHON) benchmarks/gpu/wheel.py $(WHEEL)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# In place, so that the tests run from the checkout. The build folder is kept: only what changed is compiled.
$(VENV)/installed-%: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet numpy $(TORCH)
	touch $@

build:  ## the extension alone, in place, for the environment that is active
	python setup.py build_ext --inplace

clean:
	rm -rf build alitok_fast/_C*.so
