# What CI runs is what people run. Every target sets up what it needs in its own .venv; a second run is fast.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PROMPT ?= A large blue ball drops and bounces twice.
MINUTES ?= 60

.PHONY: demo test soak lint types bench docs clean

# Runtime only: what a person who wants a film needs.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "tubelet needs Python 3.11 or newer on the PATH; install it and run make again"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# Tools and oracles: what a person who changes tubelet needs.
$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.runtime
	@mkdir -p out
	@$(BIN)/tubelet generate "$(PROMPT)" --seed 0 --out out/demo.mp4 --sheet out/demo.png

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n 2 --dist loadfile

# The promises of serving at length: hundreds of kills, long queues, full disks, MINUTES of watching for leaks.
soak: $(VENV)/.dev
	@$(BIN)/python -m tests.soak --minutes $(MINUTES)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/codespell src tests docs benchmarks *.md

types: $(VENV)/.dev
	@$(BIN)/pyright

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks

docs: $(VENV)/.dev
	@$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) out build dist
