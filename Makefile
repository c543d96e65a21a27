# SPDX-License-Identifier: BSD-3-Clause
#
# Each target does the set-up it needs, see tools/setup. ARGS is passed on: make demo ARGS=--no-offload

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-freethreading race sanitize sanitized replays build debug lint coverage bench soak fuzz kernels ports docs wheel clean setup

BIN := .venv/bin
PYTHON3 := $(BIN)/python
CHECKED := build/debug
SANITIZED := build/sanitize
FREE := build/freethreading/venv
ARGS ?=

help:
	@echo 'make demo     forward TCP between two network namespaces, and compare with a veth pair'
	@echo 'make test     the test suite on the release build, the lifetime tests on the checked build,'
	@echo '              the shortest tests of native code under the sanitizers, and the tests of rings'
	@echo '              as on a kernel before Linux 6.4, side by side'
	@echo 'make test-freethreading'
	@echo '              the test suite on a Python without a GIL, which it builds (ten minutes) once'
	@echo 'make race     the parallel tests under ThreadSanitizer'
	@echo 'make sanitize the tests of native code under AddressSanitizer and UBSan, ten minutes'
	@echo 'make build    compile in place and install into .venv'
	@echo 'make debug    the checked build (bounds checks, assertions) in $(CHECKED)'
	@echo 'make lint     ruff, cython-lint, mypy, stubtest and the rules of the tree'
	@echo 'make coverage which lines of Python and Cython the tests do not run'
	@echo 'make bench    benchmarks'
	@echo 'make soak     a hundred million frames through a small pool, and the long runs of tests'
	@echo 'make fuzz     ten million inputs for the offload kernels, two million for programs over frames,'
	@echo '              200,000 messages between processes, two million random calls of the API, four million frames through devices (as'
	@echo '              root), then the property tests with many more examples; ARGS=--runs=1e5 for'
	@echo '              fewer inputs'
	@echo 'make kernels  tests on the kernels of other Debian releases, booted in QEMU, forty minutes;'
	@echo '              ARGS="6.1 --core" for one kernel and the most important tests (as root)'
	@echo 'make ports    tests on other architectures, in Debian trees of these, as root;'
	@echo '              ARCH="arm64 armhf ppc64el i386 s390x" or some of them'
	@echo 'make docs     the manual, into build/docs'
	@echo 'make wheel    sdist and wheel, into dist'
	@echo 'make clean    remove all that was built, and .venv'
	@echo 'demo, test, bench and soak make network namespaces: run them as root.'

setup:
	@tools/setup

build: setup
	@$(PYTHON3) setup.py -q build_ext --inplace

# The Python files are copied anew, so that none stays that is gone from the tree.
debug: setup
	@if [ -d $(CHECKED) ]; then find $(CHECKED) -type f ! -name '*.so' -delete; fi
	@RTAP_DEBUG=1 $(PYTHON3) setup.py -q build --build-lib $(CHECKED)

demo: build
	@$(BIN)/rtap demo $(ARGS)

test: build debug sanitized replays
	@$(PYTHON3) tools/suite.py $(ARGS)

# The compiler takes longer than a test may. Where it is missing these tests say so themselves.
replays: build
	@-$(PYTHON3) tools/fuzz.py --replays

# The newest hypothesis there is a wheel of: its source may need a Rust compiler.
test-freethreading:
	@PYTHON=$$(tools/freethreaded-python) RTAP_VENV=$(FREE) PIP_PREFER_BINARY=1 \
	  tools/setup freethreading
	@$(FREE)/bin/python setup.py -q build_ext --inplace
	@$(FREE)/bin/pytest --parallel-threads=4 --timeout=600 $(ARGS)

race: setup
	@RTAP_DEBUG=tsan $(PYTHON3) setup.py -q build --build-lib build/race
	@tools/race $(ARGS)

# The Python files are copied anew, as in debug.
sanitized: setup
	@if [ -d $(SANITIZED) ]; then find $(SANITIZED) -type f ! -name '*.so' -delete; fi
	@RTAP_DEBUG=asan $(PYTHON3) setup.py -q build --build-lib $(SANITIZED)

sanitize: sanitized
	@tools/sanitize $(ARGS)

lint: build
	@$(PYTHON3) tools/lint.py

coverage: setup
	@tools/setup coverage
	@if [ -d build/coverage ]; then find build/coverage -type f ! -name '*.so' -delete; fi
	@RTAP_DEBUG=gcov $(PYTHON3) setup.py -q build --build-lib build/coverage
	@$(PYTHON3) tools/gaps.py $(ARGS)

bench: build
	@RTAP_BENCH=1 tools/setup
	@$(PYTHON3) -m pytest bench --benchmark-only
	@$(PYTHON3) -m bench.run $(ARGS)

soak: build
	@$(PYTHON3) -m bench.soak $(ARGS)
	@$(BIN)/pytest -m soak --timeout=3600

fuzz: build sanitized
	@RTAP_FUZZ=1 tools/setup
	@$(PYTHON3) tools/fuzz.py $(ARGS)
	@$(PYTHON3) tools/fuzz_api.py --calls=1e6
	@tools/sanitize --run $(PYTHON3) tools/fuzz_api.py --calls=1e6
	@$(PYTHON3) tools/fuzz_wire.py --frames=3e6
	@tools/sanitize --run $(PYTHON3) tools/fuzz_wire.py --frames=1e6 --seed=100001
	@HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest -m fuzz --timeout=3600

kernels: build
	@RTAP_KERNELS=1 tools/setup
	@tools/setup kernels
	@$(PYTHON3) tools/kernels.py $(ARGS)

ports: build
	@RTAP_PORTS="$(or $(ARCH),all)" tools/setup
	@$(PYTHON3) tools/ports.py $(ARCH) $(ARGS)

docs: build
	@tools/setup docs
	@$(PYTHON3) -m sphinx -q -n -W --keep-going -b html docs build/docs
	@echo 'build/docs/index.html'

wheel: setup
	@rm -rf dist
	@$(PYTHON3) -m build

clean:
	rm -rf .venv build dist rtap.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . \( -name __pycache__ -o -name '*.so' \) -prune -exec rm -rf {} +
