# Every target sets up what it needs: a virtual environment in .venv with the pinned versions, built once and
# again whenever pyproject.toml or constraints.txt change.
#   make test PYTEST_ARGS="tests/test_package.py -x"     a part of the tests
#   make test PYTHON=python3.12 WORKERS=8                another interpreter (for a new .venv), more processes
#   make demo THREADS=8                                  more threads of torch; the report is demo/report.html and .png
#   make demo DEMO_ARGS="--images a.png b.png"           pictures of your own
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"   torch's CPU build

PYTHON ?= python3
THREADS ?= 2
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := env TOKENIZERS_PARALLELISM=false

.DELETE_ON_ERROR:
.PHONY: setup test demo lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	touch $@

test: $(STAMP)
	$(RUN) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

demo: $(STAMP)
	$(RUN) OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo.py $(DEMO_ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +
