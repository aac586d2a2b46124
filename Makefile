# Needs Python >= 3.10 with venv and a C++ compiler; nvcc is optional, cmake and ninja come from PyPI where missing.
#   make demo                       environment, installation, a grid of samples and a reconstructed photograph in out/
#   make test                       environment, installation, all tests but the slow ones
#   make test-all                   the slow ones too: packages, kills and resumes, nvcc, models of the released sizes
#   make test-lowest                with the oldest releases that pyproject.toml allows
#   make sanitize                   the operators' tests and the fuzzer under AddressSanitizer and UBSan
#   make bench                      speed report of this machine, in benchmarks/reports/
#   make bench BENCH="--reference-repo PATH"    beside a checkout of the reference implementation
#   make gpu                        proves the library on a GPU in eight minutes; a rehearsal where there is none
#   make gpu-wheel                  a binary and the golden files for a GPU machine elsewhere, in build/gpu-wheel
#   make test PYTHON=python3.12 VENV=/tmp/env TORCH="torch --index-url URL"

PYTHON ?= python3
VENV ?= .venv
# Installed only where $(VENV) has no torch yet. One release by name, because a range would take the newest, which on
# Linux comes with gigabytes of CUDA libraries; where pip offers a CPU wheel of this release, it takes that. The
# torchvision is the one that fits it: a newer one would bring another torch.
TORCH ?= torch==2.13.0 torchvision==0.28.0
OUT ?= out
BENCH ?=
GPU ?=
# Processes that run the tests; each has one thread, since threads of several would wait for each other.
WORKERS ?= 2
WHEEL ?=
PHOTO ?= $(OUT)/photo.png

BIN := $(VENV)/bin
PYTEST = $(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
WITH_BIN := PATH="$(abspath $(BIN)):$$PATH"
SOURCES := pyproject.toml setup.py build_backend.py CMakeLists.txt $(wildcard csrc/*)

CXX_FILES = $(wildcard $(addprefix csrc/*.,h cpp cu) $(addprefix tests/*/*.,h cpp cu) $(addprefix benchmarks/*/*.,h cpp cu))

.PHONY: demo test test-all test-lowest sanitize bench gpu gpu-wheel lint format build clean

# An environment that was moved or copied is made anew, since its scripts begin with the path of its interpreter; one
# that belonged to another checkout gets this one installed.
CLEAR :=
ifneq ($(wildcard $(VENV)/place),)
ifneq ($(firstword $(shell cat $(VENV)/place)),$(abspath $(VENV)))
CLEAR := --clear
$(info $(VENV) was made in another place: it is made anew)
$(shell rm -f $(VENV)/torch)
endif
ifneq ($(shell cat $(VENV)/place),$(abspath $(VENV)) $(CURDIR))
$(shell rm -f $(VENV)/installed-*)
endif
endif

demo: $(VENV)/installed-demo $(PHOTO)
	$(BIN)/alitok-fast info
	$(BIN)/alitok-fast sample --grid $(OUT)/demo.png
	$(BIN)/alitok-fast reconstruct $(PHOTO) --tile --out $(OUT)/reconstruction.png

$(OUT)/photo.png: | $(VENV)/installed-demo
	mkdir -p $(OUT)
	$(BIN)/python -c "from skimage import data, io; io.imsave('$@', data.astronaut())"

# Benchmarks without --benchmark run once each, as correctness checks.
test: $(VENV)/installed-test
	$(PYTEST) benchmarks tests -m "not slow"

test-all: $(VENV)/installed-test
	$(PYTEST) benchmarks tests

test-lowest: $(VENV)/installed-test
	$(BIN)/python tests/lowest.py

# The CPU kernels in a build of their own, under AddressSanitizer and UBSan, with the operators' tests and the fuzzer.
sanitize: $(VENV)/installed-test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/fuzz/sanitize.py

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
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# In place, so that the tests run from the checkout. The build folder is kept: only what changed is compiled. The
# extension is built before pip is called, which would not show how far it is.
$(VENV)/installed-%: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet "setuptools>=77"
	$(WITH_BIN) $(BIN)/python -c "import build_backend; print(*build_backend.requirements(), sep='\n')" > $(VENV)/tools.txt
	if grep -q . $(VENV)/tools.txt; then $(BIN)/python -m pip install --requirement $(VENV)/tools.txt; fi
	$(WITH_BIN) $(BIN)/python setup.py build_ext --inplace
	$(WITH_BIN) $(BIN)/python -m pip install --no-build-isolation --editable ".[$*]"
	echo "$(abspath $(VENV)) $(CURDIR)" > $(VENV)/place
	touch $@

$(VENV)/torch:
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install numpy $(TORCH)
	touch $@

build:  ## the extension alone, in place, for the environment that is active
	python setup.py build_ext --inplace

clean:
	rm -rf build alitok_fast/_C*.so
