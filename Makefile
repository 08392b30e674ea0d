# make train STAGE=0    installs everything, trains that stage and samples from it
# make compare          trains all stages and compares them
# make smollm2          installs everything and gets a pretrained model to talk to
# make serve            installs everything and serves that model: a chat page, and OpenAI's API
# make site             installs what it needs, trains three small models and builds the course page in site/
# make test             installs everything, lints and runs the tests
# make notebooks        runs all notebooks; with their outputs they are in runs/notebooks/done
# make gpu-check        runs the GPU tests and measures the GPU, in nine minutes
#
# With USE_PYTHON, a command uses that Python and its packages; nothing is installed:
# make gpu-check USE_PYTHON=python3
PYTHON ?= python3
STAGE ?= 0
ifdef USE_PYTHON
RUN = $(USE_PYTHON)
BASE =
COMPARE =
DEPLOY =
SERVE =
SITE =
DEV =
NOTEBOOKS =
else
RUN = .venv/bin/python
BASE = .venv/installed
COMPARE = .venv/installed-compare
DEPLOY = .venv/installed-deploy
SERVE = .venv/installed-serve
SITE = .venv/installed-site
DEV = .venv/installed-dev
NOTEBOOKS = .venv/installed-notebooks
endif
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train compare sample smollm2 serve serve-check site site-check notebooks test test-gpu gpu-check lint format clean

train: $(BASE)
	$(RUN) train.py --stage $(STAGE) $(ARGS)

compare: $(COMPARE)
	$(RUN) compare.py $(ARGS)

sample: $(BASE)
	$(RUN) sample.py --stage $(STAGE) $(ARGS)

smollm2: $(DEPLOY)
	$(RUN) -m deploy.pretrained smollm2 $(ARGS)

# Serves SmolLM2 or, where that cannot be had, the newest run.
serve: $(SERVE)
	if $(RUN) -m deploy.pretrained smollm2; then run="--run $${RUNS_DIR:-runs}/smollm2"; fi; \
	exec $(RUN) -m deploy.serve $$run $(ARGS)

# Runs the server's long tests: 2,000 requests, of which many are cut off; requests made up from its OpenAPI
# document; the chat page in Chromium (CHROMIUM names it, if it is not /usr/bin/chromium).
serve-check: $(DEV)
ifndef USE_PYTHON
	$(PIP_INSTALL) -e '.[serve-check]'
endif
	SERVE_CHECK=1 $(RUN) -m pytest -q -s tests/test_server_long.py $(ARGS)

# The course page: open site/index.html, or put the folder on a static host.
site: $(SITE)
	$(RUN) -m lab.pages.site $(ARGS)

# Builds the page and checks it in Chromium (CHROMIUM names it, if it is not /usr/bin/chromium).
site-check: $(DEV)
ifndef USE_PYTHON
	$(PIP_INSTALL) -e '.[site-check]'
endif
	SITE_CHECK=1 $(RUN) -m pytest -q -s -rs tests/test_site_long.py $(ARGS)

# Runs two test files at a time with one thread each: over a quarter faster than one file with two threads.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 $(ARGS)

# Runs the tests that need a CUDA device.
test-gpu: $(DEV)
	$(RUN) -m pytest -q -m gpu $(ARGS)

# Runs every notebook at full length, as Jupyter would: 120 seconds for each, 12 minutes for all.
notebooks: $(NOTEBOOKS)
	$(RUN) -m lab.pages.notebooks --run $${RUNS_DIR:-runs}/notebooks/done

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

.venv/installed-deploy: .venv/installed
	$(PIP_INSTALL) -e '.[deploy]'
	touch $@

.venv/installed-serve: .venv/installed
	$(PIP_INSTALL) -e '.[serve]'
	touch $@

.venv/installed-notebooks: .venv/installed
	$(PIP_INSTALL) -e '.[notebooks]'
	touch $@

.venv/installed-site: .venv/installed
	$(PIP_INSTALL) -e '.[site]'
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
