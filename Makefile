# `make demo` and `make test` on a machine with Python 3.11, git and make need nothing else.
PYTHON ?= python3.11
VENV := .venv

.PHONY: demo test test-slow test-processes test-tpu soak lint clean

$(VENV)/installed: requirements.txt requirements-assets.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps --require-hashes -r requirements-assets.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(VENV)/bin/pip install --quiet -r requirements-test.txt
	touch $@

# The TPU's compiler in an environment of its own, on top of the other's packages: where it is installed, jax looks for TPUs.
PACKAGES := -c 'import site; print(site.getsitepackages()[0])'
$(VENV)/tpu/installed: $(VENV)/installed-test requirements-tpu.txt
	$(PYTHON) -m venv $(VENV)/tpu
	$(VENV)/bin/python $(PACKAGES) > $$($(VENV)/tpu/bin/python $(PACKAGES))/below.pth
	$(VENV)/tpu/bin/pip install --quiet -r requirements-tpu.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python launch/train.py --config=configs/blip2_lang_only.py --workdir=runs/demo

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# XLA's older emitters compile in half the time; what is asserted about compiled programs is so about those that users get.
QUICK_XLA := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1

test: lint
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed-test
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist worksteal -m slow
	$(VENV)/bin/python -m pytest -n auto -m compiled $(shell grep -l mark.compiled tests/test_*.py)

# Tests that start processes of their own: several for one run, a sweep's points, the pretraining script.
test-processes: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m processes $(shell grep -l mark.processes tests/test_*.py)

# Programs compiled for a TPU slice that is not there.
test-tpu: $(VENV)/tpu/installed
	$(VENV)/tpu/bin/python -m pytest -m tpu tests/test_compile.py

# A main job struck by SIGTERM and SIGKILL a hundred times, at random moments; every rerun must end bit-identical.
soak: $(VENV)/installed-test
	SOAK_KILLS=100 $(VENV)/bin/python -m pytest -m processes -s tests/test_soak.py

clean:
	rm -rf $(VENV) runs
