# The commands of this repository; `make` alone lists them. Everything Python lives in $(VENV), so that nothing is
# installed into the machine but Debian packages, and those only as root (tools/packages).
#
# The recipes leave stamps in $(VENV): a second run repeats only what a changed lock file or native source asks for.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# A folder of wheels to install from, instead of an index: make wheels fills one.
WHEELS ?=
# What install makes: an environment of its own with bin/ascproxy in it, independent of this folder afterwards.
PREFIX ?= /opt/ascproxy
# Arguments of the command that a target runs.
ARGS ?=
# What run listens on; 0 picks a free port.
HTTPS_PORT ?= 0
METRICS_PORT ?= 0
# How long each fuzz target runs, in seconds.
FOR ?= 30

python := $(VENV)/bin/python
# Every distribution comes with a hash from the lock files; with WHEELS, from that folder and nothing else.
pip_install = -m pip --disable-pip-version-check install -qq --require-hashes $(offline)
offline := $(if $(WHEELS),--no-index --find-links $(abspath $(WHEELS)))
native := $(wildcard native/*.c native/*.h)

.PHONY: help
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: build ## start a model server and the gateway, stream one answer (ONCE=1 ends then; UPSTREAM=url MODEL=name)
	@$(python) tools/first_light.py $(if $(filter-out 0,$(ONCE)),--once) \
	    $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(if $(MODEL),--model '$(MODEL)') \
	    --https-port $(HTTPS_PORT) --metrics-port $(METRICS_PORT)

.PHONY: test
test: $(VENV)/.dev $(VENV)/.built ## install, build and run every test (ARGS="tests/unit -k name" for some)
ifdef ARGS
	$(python) -m pytest -ra $(ARGS)
else
	$(python) -m pytest -ra -n auto $(together)
	$(python) -m pytest -ra $(alone)
endif
# What measures in time what a service does, or kills its processes, has the machine to itself. The rest shares the cores.
alone = $(filter-out $(sharing),$(wildcard tests/process/test_*.py)) tests/fault tests/real
sharing = $(patsubst %,tests/process/test_%.py,cli control errors keys proxy_protocol routes scenarios sdks sim systemd_units tls upstreams)
together = $(filter-out tests/process tests/fault tests/real tests/kit tests/golden tests/wire,$(patsubst %/,%,$(wildcard tests/*/))) \
    $(sharing)

.PHONY: test-real
test-real: $(VENV)/.dev $(VENV)/.built ## the SDKs against a real vLLM on CPU behind the gateway (installs 2.5 GB into $(VENV)-vllm)
	tests/real/install $(VENV)-vllm
	ASCPROXY_VLLM=$(VENV)-vllm $(python) -m pytest -ra tests/real $(ARGS)

.PHONY: test-systemd
test-systemd: $(VENV)/.dev $(VENV)/.built ## the units on a booted Debian in systemd-nspawn (as root; makes its root once, 270 MB)
	tools/packages host
	ASCPROXY_SYSTEMD_HOST=1 $(python) -m pytest -ra tests/process/test_systemd_host.py tests/process/test_systemd_units.py $(ARGS)

.PHONY: check
check: $(VENV)/.dev ## linters, types, floors of the packages, compiler warnings
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	@for unit in $(wildcard native/*.c native/tests/*.c native/fuzz/*.c bench/*.c); do \
	    echo "cc $$unit"; \
	    $(CC) -std=c11 -O2 -Wall -Wextra -Wshadow -Werror $(dialect) -c -o /dev/null $$unit; \
	done
# The stub and the load of bench/ define what they need themselves.
dialect = $$([[ $$unit == bench/* ]] || echo -D_GNU_SOURCE -Inative -isystem $(python_headers))
python_headers = $$($(python) -c 'import sysconfig; print(sysconfig.get_paths()["include"])')

.PHONY: sanitize
sanitize: $(VENV)/.dev ## C tests, and the Python tests that drive native code, under address and undefined sanitizers
	native/tests/run
	PYTHON=$(python) native/tests/python $(sanitized)
# Left out: what starts processes without the instrumented build, and what reads the whole memory of the process, which
# under the sanitizer has terabytes of shadow.
sanitized = $(wildcard tests/unit/native tests/unit/net tests/contract tests/property tests/conformance/test_recordings.py) \
    -k "not real_service and not in_memory_once" -n auto

.PHONY: fuzz
fuzz: ## every fuzz target of the native code, FOR=30 seconds each
	tools/packages build fuzz
	native/fuzz/run $(FOR)

.PHONY: bench
bench: build ## measure against nginx and haproxy (ARGS="--help" for what can be chosen)
	tools/packages bench
	$(python) bench/run $(ARGS)

.PHONY: soak
soak: build ## an hour under load, then a verdict: FOR=3600 seconds (ARGS="--kill 10 --reload 7 --json")
	$(python) bench/soak --for $(if $(filter file,$(origin FOR)),3600,$(FOR)) $(ARGS)

.PHONY: locust
locust: $(VENV)/.venv ## users against OPENAI_BASE_URL: SCENARIO=chat|stream|embed|duplicate SHAPE=ramp|spike|soak (docs/load-testing.md)
	$(python) bench/install locust
	.venv-locust/bin/locust -f bench/scenarios/$(SCENARIO).py$(if $(SHAPE),$(comma)bench/scenarios/$(SHAPE).py) $(ARGS)
SCENARIO ?= chat
comma := ,

.PHONY: build
build: $(VENV)/.runtime $(VENV)/.built ## an environment with this folder's ascproxy in it: .venv/bin/ascproxy

.PHONY: install
install: ## install into PREFIX=/opt/ascproxy; WHEELS=dir takes every dependency from that folder, without network
	PYTHON=$(PYTHON) tools/packages build
	$(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python $(pip_install) -r requirements/build.txt -r requirements/runtime.txt
	$(PREFIX)/bin/python -m pip --disable-pip-version-check install -qq --no-index --no-deps --no-build-isolation --force-reinstall .
	@echo "installed: $(PREFIX)/bin/ascproxy"

.PHONY: wheels
wheels: $(VENV)/.venv ## fill wheels/ with every dependency, to carry to a machine without network
	$(python) -m pip --disable-pip-version-check download -qq --require-hashes --only-binary :all: --dest wheels \
	    -r requirements/build.txt -r requirements/runtime.txt
	$(python) -m pip --disable-pip-version-check download -qq --require-hashes --only-binary :all: --dest wheels \
	    -r requirements/dev.txt

.PHONY: lock
lock: ## resolve the dependencies anew into requirements/*.txt
	test -x $(VENV)-lock/bin/uv || { $(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install --quiet uv; }
	$(uv_compile) requirements/build.in --output-file requirements/build.txt
	$(uv_compile) pyproject.toml --output-file requirements/runtime.txt
	$(uv_compile) pyproject.toml requirements/dev.in --constraint requirements/runtime.txt --output-file requirements/dev.txt
# One file for all supported interpreters (--universal), naming no index: where packages come from is the machine's matter.
uv_compile = $(VENV)-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.PHONY: clean
clean: ## remove what these commands made, except wheels/
	rm -rf $(VENV) $(VENV)-* build dist ascproxy.egg-info native/build .mypy_cache .ruff_cache .pytest_cache \
	    .hypothesis .import_linter_cache
	find ascproxy tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f ascproxy/*.so

$(VENV)/.venv:
	PYTHON=$(PYTHON) tools/packages build
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: requirements/build.txt requirements/runtime.txt | $(VENV)/.venv
	$(python) $(pip_install) $(addprefix -r ,$^)
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	$(python) $(pip_install) -r $<
	@touch $@

$(VENV)/.editable: pyproject.toml $(VENV)/.runtime
	$(python) -m pip --disable-pip-version-check install -qq --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.built: setup.py $(native) $(VENV)/.editable
	$(python) setup.py --quiet build_ext --inplace
	@touch $@
