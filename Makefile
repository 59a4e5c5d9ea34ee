# Commands that do all their own set-up: `make demo`, and the tests.
# PYTHON names the interpreter, BACKEND the demo's backend, ARGS go to the demo, PIP_ARGS to pip.
PYTHON ?= python3
BACKEND ?= jax
# Pinned, and installed before all else: with no torch there, any looser requirement takes the newest
# build, on Linux with gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0

TEST_VENV := .venv
DEMO_VENV := .venv-demo-$(BACKEND)
INSTALL = -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: help demo test test-all test-rest test-release test-nightly lint docs clean

help:
	@echo "make demo [BACKEND=jax|tensorflow|torch] [ARGS=...]   train an image classifier and draw how it did"
	@echo "make test                                             the tests of every change, on all three backends"
	@echo "make test-all                                         all tests, on all three backends"
	@echo "make test-rest                                        what test-all runs and test does not"
	@echo "make test-release [SOAK_MINUTES=60]                   by hand before a release: what is too long for test-all"
	@echo "make test-nightly                                     the uses of private Keras attributes, in keras-nightly"
	@echo "make lint                                             ruff and mypy"
	@echo "make docs                                             the site, in docs/_build/html"
	@echo "PYTHON=... names the interpreter; PIP_ARGS=... are passed to pip"

# With this flag JAX compiles random draws twice as fast, but draws other numbers.
demo: $(DEMO_VENV)/installed
	JAX_THREEFRY_PARTITIONABLE=0 KERAS_BACKEND=$(BACKEND) TF_CPP_MIN_LOG_LEVEL=2 $(DEMO_VENV)/bin/python examples/image_classification.py $(ARGS)

RUN_TESTS = PYTHON=$(TEST_VENV)/bin/python bash tests/run_all.sh --durations=20

test: $(TEST_VENV)/installed
	$(RUN_TESTS) -m "not full"

test-all: $(TEST_VENV)/installed
	$(RUN_TESTS)

# What test-all runs and test does not.
test-rest: $(TEST_VENV)/installed
	$(RUN_TESTS) -m full

# Thousands of damaged files, long fuzzing and a soak; tests/release/README.md. Commit what it writes to results/.
SOAK_MINUTES ?= 60
RELEASE = OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2 $(TEST_VENV)/bin/python
test-release: $(TEST_VENV)/installed
	failed=0; KERAS_BACKEND=torch $(RELEASE) -m pytest -p no:cacheprovider tests/release || failed=1; \
	for backend in jax tensorflow; do \
	  KERAS_BACKEND=$$backend $(RELEASE) -m pytest -p no:cacheprovider tests/release/test_interrupts.py || failed=1; done; \
	KERAS_BACKEND=torch $(RELEASE) tests/release/soak.py --minutes $(SOAK_MINUTES) & soak=$$!; \
	KERAS_BACKEND=jax $(RELEASE) tests/release/soak.py --minutes $(SOAK_MINUTES) || failed=1; \
	wait $$soak || failed=1; exit $$failed

test-nightly: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python $(INSTALL) --no-deps --upgrade --target build/keras-nightly keras-nightly
	failed=0; for backend in jax tensorflow torch; do \
	  PYTHONPATH=build/keras-nightly KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=2 \
	    $(TEST_VENV)/bin/python -m pytest -q -p no:cacheprovider tests/test_keras_internals.py tests/test_keras_optimizers.py || failed=1; done; exit $$failed

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy

# Warnings are errors: a missing page, a broken link, a docstring that does not parse.
docs: $(TEST_VENV)/installed
	KERAS_BACKEND=torch TF_CPP_MIN_LOG_LEVEL=2 OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# runs/ stays: what is in it was trained.
clean:
	rm -rf .venv .venv-demo-* build dist docs/_build .pytest_cache .ruff_cache

# ensurepip too: Debian packages it apart from venv, and `python -m venv` fails without it.
define CHECK_PYTHON
$(PYTHON) -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
  echo "keras-jamba needs Python 3.11 or newer with its venv module." >&2; \
  echo "Received: PYTHON=$(PYTHON), `$(PYTHON) --version 2>&1`." >&2; \
  echo "Install one, or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
endef

# A stamp is written last, so that an interrupted installation starts again.
NATIVE = hatch_build.py $(wildcard keras_jamba/_native/*.[ch])

$(TEST_VENV)/installed: pyproject.toml $(NATIVE)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/python $(INSTALL) "$(TORCH)"
	$(TEST_VENV)/bin/python $(INSTALL) -e ".[jax,tensorflow,torch,test]"
	touch $@

$(DEMO_VENV)/installed: pyproject.toml $(NATIVE)
	@$(CHECK_PYTHON)
	@case "$(BACKEND)" in jax|tensorflow|torch) ;; *) \
	  echo "BACKEND must be jax, tensorflow or torch. Received: BACKEND=$(BACKEND)." >&2; exit 1;; esac
	$(PYTHON) -m venv $(DEMO_VENV)
	$(if $(filter torch,$(BACKEND)),$(DEMO_VENV)/bin/python $(INSTALL) "$(TORCH)")
	$(DEMO_VENV)/bin/python $(INSTALL) -e ".[$(BACKEND),examples]"
	touch $@
