# make app     install what is missing, start the app on http://127.0.0.1:7860
# make test    install what is missing, check everything, run every test
# make check   only the checks: style and types
#
# A stamp in .venv carries the checksum of the files that say what to install,
# so a second run installs nothing and a changed requirement installs again.

.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

checksum = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
APP_FILES := requirements.txt requirements-demo.txt constraints.txt pyproject.toml
APP_INSTALLED := $(VENV)/.app-$(call checksum,$(APP_FILES))
TEST_INSTALLED := $(VENV)/.test-$(call checksum,$(APP_FILES) requirements-dev.txt)

.PHONY: help app test check
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

app: $(APP_INSTALLED)
	$(BIN)/python app.py

test: check
	$(BIN)/python tests/browser/chromium.py
	$(BIN)/python -m pytest

check: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "LLM Merge needs Python 3.11 or newer: make app PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The order matters: the demo packages and this project bring no dependencies of their own.
$(APP_INSTALLED): | $(BIN)/python
	@echo "Installing LLM Merge into $(VENV): a few minutes, once."
	$(PIP) -c constraints.txt -r requirements.txt
	$(PIP) --no-deps -r requirements-demo.txt
	$(PIP) --no-deps -e .
	@rm -f $(VENV)/.app-* && touch $@

$(TEST_INSTALLED): $(APP_INSTALLED)
	@echo "Installing the test tools into $(VENV)."
	$(PIP) -c constraints.txt -r requirements-dev.txt
	@rm -f $(VENV)/.test-* && touch $@
