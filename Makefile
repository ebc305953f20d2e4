# What CI runs is what people run. Every target sets up what it needs in its own .venv; a second run is fast.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := $(VENV)/clients
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PROMPT ?= A large green ball drops and bounces twice.
MINUTES ?= 60
CPU_TORCH := https://download.pytorch.org/whl/cpu

.PHONY: demo test clients soak lint types audit bench docs clean

# The registry's torch for Linux on x86 brings CUDA along, some gigabytes. Where there is no card, PyTorch's own CPU build of it
# is tried first, unless pip or uv is told where packages come from; TORCH_INDEX=URL takes another build, TORCH_INDEX= none.
define install_torch
$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' && exit; \
index=$$TORCH_INDEX; \
if test -z "$${TORCH_INDEX+set}" && test "$$(uname -sm)" = "Linux x86_64" \
	&& ! ls /dev/nvidiactl /dev/kfd /dev/dxg 2>/dev/null | grep -q . && ! env | grep -q '^UV_' \
	&& ! $(BIN)/python -m pip config list 2>/dev/null | grep -q 'index\|find-links'; then index=$(CPU_TORCH); fi; \
test -z "$$index" || $(PIP) install --no-deps --retries 0 --timeout 5 --index-url "$$index" \
	"$$(grep '^torch' constraints.txt)" >/dev/null 2>&1 || true
endef

# Runtime only: what a person who wants a film needs.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "tubelet needs Python 3.11 or newer on the PATH; install it and run make again"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(install_torch)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# Tools and oracles: what a person who changes tubelet needs.
$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.runtime
	@mkdir -p out
	@$(BIN)/tubelet generate "$(PROMPT)" --seed 0 --out out/demo.mp4 --sheet out/demo.png

# Clients of fixed versions are fetched once, in at most a minute; the tests of those that are not to be had are skipped.
test: $(VENV)/.dev
	@$(BIN)/python -m tests.clients --pinned --within 60 $(CLIENTS) || true
	@$(BIN)/python -m pytest -n 2 --dist loadfile

# Other people's clients, unmodified, against our server: all of tests/clients.py, today's versions among them.
clients: $(VENV)/.dev
	@$(BIN)/python -m tests.clients $(CLIENTS)
	@TUBELET_TEST_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest -rs -n 2 --dist loadfile tests/e2e/test_serve_clients*.py

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

# Known vulnerabilities of what is installed here. It asks PyPI's advisories, so nothing else depends on it.
audit: $(VENV)/.dev
	@mkdir -p out
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && \
		$(VENV)/audit/bin/python -m pip --disable-pip-version-check -q install 'pip-audit>=2.10'; }
	@$(VENV)/audit/bin/pip-audit --skip-editable --progress-spinner off --format json --output out/audit.json \
		--path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || { cat out/audit.json; exit 1; }
	@$(BIN)/python -c "import json; found = json.load(open('out/audit.json'))['dependencies']; \
		left = [one['name'] for one in found if 'skip_reason' in one]; \
		print(len(found) - len(left), 'packages without a known vulnerability; not looked up:', ', '.join(left) or 'none'); \
		raise SystemExit(len(left) > len(found) // 10)"

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks

docs: $(VENV)/.dev
	@$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) out build dist
