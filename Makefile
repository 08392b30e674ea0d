# make train STAGE=0    sets everything up, trains that stage and samples from it
# make compare          trains all stages and draws them side by side
# make test             sets everything up, lints and runs the tests
PYTHON ?= python3
STAGE ?= 0
BIN = .venv/bin

.PHONY: train compare sample test test-gpu lint format clean

train: .venv/installed
	$(BIN)/python train.py --stage $(STAGE) $(ARGS)

compare: .venv/installed-compare
	$(BIN)/python compare.py $(ARGS)

sample: .venv/installed
	$(BIN)/python sample.py --stage $(STAGE) $(ARGS)

# Two files at a time, one thread each: more than a quarter faster than one with two threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 $(ARGS)

# The tests that need a CUDA device; the others skip nothing there.
test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-compare: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[compare]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
