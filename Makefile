# make, make help: what there is. Only a Python >= 3.11 and make are needed; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SCRIPTS := $(wildcard train.py merge.py infer.py)
DEMO := out/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast gpu lint pictures clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install, train configs/tiny.py on the CPU, merge the adapter, answer questions with the result"
	@echo "make test       install, lint, run all tests (.ci/run does the same)"
	@echo "make test-fast  the tests that make no whole run and start no process: two minutes"
	@echo "make gpu        on a machine with a GPU: tests/cuda, then bench/gpu.py, ten minutes on an H100"
	@echo "make lint       ruff check, ruff format --check, lint-imports, mypy"
	@echo "make pictures   draw the README's pictures again (needs Chromium)"
	@echo "make clean      remove $(VENV), $(DEMO) and all caches"
	@echo "PYTHON=python3.12 chooses the interpreter (>= 3.11). pip's variables work too: the CPU build of torch is a"
	@echo "smaller download, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test"

# torch by itself first: it is by far the largest, and a failure to find it should come before the rest is fetched
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python %d.%d: Python >= 3.11 is needed, try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[test,track,eval,ontology,judge,parquet]'
	touch $@

# One process more than there are cores, because some tests wait; at most 8. A file stays on one
# process, for the models that its tests share; tests/conftest.py puts the longest files first.
TEST_PROCESSES := $(shell $(PYTHON) -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

test-fast: $(VENV)/.installed
	$(PYTEST) -m "not system"

gpu: export PYTORCH_ALLOC_CONF ?= expandable_segments:True
gpu: $(VENV)/.installed
	$(BIN)/python -m pytest tests/cuda
	$(BIN)/python bench/gpu.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy minilora $(SCRIPTS)

# the paths prompt of an article that no file of examples/ holds
demo: ARTICLE := Title: Hurdy-gurdy\nThe hurdy-gurdy is a string instrument whose strings are sounded by a wheel turned with a crank.
demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/torchrun --standalone --nproc_per_node=2 train.py configs/tiny.py --output_dir $(DEMO)
	$(BIN)/python merge.py $(DEMO)/checkpoint-final --verify
	$(BIN)/python infer.py $(DEMO)/checkpoint-final/merged --input examples/wiki/test.jsonl --output $(DEMO)/answers.jsonl
	@printf '\nAn article that the model has not seen:\n%b\n\nIts category paths, by the merged model (2 M parameters, so the form is right and the topics are not):\n' '$(ARTICLE)'
	@$(BIN)/python infer.py $(DEMO)/checkpoint-final/merged --prompt "$$(printf '%b' '$(ARTICLE)')"
	@echo
	@echo "Done. In $(DEMO):"
	@echo "  checkpoint-final/         the adapter, in PEFT's layout"
	@echo "  checkpoint-final/merged/  the merged model, in Hugging Face layout"
	@echo "  metrics.jsonl             loss, gradient norm, learning rate and evaluations, step by step"
	@echo "  report.html               all of it to look at: curves, answers, masks, settings"
	@echo "  samples.jsonl             answers generated during training"
	@echo "  answers.jsonl             the merged model's answers to examples/wiki/test.jsonl"

pictures: $(VENV)/.installed
	$(BIN)/python -m docs.make_pictures

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
