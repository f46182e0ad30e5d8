## make run        start the appliance with its demo site on http://127.0.0.1:8080
## make exports    export now what make run has collected
## make status     show what came in and what was exported
## make test       set everything up and run the tests but those of the next two
## make test-full  that, and what needs PostgreSQL servers of one's own: versions, TLS, PgBouncer, failover
## make spark-test read an export with Spark (installs it: 450 MB; needs Java 17 or newer)
## make bench      measure what it carries on this machine
## make torture    kill and freeze everything for longer than the tests do (about 10 minutes)
## make soak       an hour of load while everything breaks, and a count of every event (ARGS="--minutes 2")
## make audit      ask whether a locked version has a known vulnerability (needs the network)
## make lint       ruff, mypy, import-linter, deptry
## make image-test build the image and try it for real
## make lock       renew the locked versions
.PHONY: help run exports status install test test-full spark-test bench torture soak audit lint format image-test lock \
    programs axe clean
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq

help:
	@sed -n "s/^## //p" $(MAKEFILE_LIST)

# Without a config.toml these show what there is: demo site, admin page, data in ./data.
ifeq ($(wildcard config.toml),)
run exports status: export APPLIANCE_SERVER__BIND ?= 127.0.0.1:8080
run exports status: export APPLIANCE_SERVER__DATA_DIR ?= $(CURDIR)/data
run exports status: export APPLIANCE_SERVER__DEMO ?= true
run exports status: export APPLIANCE_ADMIN__PASSWORD ?= demo
run: NOTE = echo "No config.toml here: starting the demo. The admin page's password is \"$$APPLIANCE_ADMIN__PASSWORD\"."; echo
else
run: NOTE = :
endif

run: $(VENV)/.installed
	@$(NOTE)
	@exec $(BIN)/appliance serve

# ("export" is a word of make's own.)
exports: $(VENV)/.installed
	@$(BIN)/appliance export

status: $(VENV)/.installed
	@$(BIN)/appliance status

# The locked versions, then the package itself as a link to this checkout.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed (PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install --no-deps --editable .
	@touch $@

# The tools of development, at the versions locked for them; --no-deps because that list is complete.
$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	$(PIP) install --require-hashes --no-deps -r requirements-dev.lock
	@touch $@

# Spark is large, and only its own tests need it.
$(VENV)/.installed-spark: $(VENV)/.installed-dev requirements-spark.lock
	$(PIP) install --require-hashes --no-deps -r requirements-spark.lock
	@touch $@

install: $(VENV)/.installed-dev

# Three at a time, because they wait a lot; those that look at how fast answers come need the machine for themselves.
test: install programs axe
ifeq ($(ARGS),)
	$(BIN)/pytest --numprocesses 3 --dist worksteal -m "not alone and not spark and not servers"
	$(BIN)/pytest -m alone
else
	$(BIN)/pytest $(ARGS)
endif

test-full: test
	$(BIN)/pytest --numprocesses 3 --dist worksteal -m servers

spark-test: $(VENV)/.installed-spark
	@java -version 2>/dev/null || { echo "Spark needs Java 17 or newer: apt-get install default-jre-headless"; exit 1; }
	$(BIN)/pytest -m spark $(ARGS)

torture: install
	TORTURE_ROUNDS=30 OUTAGE_SECONDS=60 FAULT_POINTS=all $(BIN)/pytest -s tests/test_torture.py \
	    tests/test_fault_points.py $(ARGS)

soak: install
	PYTHONPATH=tests $(BIN)/python -m soak $(ARGS)

bench: install
	$(BIN)/python -m bench $(ARGS)

# Each lock of development holds what is shipped too.
audit: install
	@$(BIN)/python tests/audit.py requirements-dev.lock requirements-spark.lock requirements-build.lock

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

programs:
	@tests/install-programs

axe: tests/browser/node_modules/.package-lock.json

# Three megabytes; without npm the browser tests of accessibility are skipped.
tests/browser/node_modules/.package-lock.json: tests/browser/package-lock.json
	@if command -v npm >/dev/null; then \
	    npm ci --prefix tests/browser --no-audit --no-fund --ignore-scripts --silent && touch $@; \
	else echo "npm is not installed: the tests of accessibility will be skipped"; fi

image-test:
	@tests/image-test

lock: install
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate \
	    --no-emit-index-url --no-emit-find-links --no-header --quiet --upgrade -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml --group dev -c requirements.lock --universal --python-version 3.11 \
	    --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --no-header --quiet --upgrade \
	    -o requirements-dev.lock
	$(BIN)/uv pip compile --group pyproject.toml:spark -c requirements.lock -c requirements-dev.lock --universal \
	    --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --no-header \
	    --quiet --upgrade -o requirements-spark.lock
	$(BIN)/uv pip compile --group pyproject.toml:build -c requirements.lock -c requirements-dev.lock --universal \
	    --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --no-header \
	    --quiet --upgrade -o requirements-build.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
