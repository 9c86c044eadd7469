# `make demo` and `make test` are all that a fresh machine with Python 3.11 needs; both install first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install demo test gpu-test gpu-bench lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(VENV)/.ready  ## make the virtual environment with the tested versions

# torch comes first, alone: it is the one large download, and a failure there reads plainly.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.ready  ## the whole job on made-up patients, offline; prints where the report is
	$(OFFLINE) $(BIN)/dpmed demo --output_dir runs/demo
	@echo "report: $(CURDIR)/runs/demo/report.html"

test: $(VENV)/.ready  ## the whole test suite, offline
	$(OFFLINE) $(BIN)/python -m pytest -m "not gpu"

gpu-test: $(VENV)/.ready  ## what needs a CUDA device
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 0 -m gpu

gpu-bench: $(VENV)/.ready  ## speed and memory on a CUDA device; MODELS=DIR DATA=DIR for the rows that need them
	$(BIN)/python benchmarks/speed/bench.py --device cuda $(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data $(DATA))

lint: $(VENV)/.ready  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:  ## remove the environment, builds and caches; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
