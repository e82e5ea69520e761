# Every target works on a machine that has Python 3.10-3.12 and nothing else.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
# The release that make test runs on; make test-host SGLANG=... tries another in a venv of its own.
SGLANG ?= 0.5.17
VENV := .venv$(if $(filter-out 0.5.17,$(SGLANG)),-$(SGLANG))
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PYTEST := $(BIN)/python -m pytest -q
# Two processes, each using about one core; tests that share a server stay together.
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder
INTERPRETED := tests/kernels tests/backend tests/benchmarks/test_bench_kernels.py
UNIT_TESTS := tests/project tests/plan tests/plugin tests/kernels tests/backend tests/calibration/test_anchors.py \
	tests/calibration/test_similarity.py tests/calibration/test_elimination.py tests/calibration/test_pools.py \
	tests/evaluation/test_scorers.py \
	tests/evaluation/test_fitting.py tests/evaluation/test_methods.py --deselect tests/plugin/test_demo_server.py \
	--ignore=tests/project/test_wheel.py --deselect tests/project/test_examples.py::test_python_examples_run
# Importing SGLang takes 8 s, and 20 s where no bytecode is kept: many containers forbid it.
unexport PYTHONDONTWRITEBYTECODE
SANITIZER ?= $(firstword $(shell command -v compute-sanitizer 2>/dev/null) $(wildcard /usr/local/cuda/bin/compute-sanitizer))

.PHONY: demo serve test test-fast fuzz test-host try-host test-serving test-kernels test-gpu sanitize check eval bench \
	bench-decode bench-prefill bench-quality bench-serving soak readme-tables wheel test-wheel clean

$(STAMP): setup.cfg setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10-3.12 found; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
# Releases between pin a stub that no offline index has; nothing here uses it.
	echo "cuda-tile ; sys_platform == 'never'" > $(VENV)/overrides
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --override $(VENV)/overrides \
		-e '.[test,bench]' sglang==$(SGLANG)
	@touch $@

demo: $(STAMP)  ## answer questions over shared documents, sparse and dense, side by side
	$(BIN)/python -m kascade_sglang.demo

serve: $(STAMP)  ## keep the demo model's server up; PORT=30000
	$(BIN)/python -m kascade_sglang.demo.serve --port $(or $(PORT),30000)

test: check  ## all that needs no GPU; JOBS=2 processes side by side
	@$(MAKE) --no-print-directory --keep-going test-serving test-kernels

test-serving: export CUDA_VISIBLE_DEVICES :=
test-serving: $(STAMP)  ## real servers, the backend on the torch reference, kernels compiled for three GPUs, unit tests
	$(PYTEST) $(SIDE_BY_SIDE) --ignore=tests/kernels

test-kernels: export CUDA_VISIBLE_DEVICES :=
test-kernels: $(STAMP)  ## kernels and the backend in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) --dist worksteal $(INTERPRETED)

test-host: $(STAMP)  ## what depends on SGLang, on another release: make test-host SGLANG=0.5.23
	$(PYTEST) $(SIDE_BY_SIDE) tests/e2e tests/backend tests/compile tests/plugin tests/plan

# What it changes is what to commit where the tests pass.
try-host:  ## the same on a release that is not verified yet: make try-host SGLANG=0.5.24
	grep -q '"$(SGLANG)"' kascade_sglang/host/release.py || \
		sed -i 's/^VERIFIED = (\(.*\))$$/VERIFIED = (\1, "$(SGLANG)")/' kascade_sglang/host/release.py
	sed -i 's/\(sglang>=.*,<=\).*/\1$(SGLANG)/' setup.cfg
	$(MAKE) test-host SGLANG=$(SGLANG)

test-fast: $(STAMP)  ## unit tests: no server, no interpreter, no compilation
	$(PYTEST) $(UNIT_TESTS)

fuzz: $(STAMP)  ## random cases of every kernel and of whole steps, on a GPU or in Triton's interpreter; SECONDS=60
	$(if $(shell command -v nvidia-smi),,TRITON_INTERPRET=1) $(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60)

test-gpu: $(STAMP)  ## kernels, backend and servers on a GPU, then tests of every kernel under compute-sanitizer
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make: test-gpu needs a CUDA GPU, and torch sees none; make test needs none"; exit 1; }
	$(PYTEST) tests/kernels tests/backend $(wildcard tests/e2e/test_gpu*.py) tests/e2e/test_parallel.py \
		tests/e2e/test_speculation.py
	@$(MAKE) --no-print-directory sanitize

sanitize: $(STAMP)  ## tests of every kernel under compute-sanitizer: memory, races, barriers; TOOLS="memcheck"
	@test -n "$(SANITIZER)" || { echo "make: no compute-sanitizer found (it is part of the CUDA \
	toolkit); name it with SANITIZER=..."; exit 1; }
	for tool in $(or $(TOOLS),memcheck racecheck synccheck); do \
		echo "$$tool"; PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 \
			--report-api-errors no $(PYTEST) -m memcheck tests/kernels || exit 1; done

check: $(STAMP)  ## lint, and links between the documents
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(PYTEST) tests/project/test_links.py

eval: $(STAMP)  ## retrieval accuracy of every method at equal budgets, through the server
	$(BIN)/python -m kascade_sglang.evaluation

bench: bench-decode bench-prefill readme-tables  ## measure the kernels on a GPU, and fill the tables in

bench-decode: $(STAMP)  ## decode attention beside FlashAttention-3
	$(BIN)/python -m benchmarks.bench_decode

bench-prefill: $(STAMP)  ## prefill attention beside FlashAttention-3
	$(BIN)/python -m benchmarks.bench_prefill

bench-quality: $(STAMP)  ## answers of pretrained models, dense and sparse side by side, on a GPU
	$(BIN)/python -m benchmarks.bench_quality
	$(BIN)/python -m benchmarks.plot_quality

bench-serving: $(STAMP)  ## real servers beside SGLang's own backends, on a GPU
	$(BIN)/python -m benchmarks.bench_serving

soak: $(STAMP)  ## mixed load on one server, on a GPU, every reply checked; MODEL=folder SECONDS=1200
	$(BIN)/python -m benchmarks.soak $(if $(MODEL),--model $(MODEL)) --seconds $(or $(SECONDS),1200) $(if $(MODEL),--longest 24000 \
		-- --max-total-tokens 100000 --mem-fraction-static 0.5 --schedule-conservativeness 0.05)

wheel: $(STAMP)  ## an sdist and a wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The environment is $(STAMP)'s, but for the package itself: it comes from the wheel, and is asked
# outside the checkout.
test-wheel: export PYTHONPATH :=
test-wheel: WHEEL_VENV = build/wheel-$(SGLANG)
test-wheel: wheel  ## install the wheel in a fresh venv and ask its server: make test-wheel SGLANG=0.5.23
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(BIN)/python -m uv pip install --quiet --python $(WHEEL_VENV)/bin/python \
		--override $(VENV)/overrides dist/kascade_sglang-*.whl sglang==$(SGLANG)
	cp tests/project/ask_wheel.py $(WHEEL_VENV)/
	cd $(WHEEL_VENV) && bin/python -I ask_wheel.py

readme-tables: $(STAMP)  ## fill the documents' tables in from benchmarks/results
	$(BIN)/python -m benchmarks.readme_tables

clean:
	rm -rf .venv .venv-* *.egg-info build dist .pytest_cache .ruff_cache
