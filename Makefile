# Everything here sets itself up: on a machine with Python 3.11 or 3.12, git and make, `make train` is enough.

PYTHON ?= $(shell for p in python3.12 python3.11; do $$p -c '' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
RECIPE ?= recipes/moepp.yaml
DATA   ?=
CKPT   ?=
TASKS  ?= paper
PROMPT ?=
ARGS   ?=

export PROMPT

VENV  := .venv
MOEPP := $(VENV)/bin/moepp
DATA_ARG := $(if $(DATA),--data.path='$(DATA)')
BASE_ARG := $(if $(filter-out file,$(origin RECIPE)),--base=$(RECIPE))

.DEFAULT_GOAL := help
.PHONY: help setup data train compare ablate frontier convert figures eval bench gpu resume generate test soak lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  RECIPE=recipes/vanilla.yaml   what to train (default $(RECIPE))'
	@echo '  DATA=my.txt                   your own text: a file, a folder, hf:owner/name, litdata:folder'
	@echo '  ARGS="--model.moe.tau=0.5"    passed on as it is'

setup: $(VENV)/.done ## make .venv and install what is needed, once

$(VENV)/.done: pyproject.toml constraints.txt
	@echo 'installing into $(VENV): a few minutes, once'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,study,hf,eval]'
	@touch $@

data: setup ## text → tokenizer → token files (a second call does nothing)
	$(MOEPP) prepare '$(or $(DATA),data/corpus.yaml)' $(ARGS)

train: setup ## train RECIPE on DATA
	$(MOEPP) fit --config $(RECIPE) $(ARGS) $(DATA_ARG)

compare: setup ## vanilla MoE against MoE++ over 3 seeds: a table, a report (ARGS=--quick, ARGS=--dry_run)
	$(MOEPP) ablate --matrix recipes/compare.yaml $(BASE_ARG) $(ARGS) $(DATA_ARG)

ablate: setup ## the same for the paper's ablations
	$(MOEPP) ablate --matrix recipes/ablate.yaml $(BASE_ARG) $(ARGS) $(DATA_ARG)

frontier: setup ## loss against expert compute: dense, vanilla and MoE++ at four budgets over 3 seeds (ARGS=--quick)
	$(MOEPP) ablate --matrix recipes/frontier.yaml $(BASE_ARG) $(ARGS) $(DATA_ARG)

convert: setup ## a trained vanilla MoE into MoE++, four ways over 3 seeds: what it costs and saves (ARGS=--quick)
	$(MOEPP) ablate --matrix recipes/convert.yaml $(ARGS) $(DATA_ARG)

figures: setup ## what the router does: CKPT=…, or the newest checkpoint, on held-out text
	$(MOEPP) figures $(if $(CKPT),--ckpt='$(CKPT)') $(DATA_ARG) $(ARGS)

eval: setup ## scores by lm-eval, and the experts that each task takes: TASKS=paper, CKPT=…
	$(MOEPP) eval --tasks='$(TASKS)' $(if $(CKPT),--ckpt='$(CKPT)') $(ARGS)

# without a network there is nothing to install: then with what the machine's python3 has, and without what it lacks
bench: ## speed against the limits and peers: a table, a CSV, a plot (ARGS=--quick)
	@if $(MAKE) --no-print-directory $(VENV)/.bench; then run=$(VENV)/bin/python; \
	else run=python3; echo "nothing could be installed: going on with this machine's python3"; fi; \
	$$run -m tests.bench $(ARGS)

gpu: ## what a GPU has to show, in parts of ten minutes, without a network (ARGS=--toy: rehearsed on any machine)
	@if [ -x $(VENV)/bin/python ]; then run=$(VENV)/bin/python; else run=python3; fi; $$run -m tests.gpu $(ARGS)

$(VENV)/.bench: $(VENV)/.done
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

resume: setup ## continue the newest run of RECIPE
	$(MOEPP) fit --config $(RECIPE) --ckpt_path last $(ARGS) $(DATA_ARG)

generate: setup ## PROMPT="…": text from the newest checkpoint, or from CKPT=…
	@$(MOEPP) generate --prompt="$$PROMPT" $(if $(CKPT),--ckpt='$(CKPT)') $(ARGS)

test: setup ## the test suite, on all cores (ARGS="-m heavy": its heavy part; --hypothesis-profile=whole: four times the fuzz)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal -m 'not heavy' $(ARGS)

soak: setup ## kill training runs at random moments and see that nothing is lost
	$(VENV)/bin/python -m tests.soak $(ARGS)

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
