# SPDX-License-Identifier: Apache-2.0
#
# make demo           build, run the example under opentelemetry-instrument, show its slowest spans
# make test           the tests (PYTEST_ARGS="-k pool -x"; TEST_GROUPS=test leaves
#                     the frameworks out)
# make test-all       the tests on every interpreter found (3.11 to 3.15, free-threaded 3.13)
# make python3.13t    builds that last one, which has no packages, for test-all
# make test-oldest    the tests with the oldest dependencies that pyproject.toml allows, on 3.11
# make native-test    the C++ unit tests (SANITIZE=address,undefined or SANITIZE=thread)
# make soak           everything at once, sampled fast (SOAK_SECONDS=1800; SOAK_ARGS="--rate 4000")
# make fuzz           the readers of memory under libFuzzer, needs clang (FUZZ_SECONDS=600, each)
# make build          editable install into $(VENV), again after a change to native code
# make lint           all linters and type checks; make format puts right what can be
# make bench          the benchmarks (BENCH_ARGS="--quick span")
# make instructions   count instructions (callgrind) and compare with the baseline
#                     (INSTRUCTIONS_ARGS=--update makes the counts the new one)
# make wheel          a wheel, in dist/
# make clean          removes whatever these made, but for captures (proflink-out/)
#
# PYTHON=python3.12 chooses the interpreter, VENV=.venv-3.12 the environment (one interpreter each).

.DELETE_ON_ERROR:
SHELL := bash
.PHONY: demo test test-all python3.13t test-oldest native-test soak fuzz build lint lint-python \
	lint-types lint-cython lint-native format bench instructions wheel clean help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
INSTRUCTIONS_ARGS ?=
# Dependency groups of pyproject.toml. What is not installed is skipped, and said.
TEST_GROUPS ?= test frameworks
SANITIZE ?=
SOAK_SECONDS ?= 60
SOAK_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= snapshot code threads label strings
CLANG ?= clang

py := $(VENV)/bin/python
in_venv := PATH="$(abspath $(VENV))/bin:$$PATH"
pip := $(py) -m pip --disable-pip-version-check install --quiet
# A file in here says that a step is done; each names what makes it necessary again.
done := $(VENV)/proflink
requirements = $(py) scripts/requirements.py $(1) > $(done)/$(1).txt

native := $(shell find src/otel_proflink tests/native -name '*.[ch]' -o -name '*.[ch]pp')
compiled := $(filter src/%,$(native)) $(wildcard src/otel_proflink/*.pyx src/otel_proflink/*.pxd) \
	CMakeLists.txt src/otel_proflink/CMakeLists.txt examples/thread_pool.py

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(done)/built
	$(VENV)/bin/proflink demo

test: $(done)/built $(TEST_GROUPS:%=$(done)/%-tools)
	$(py) -m pytest $(PYTEST_ARGS)

build: $(done)/built

# Not isolated: an isolated build starts from an empty directory and compiles everything each time.
$(done)/built: $(done)/build-tools $(compiled) pyproject.toml
	$(pip) --no-build-isolation --config-settings=build-dir=build/$(notdir $(VENV)) --editable '.[cli,zero-code]'
	@touch $@

$(done)/build-tools: scripts/venv.sh scripts/requirements.py pyproject.toml
	scripts/venv.sh "$(PYTHON)" $(VENV)
	@mkdir -p $(done)
	@$(call requirements,build)
	$(pip) -r $(done)/build.txt
	@touch $@

$(done)/%-tools: $(done)/build-tools
	@$(call requirements,$*)
	$(pip) -r $(done)/$*.txt
	@touch $@

test-all:
	@set -e; scripts/interpreters.sh | while read -r version python; do \
	    echo "== CPython $$version"; \
	    $(MAKE) test VENV=.venv-$$version PYTHON="$$python" </dev/null; \
	done

python3.13t:
	scripts/free-threaded.sh

# A constraint, so that pip resolves everything else as ever.
test-oldest: oldest := .venv-oldest/oldest.txt
# Without what has nothing to do with OpenTelemetry's version.
test-oldest: oldest_args = -m "not once" --ignore tests/storm --ignore tests/soak \
	--ignore tests/integration/test_engines.py --ignore tests/integration/test_invariants.py
test-oldest:
	@set -e; read -r _ python < <(scripts/interpreters.sh 3.11) || exit 1; \
	scripts/venv.sh "$$python" .venv-oldest; \
	.venv-oldest/bin/python scripts/requirements.py --oldest > $(oldest); \
	PIP_CONSTRAINT=$(oldest) $(MAKE) test TEST_GROUPS=test VENV=.venv-oldest PYTHON="$$python" \
	    PYTEST_ARGS='$(oldest_args)'

# CMake finds GoogleTest (Debian: libgtest-dev), Cython and CPython's headers.
comma := ,
variant := native$(addprefix -,$(subst $(comma),-,$(SANITIZE)))
# The thread sanitizer wants its shadow memory where address randomisation may put something else;
# CMake, too, runs the tests: to list them.
fixed := $(if $(findstring thread,$(SANITIZE)),setarch $(shell uname -m) --addr-no-randomize)
# Sanitizers make the exhaustive tests thirty times slower; of those with one thread alone the thread
# sanitizer has nothing to say.
one_thread := $(if $(findstring thread,$(SANITIZE)),--exclude-regex '(Snapshot|Storm)\.')
native-test: export PROFLINK_TEST_EFFORT ?= $(if $(SANITIZE),0.1,1)
native-test: $(done)/build-tools
	$(in_venv) cmake -S . -B build/$(variant) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DPython_EXECUTABLE="$(abspath $(py))" \
	    -DPROFLINK_NATIVE_TESTS=ON -DPROFLINK_SANITIZE="$(SANITIZE)"
	$(in_venv) $(fixed) cmake --build build/$(variant) --target native_tests
	$(in_venv) $(fixed) ctest --test-dir build/$(variant) --output-on-failure --no-tests=error \
	    --parallel 2 $(one_thread)

soak: $(done)/built $(done)/test-tools
	$(py) -m tests.soak --seconds $(SOAK_SECONDS) $(SOAK_ARGS)

# What a target found interesting stays in build/fuzz/corpus; what makes it fail, in build/fuzz.
fuzz: $(done)/build-tools
	$(in_venv) cmake -S . -B build/fuzz -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DCMAKE_C_COMPILER="$(CLANG)" -DCMAKE_CXX_COMPILER="$(subst clang,clang++,$(CLANG))" \
	    -DPython_EXECUTABLE="$(abspath $(py))" -DPROFLINK_NATIVE_TESTS=ON -DPROFLINK_FUZZ=ON
	$(in_venv) cmake --build build/fuzz --target fuzz
	@cd build/fuzz; for target in $(FUZZ_TARGETS); do \
	    mkdir -p corpus/$$target; \
	    tests/native/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -max_len=4096 \
	        corpus/$$target >$$target.log 2>&1 || { tail -n 40 $$target.log; exit 1; }; \
	    echo "$$target: $$(grep DONE $$target.log)"; \
	done

lint: lint-python lint-types lint-cython lint-native

lint-python: $(done)/lint-tools
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

# stubtest compares the stubs with the modules as built.
lint-types: $(done)/built $(done)/test-tools $(done)/lint-tools
	$(py) -m mypy
	$(py) -m mypy.stubtest otel_proflink._linker otel_proflink._sampler otel_proflink._awaits \
	    --mypy-config-file pyproject.toml --allowlist scripts/stubtest-allowlist.txt

lint-cython: $(done)/lint-tools
	$(in_venv) cython-lint src

lint-native: $(done)/lint-tools
	$(VENV)/bin/clang-format --dry-run -Werror $(native)

format: $(done)/lint-tools
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(native)

bench: $(done)/built $(done)/test-tools
	$(py) -m benchmarks $(BENCH_ARGS)

instructions: $(done)/built $(done)/test-tools
	$(py) -m benchmarks.instructions $(INSTRUCTIONS_ARGS)

wheel: $(done)/build-tools
	$(py) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .venv .venv-* .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
