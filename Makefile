# Everything a contributor or CI runs. `make` alone lists the targets. Each target installs what it needs into
# .venv first; a repeated call costs next to nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
WORKERS ?= 3
INPUT ?=
OUTPUT ?=
# Paths reach the recipes through the environment, so that any character in them is safe.
export INPUT OUTPUT

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SWAGGER := src/mcp_control/web/swagger
PYTEST := $(BIN)/python -m pytest

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- set-up -------------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(VENV)/.stamp-project $(SWAGGER)/swagger-ui-bundle.js ## Install everything into .venv, build the web assets
	@:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-requirements: requirements/dev.txt | $(BIN)/python
	@echo "Installing the locked requirements (a few minutes the first time)"
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@

# The build backend is among the locked requirements, so nothing unpinned is fetched here.
$(VENV)/.stamp-project: pyproject.toml $(VENV)/.stamp-requirements
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

.PHONY: web-assets
web-assets: $(SWAGGER)/swagger-ui-bundle.js ## Copy the API docs page's assets from npm into the package

$(SWAGGER)/swagger-ui-bundle.js: ui/docs/package.json ui/docs/package-lock.json ui/docs/.npmrc
	@echo "Fetching the API docs page's assets"
	@cd ui/docs && npm ci --silent
	@mkdir -p $(SWAGGER)
	@cd ui/docs/node_modules/swagger-ui-dist && cp LICENSE NOTICE swagger-ui.css swagger-ui-bundle.js.LICENSE.txt swagger-ui-bundle.js $(CURDIR)/$(SWAGGER)/
	@touch $@

# Debian packages: strace for the fault tests, wrk for the benchmark, Redis for the cluster. Silent when all are there.
.PHONY: system-packages
system-packages: ## Install strace, wrk and redis-server with apt where they are missing
	@missing=$$(for tool in strace wrk redis-server; do command -v $$tool > /dev/null || echo $$tool; done | xargs); \
	if [ -n "$$missing" ]; then \
		command -v apt-get > /dev/null || { echo "Please install: $$missing" >&2; exit 1; }; \
		as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		echo "Installing $$missing"; \
		$$as_root apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends $$missing > /dev/null; \
	fi

.PHONY: lock
lock: $(VENV)/.stamp-requirements ## Resolve the requirement files anew (make lock UPGRADE=--upgrade for newest)
	@compile() { $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header pyproject.toml "$$@"; }; \
	compile --all-extras $(UPGRADE) -o requirements/dev.txt; \
	compile --constraints requirements/dev.txt -o requirements/base.txt; \
	compile --constraints requirements/dev.txt --extra server -o requirements/server.txt; \
	compile --constraints requirements/dev.txt --extra techdeck -o requirements/techdeck.txt

# --- checks and tests ---------------------------------------------------------------------------------------------

.PHONY: check
check: lint types layers docs ## All static checks

.PHONY: lint
lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: setup ## mypy --strict on the package, pyright on the SDK
	$(BIN)/mypy
	@[ ! -d src/mcp_control/sdk ] || PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

.PHONY: layers
layers: setup ## import-linter: who may import whom
	$(BIN)/lint-imports --no-logo

.PHONY: docs
docs: setup ## Build the documentation; a warning is an error
	@[ ! -e docs/conf.py ] || $(BIN)/sphinx-build -q -W -n --keep-going -b html docs docs/_build/html

.PHONY: test
test: setup system-packages ## The quick suite (at most 15 minutes)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not long" $(ARGS)

.PHONY: test-long
test-long: setup system-packages ## Full crash loops, large data
	$(PYTEST) -m long --timeout 7200 $(ARGS)

# --- run ----------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: setup ## Server, three agents and the techdeck pipeline, start to end (INPUT=file OUTPUT=folder)
	@$(BIN)/python -m mcp_control.cli.main demo $(if $(INPUT),--input "$$INPUT") $(if $(OUTPUT),--output "$$OUTPUT")

.PHONY: up
up: setup ## Leave a server and three agents running until Ctrl-C
	@$(BIN)/mcpctl up --agents 3

.PHONY: bench
bench: setup system-packages ## Benchmarks in at most 8 minutes: JSON lines and a table
	@$(BIN)/python -m bench

.PHONY: bench-full
bench-full: setup system-packages ## All benchmark sizes, and ratios to the peers in MCP_CONTROL_BENCH_PEERS
	@$(BIN)/python -m bench --full

.PHONY: bench-cluster
bench-cluster: setup system-packages ## Benchmarks of servers on MongoDB and Redis (ARGS=--full: a million tasks; ARGS=--profile)
	@$(BIN)/python -m bench.cluster $(ARGS)

.PHONY: clean
clean: ## Remove .venv and all that was built or cached
	rm -rf $(VENV) build dist docs/_build ui/docs/node_modules $(SWAGGER) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2> /dev/null || true
