# Commands for working on mmdlm; `make` alone lists them. They use .venv, made on first use with the
# versions of configs/tested-versions.txt; only test-newest has an environment of its own.
# PYTHON=python3.12 picks the Python that .venv is made with.

# `make test-newest` calls make again with MMDLM_NEWEST=yes.
override NEWEST := $(filter yes,$(MMDLM_NEWEST))
override VENV := $(if $(NEWEST),.venv-newest,.venv)
TESTED := configs/tested-versions.txt
VERSIONS := $(if $(NEWEST),--upgrade --upgrade-strategy eager,--constraint $(TESTED))
PY := $(VENV)/bin/python
STAMP := $(VENV)/.mmdlm-installed
BUSY := $(VENV)/.mmdlm-installing
EXTRAS := sim,data,speech,eval,demo,train,quant,dev
GL := libegl1 libegl-mesa0 libgl1-mesa-dri

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
# The environment belongs to this folder and holds what the commands below start.
COMPLETE := import os, sys; from importlib.util import find_spec; \
	ours = find_spec("mmdlm"); \
	needed = ("torch", "torchvision", "torchaudio", "lightning", "timm", "metaworld", "pytest", "ruff"); \
	sys.exit(not (ours and os.path.samefile(ours.origin, sys.argv[1]) and all(map(find_spec, needed))))
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup system demo check test test-newest test-slow test-gpu bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## Create or repair .venv with all that the demo and the tests need
	@if test -e $(VENV) || test -L $(VENV); then \
		if test -e $(BUSY) || ! $(PY) -c '$(SUPPORTED)' 2>/dev/null; then \
			echo "$(VENV) is broken, half installed or of an unsupported Python: making it anew"; \
			rm -rf $(VENV); \
		elif ! (cd / && "$(CURDIR)/$(PY)" -c '$(COMPLETE)' "$(CURDIR)/mmdlm/__init__.py" 2>/dev/null); then \
			rm -f $(STAMP); \
		fi; \
	fi
	@$(MAKE) --no-print-directory --silent $(STAMP)

$(STAMP): pyproject.toml $(TESTED)
	@test -x $(PY) || test -n "$(PYTHON)" || \
		{ echo "mmdlm needs Python 3.11, 3.12 or 3.13 (make PYTHON=/path/to/python3)"; exit 1; }
	@echo "Installing into $(VENV); the first time this fetches torch, which takes minutes."
	@mkdir -p $(VENV) && touch $(BUSY)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade >/dev/null
	@$(PY) -m pip install --quiet --disable-pip-version-check $(VERSIONS) -e '.[$(EXTRAS)]'; \
		status=$$?; rm -f $(BUSY); exit $$status
	@$(MAKE) --no-print-directory system
	@touch $(STAMP)

# The simulators draw through system libraries that no wheel carries. Never fails: all else works
# without them, and `mmdlm doctor` goes on saying what is missing.
system:
	@missing() { $(PY) -m mmdlm.commands.doctor --system; }; \
	install() { DEBIAN_FRONTEND=noninteractive timeout 300 \
		apt-get install -qq -y --no-install-recommends "$$@" >/dev/null 2>&1; }; \
	if need=$$(missing); then exit 0; fi; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		echo "Installing system libraries for the simulators: $$need"; \
		timeout 120 apt-get update -qq >/dev/null 2>&1; \
		for package in $$need; do install $$package; done; \
		if need=$$(missing); then exit 0; fi; \
		case " $$need " in *" libosmesa6 "*) install $(GL); if need=$$(missing); then exit 0; fi;; esac; \
	fi; \
	test -z "$$need" || echo "The simulators cannot draw here yet; on Debian or Ubuntu: apt-get install $$need"

demo: setup ## Caption, answer, transcribe and drive a robot with the bundled model
	@$(VENV)/bin/mmdlm demo --out demo_out

check: setup ## Style, format and fast tests: what to run before a commit
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PYTEST) -q $(PARALLEL)

test: setup ## Fast tests
	@$(PYTEST) -q $(PARALLEL)

test-newest: ## Fast tests with the newest versions of all libraries, in .venv-newest
	@rm -f .venv-newest/.mmdlm-installed
	@$(MAKE) --no-print-directory MMDLM_NEWEST=yes test

test-slow: setup ## Tests that take minutes each
	@$(PYTEST) -q -m slow

test-gpu: setup ## Tests that need a CUDA device
	@$(PYTEST) -q -m gpu

bench: setup ## Measure decoding speed on this machine
	@$(PY) -m tests.speed decode

clean: ## Remove .venv, caches and what the demo wrote
	@rm -rf .venv .venv-newest build dist demo_out .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
