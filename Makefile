# The only entry: `make` lists what there is. Everything a target needs is installed by it, from Debian and PyPI alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := kvmpy/_native.abi3.so
# Else each process of a test compiles what it imports, and each worker all tests, anew: ten seconds of `make test-unit`.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest
# Several at once, each module's tests one after another (tests/conftest.py), and those of a kind of emulated host that
# takes long to start (tests/lab/conftest.py).
WORKERS ?= 2
PARALLEL = $(PYTEST) -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help packages setup images demo demo-boot demo-migration test test-unit test-fuzz test-host test-kvm test-lab fuzz soak bench bench-quick check lint types layers fmt docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: packages $(NATIVE) images ## install everything: Debian packages, .venv, the native module, the lab's images

demo: setup ## a guest with a passed-through NIC goes from one emulated host to another; a picture of it
	@$(BIN)/python -m scripts.demo .lab/run

demo-boot: setup ## boot Debian's kernel under kvmpy, to a shell you can type into
	@$(BIN)/python -m scripts.demo_boot

demo-migration: setup ## a guest goes from one emulated host to another and back
	@$(BIN)/python -m scripts.migrate_two_hosts .lab/run

test: setup ## all tests: unit, fuzz, host, kvm, lab
	$(PARALLEL) tests/unit tests/fuzz tests/host tests/kvm tests/lab

test-unit: WORKERS = 3
test-unit: packages $(NATIVE) ## no root, no /dev/kvm
	$(PARALLEL) tests/unit

test-fuzz: packages $(NATIVE) ## a slice of `make fuzz`
	$(PYTEST) tests/fuzz

test-host: packages $(NATIVE) ## taps and bridges in network namespaces of their own; needs root
	$(PARALLEL) tests/host

test-kvm: WORKERS = 3
test-kvm: packages $(NATIVE) ## small programs on the real kernel; needs /dev/kvm
	$(PARALLEL) tests/kvm

test-lab: setup ## Linux guests on an emulated host; needs no /dev/kvm
	$(PARALLEL) tests/lab

fuzz: packages $(NATIVE) ## a whole machine under a million random operations (KVMPY_SEED=n), hostile streams
	KVMPY_SOAK=1 $(PYTEST) --timeout 3600 tests/fuzz

soak: setup ## the tests with their full counts
	KVMPY_SOAK=1 $(PYTEST) --timeout 3600 tests/unit tests/fuzz tests/host tests/kvm tests/lab

bench: setup ## measure kvmpy beside QEMU: bench/results/ has the table, and a page with the plots
	$(BIN)/python -m bench

bench-quick: setup ## the same in under five minutes; says what it leaves out
	$(BIN)/python -m bench --quick

check: lint types layers ## all static checks

lint: $(NATIVE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

docs: $(NATIVE) ## write the pages that are made from the code
	$(BIN)/python -m scripts.config_reference
	$(BIN)/python -m scripts.qmp_reference
	$(BIN)/python -m scripts.memory_map
	$(BIN)/python -m scripts.requirements

types: $(NATIVE)
	$(BIN)/mypy

layers: $(NATIVE)
	$(BIN)/lint-imports

fmt: $(NATIVE) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what was built; .lab keeps the downloaded kernels
	rm -rf build dist *.egg-info kvmpy/_native.c kvmpy/*.so $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

packages:
	@scripts/system-packages

images: $(NATIVE) ## fetch Debian's kernels, make the initramfs images below .lab
	@$(BIN)/python -m scripts.lab images >/dev/null

$(VENV)/installed: pyproject.toml | packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'pip>=25.1' 'setuptools>=77' 'cffi>=2.0'
	$(BIN)/pip install --quiet --group dev
	touch $@

$(NATIVE): $(VENV)/installed setup.py $(wildcard kvmpy/abi/*.cdef kvmpy/abi/*.c kvmpy/abi/*.h) kvmpy/abi/build_native.py
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --editable .
	touch $@
