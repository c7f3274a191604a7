PYTHON ?= python3
VENV := .venv
VENV_LOWEST := .venv-lowest
# Apart, so that the tests never see what only the benchmarks compare with.
VENV_BENCH := .venv-bench

DEMO_OUTPUT ?= outputs/digits
BENCH_OUTPUT ?= outputs/bench
BENCHMARKS ?= logits_loss linear_loss step_time paper_step cache

# Nothing that is run here needs the Hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Two processes of one thread each: more would fight for the cores.
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2

# -qq leaves pip's errors and drops its warnings.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "hf_dkd needs Python 3.11 or newer; name one, as in: make PYTHON=python3.11" >&2; exit 1; }
@echo "Installing the packages of $(2) into $(1): a few minutes, once."
@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install -qq -c $(2) -e '.[$(3)]'
@touch $@
endef

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-lowest bench lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## Distil a small model on handwritten digits; writes outputs/digits
	$(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
		--num_cpu_threads_per_process 1 recipes/digits.py --output_dir $(DEMO_OUTPUT)

test: $(VENV)/.installed ## Run the fast tests
	$(call pytest,$(VENV))

test-all: $(VENV)/.installed ## Run all tests, the slow ones too
	$(call pytest,$(VENV)) -m ""

test-lowest: $(VENV_LOWEST)/.installed ## Run the fast tests with the oldest supported versions
	$(call pytest,$(VENV_LOWEST))

bench: $(VENV_BENCH)/.installed ## Time the losses and the training step beside others; writes outputs/bench
	set -e; for name in $(BENCHMARKS); do \
		$(VENV_BENCH)/bin/python -m benchmarks.$$name --output_dir $(BENCH_OUTPUT); done

lint: $(VENV)/.installed ## Check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed ## Format the code and apply the safe fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove environments, caches and builds; outputs/ stays
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_BENCH) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,dev)

$(VENV_LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(call install,$(VENV_LOWEST),constraints-lowest.txt,dev)

$(VENV_BENCH)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV_BENCH),constraints.txt,bench)
