# `make serve` on a fresh machine installs, makes the demo model and serves it; `make help` lists the rest.
# PYTHON picks the interpreter of the environment, PORT the server's port, ARGS goes to the command.
VENV  := .venv
BIN   := $(VENV)/bin
PORT  ?= 8000
ARGS  ?=
STAMP := $(VENV)/.gimbal-installed
# One thread per process: tests run side by side and torch would take every core in each.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: hosts docs dist bench-sim validate help install serve test check compat lint pages bench-core bench-placement bench-scale \
	bench-start correctness soak soak-long chaos fuzz peers lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## build .venv from requirements/lock-cpu.txt

$(STAMP): requirements/lock-cpu.txt pyproject.toml scripts/bootstrap.py
	@GIMBAL_PYTHON="$(PYTHON)" $$(command -v python3 || command -v python) scripts/bootstrap.py
	@touch $(STAMP)

serve: $(STAMP) ## make the demo model and serve it through vLLM, DP=2 + EP, Gimbal on
	$(BIN)/gimbal serve --demo --port $(PORT) $(ARGS)

# Two tests at a time; those with servers one by one, and then nothing beside them.
# With ARGS there may be none of a kind (exit code 5).
test: $(STAMP) ## every test, live servers included
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not live" $(ARGS) || [ $$? -eq 5 ]
	$(TEST_ENV) $(BIN)/python -m pytest -m live $(ARGS) || [ $$? -eq 5 ]

hosts: $(STAMP) ## of the live tests those over two hosts, made of network namespaces (root; two minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -m hosts $(ARGS)

check: $(STAMP) ## the fast tests: no server, nothing slow
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 -m "not live and not slow" $(ARGS)

compat: $(STAMP) ## Gimbal on a vLLM that has no CPU build yet: make compat VERSION=0.33.0 (20 minutes)
	$(BIN)/python -m scripts.compat $(VERSION) $(ARGS)

lint: $(STAMP) ## ruff, mypy (strict on core), import contracts, the wheel's lines and size budget
	$(BIN)/ruff check gimbal reproduction tests benchmarks examples scripts
	$(BIN)/ruff format --check gimbal reproduction tests benchmarks examples scripts
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/size_budget.py

pages: $(STAMP) ## write the generated pages of docs/: configuration, traces, models
	$(BIN)/python -m scripts.configuration_page
	$(BIN)/python -m scripts.traces_page
	$(BIN)/python -m scripts.models_page

dist: $(STAMP) ## the wheel in dist/, with what a registry would say of it; and the notes of the release
	$(BIN)/python -m pip install -q twine
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .
	$(BIN)/python -m twine check --strict dist/*.whl
	$(BIN)/python -m pytest -q tests/test_wheel.py
	$(BIN)/python -m scripts.release_notes || echo "not to be released yet"

docs: $(STAMP) ## the documentation as a site, in site/; a warning is an error
	$(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/mkdocs build --strict $(ARGS)

bench-core: $(STAMP) ## benchmarks that need no server
	$(TEST_ENV) $(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-only -m "not live and not scale" $(ARGS)

# Few rounds: what is asked for is the order of magnitude, with up to 256 engines and 320 ranks.
SCALE := -q -s -o python_files='bench_*.py' --benchmark-only --benchmark-columns=median,iqr
bench-scale: $(STAMP) ## what a decision, a scrape, a row and a plan cost with 8 to 320 engines
	$(TEST_ENV) $(BIN)/python -m pytest benchmarks/bench_dispatch.py benchmarks/bench_board.py $(SCALE) \
		-k "test_decision and not baselines and 3000 and cached or test_read or test_route or test_metrics or rows_of" $(ARGS)
	$(TEST_ENV) PROMETHEUS_MULTIPROC_DIR=$$(mktemp -d) $(BIN)/python -m pytest benchmarks/bench_board.py $(SCALE) \
		-k test_metrics $(ARGS)
	$(TEST_ENV) $(BIN)/python -m pytest benchmarks/bench_placement_hook.py $(SCALE) -k test_propose $(ARGS)
	$(TEST_ENV) $(BIN)/python benchmarks/bench_placement.py --cases R96 R320 --windows 4 --skip 2 --repeat 2 --shares 0.7

bench-sim: $(STAMP) ## speed and memory of the simulator
	$(TEST_ENV) $(BIN)/python benchmarks/bench_sim.py $(ARGS)

validate: $(STAMP) ## the simulator against real runs
	$(BIN)/python benchmarks/validate_simulator.py $(ARGS)

correctness: $(STAMP) ## expert-parallel answers against one engine's, before and after migrations
	$(BIN)/python -m tests.live.check.correctness $(ARGS)

soak: $(STAMP) ## 2,000 requests, one in ten aborted, while experts migrate
	$(BIN)/python -m tests.live.check.soak $(ARGS)

soak-long: $(STAMP) ## ten minutes with every level on: memory of every process, flat or not
	$(BIN)/python -m tests.live.check.soak --minutes 10 $(ARGS)

chaos: $(STAMP) ## what is killed, frozen, truncated, filled and flooded, and what it costs
	$(BIN)/python -m tests.live.chaos $(ARGS)

fuzz: $(STAMP) ## a million generated inputs for everything that takes any
	$(TEST_ENV) $(BIN)/python -m tests.fuzz $(ARGS)

peers: $(STAMP) ## vLLM's own tests, with plain vLLM and with Gimbal; writes docs/peers.md
	$(BIN)/python scripts/peers.py $(ARGS)

bench-start: $(STAMP) ## start the demo server five times: seconds to ready by phase, memory
	$(BIN)/python benchmarks/startup.py $(ARGS)

bench-placement: $(STAMP) ## expert placement against vLLM's default and other baselines
	$(TEST_ENV) $(BIN)/python benchmarks/bench_placement.py $(ARGS)

lock: ## resolve the dependencies again and rewrite requirements/lock-cpu.txt
	@$(BIN)/python scripts/bootstrap.py --lock

clean: ## remove the environment and everything built
	rm -rf $(VENV) .gimbal build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
