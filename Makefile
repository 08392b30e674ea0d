# make train STAGE=0    sets everything up, trains that stage and samples from it
# make compare          trains all stages and draws them side by side
# make test             sets everything up, lints and runs the tests
# make gpu-check        measures a GPU, and tests on it, in nine minutes
#
# With USE_PYTHON, a command runs with that Python and the packages that it has; nothing is installed:
# make gpu-check USE_PYTHON=python3
PYTHON ?= python3
STAGE ?= 0
ifdef USE_PYTHON
RUN = $(USE_PYTHON)
BASE =
COMPARE =
DEV =
else
RUN = .venv/bin/python
BASE = .venv/installed
COMPARE = .venv/installed-compare
DEV = .venv/installed-dev
endif
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train compare sample test test-gpu gpu-check lint format clean

train: $(BASE)
	$(RUN) train.py --stage $(STAGE) $(ARGS)

compare: $(COMPARE)
	$(RUN) compare.py $(ARGS)

sample: $(BASE)
	$(RUN) sample.py --stage $(STAGE) $(ARGS)

# Two files at a time, one thread each: more than a quarter faster than one with two threads.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 $(ARGS)

# The tests that need a CUDA device; the others skip nothing there.
test-gpu: $(DEV)
	$(RUN) -m pytest -q -m gpu $(ARGS)

gpu-check: $(DEV)
	$(RUN) -m benchmarks.gpu_check $(ARGS)

lint: $(DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(DEV)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e .
	touch $@

.venv/installed-compare: .venv/installed
	$(PIP_INSTALL) -e '.[compare]'
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
