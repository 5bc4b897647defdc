# Two commands: `make demo` makes images with the runtime alone, `make test` does everything else. `make help` lists all.
PYTHON ?= python3
LABELS ?= all
COUNT ?= 2
SEED ?= 1
OUT ?= out/demo.png

RUN_ENV := .venv
DEV_ENV := .venv-dev
GPU_EXTRA ?= tensorrt-rtx
GPU_BUNDLE ?= models/demo
GPU_MINUTES ?= 8
GPU_OUT ?= out/gpu-report
# More of 'parvis bench --suite gpu' for the report: GPU_MORE="--parts baselines --sizes 3B".
GPU_MORE ?=
# The report installs nothing: it takes the environment of the tests where there is one, else the system's Python.
REPORT_PYTHON ?= $(or $(wildcard $(DEV_ENV)/bin/python),$(PYTHON))
# As many processes as there are CPUs, but each holds a copy of what the tests share, of up to 2 GB. One that has run its
# part of the tests takes over some of another's. PyTorch takes one thread in each: more of them, on models of this size,
# wait for each other on cores that are in use, and take three times as much CPU time.
AT_ONCE ?= -n logical --maxprocesses 4 --dist worksteal
# The environment of the tests is installed without bytecode, since few of its modules are ever imported. So Python must be
# allowed to write it, or each of the hundreds of processes of the tests compiles what it imports.
unexport PYTHONDONTWRITEBYTECODE
KERNELS := $(wildcard runtime/par_runtime/backends/native/*)
SOURCES := $(shell find runtime export calibration par_model -name '*.py') $(KERNELS)

.PHONY: help demo test test-all has-driver test-gpu gpu-report gpu-docs lint format clean

demo: $(RUN_ENV)/.installed  ## images from the shipped bundle; installs the runtime alone into .venv (0.2 GB, a minute); takes LABELS="micah dylan" COUNT=4 SEED=7 OUT=out/my.png PYTHON=python3.12
	$(RUN_ENV)/bin/parvis generate models/demo --label $(LABELS) --count $(COUNT) --seed $(SEED) --columns 8 --out $(OUT)

help:  ## this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: lint  ## lint, types and tests: 8 minutes on 2 old cores; the first time installs .venv-dev (2.7 GB, with CUDA more)
	@echo "Now the tests: about 7 minutes on 2 old cores."
	OMP_NUM_THREADS=1 $(DEV_ENV)/bin/python -m pytest $(AT_ONCE)

# Two at once: each of them takes up to 7 GB.
test-all: test  ## the slow tests too: 40 to 50 minutes on 2 old cores, up to 14 GB of memory
	OMP_NUM_THREADS=1 $(DEV_ENV)/bin/python -m pytest $(if $(AT_ONCE),-n 2 --dist worksteal) -m "slow and not gpu"

# Before 2.7 GB are installed for nothing.
has-driver:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || \
	  { echo "make test-gpu: nothing was tested, because there is no GPU: libcuda.so.1, the library of NVIDIA's driver, cannot be loaded" >&2; exit 2; }

test-gpu: has-driver $(DEV_ENV)/.installed  ## TensorRT's plans on this GPU (ONNX Runtime on CUDA too, where installed), not our own kernels: a report for an issue (docs/gpu.md); fails without a GPU; time not measured
	@$(DEV_ENV)/bin/python -c 'import sys; from par_runtime.backends import cuda; why = cuda.why_no_device(); sys.exit(f"make test-gpu: nothing was tested, because there is no GPU: {why}" if why else 0)'
	$(DEV_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,$(GPU_EXTRA)]'
	PARVIS_GPU_BUNDLE=$(abspath $(GPU_BUNDLE)) $(DEV_ENV)/bin/python -m pytest -m gpu -rs

gpu-report:  ## driver and our own kernels on this GPU in 8 minutes: right, and how fast; needs PyTorch and Triton, installs nothing (docs/gpu.md)
	@mkdir -p $(GPU_OUT)
	@code=0; PYTHONPATH="$(CURDIR):$(CURDIR)/export:$(CURDIR)/calibration:$(CURDIR)/runtime$${PYTHONPATH:+:$$PYTHONPATH}" $(REPORT_PYTHON) -m par_runtime bench --suite gpu \
	  --minutes $(GPU_MINUTES) $(GPU_MORE) --json $(GPU_OUT)/rows.jsonl > $(GPU_OUT)/report.md || code=$$?; \
	cat $(GPU_OUT)/report.md; exit $$code

gpu-docs: $(DEV_ENV)/.installed  ## the figures in docs/gpu.md and docs/gpu.svg, made of the rows in docs/gpu/*.jsonl
	$(DEV_ENV)/bin/python -m par_export.card.docs docs

# A mypy without parallel checking does not know the variable, and needs half a minute in place of 25 s.
lint: $(DEV_ENV)/.installed  ## ruff, mypy, import-linter: half a minute
	$(DEV_ENV)/bin/ruff check .
	MYPY_NUM_WORKERS=2 $(DEV_ENV)/bin/mypy
	$(DEV_ENV)/bin/lint-imports --no-cache --no-logo

format: $(DEV_ENV)/.installed  ## ruff's formatter and its safe fixes
	$(DEV_ENV)/bin/ruff check --fix .
	$(DEV_ENV)/bin/ruff format .

$(RUN_ENV)/.installed: pyproject.toml setup.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "parvis needs Python 3.10 or newer, this is %s; give another with make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(RUN_ENV)
	rm -rf build/lib* build/bdist*  # pip builds in place: what was moved or deleted since would be installed too
	$(RUN_ENV)/bin/python -m pip install --quiet --disable-pip-version-check '.[cpu]'
	touch $@

$(DEV_ENV)/.installed: pyproject.toml setup.py constraints.txt $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "parvis needs Python 3.10 or newer, this is %s; give another with make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Installing PyTorch, ONNX, TensorRT-RTX and the tools into $(DEV_ENV): 2.7 GB (several GB more where pip's PyTorch brings CUDA)."
	$(PYTHON) -m venv $(DEV_ENV)
	$(DEV_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

clean:  ## remove both environments and what was made in them
	rm -rf $(RUN_ENV) $(DEV_ENV) build out *.egg-info
