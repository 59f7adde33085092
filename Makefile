# `make demo` and `make test` on a machine with Python 3.11, git and make need nothing else.
PYTHON ?= python3.11
VENV := .venv

.PHONY: demo test test-slow test-processes test-compilers soak lint clean

$(VENV)/installed: requirements.txt requirements-assets.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps --require-hashes -r requirements-assets.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(VENV)/bin/pip install --quiet -r requirements-test.txt
	touch $@

# The compilers for TPUs and GPUs in an environment of their own, on top of the other's packages: where they are installed,
# jax looks for the chips.
PACKAGES := -c 'import site; print(site.getsitepackages()[0])'
$(VENV)/compilers/installed: $(VENV)/installed-test requirements-tpu.txt requirements-gpu.txt
	$(PYTHON) -m venv $(VENV)/compilers
	$(VENV)/bin/python $(PACKAGES) > $$($(VENV)/compilers/bin/python $(PACKAGES))/below.pth
	$(VENV)/compilers/bin/pip install --quiet -r requirements-tpu.txt -r requirements-gpu.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python launch/train.py --config=configs/blip2_lang_only.py --workdir=runs/demo

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python .ci/measure_code.py --check

# XLA's older emitters compile in half the time; what is asserted about compiled programs is so about those that users get.
QUICK_XLA := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1

test: lint
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed-test
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist worksteal -m slow
	$(VENV)/bin/python -m pytest -n auto -m compiled $(shell grep -rl mark.compiled tests)

# Tests that start processes of their own: several for one run, a sweep's points, the pretraining script.
test-processes: $(VENV)/installed-test
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist loadfile -m processes $(shell grep -rl mark.processes tests)

# Programs compiled for TPUs and GPUs that are not there.
test-compilers: $(VENV)/compilers/installed
	$(VENV)/compilers/bin/python -m pytest -n auto -m compilers tests/launch/test_compile.py

# A main job struck by SIGTERM and SIGKILL a hundred times, at random moments; every rerun must end bit-identical.
soak: $(VENV)/installed-test
	SOAK_KILLS=100 $(VENV)/bin/python -m pytest -m processes -s tests/jobs/test_soak.py

clean:
	rm -rf $(VENV) runs
