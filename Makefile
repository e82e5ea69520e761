# Every target works on a machine that has Python 3.10-3.12 and nothing else.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo serve test check eval readme-tables clean

$(STAMP): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10-3.12 found; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e '.[test,bench]'
	@touch $@

demo: $(STAMP)  ## answer questions over shared documents, sparse and dense, side by side
	$(BIN)/python -m kascade_sglang.demo

serve: $(STAMP)  ## keep the demo model's server up; PORT=30000
	$(BIN)/python -m kascade_sglang.demo.serve --port $(or $(PORT),30000)

test: check  ## unit tests, then end-to-end tests on real servers
	$(BIN)/python -m pytest -q

check: $(STAMP)  ## lint
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

eval: $(STAMP)  ## retrieval accuracy of every method at equal budgets, through the server
	$(BIN)/python -m kascade_sglang.evaluation

readme-tables: $(STAMP)  ## fill the README's tables in from benchmarks/results
	$(BIN)/python benchmarks/readme_tables.py

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
