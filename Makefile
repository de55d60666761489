# make demo   trains the demo model, tunes a state, merges it; ends with what changed and the path of a report
# make test   runs all tests
# make consumers  adds llama.cpp, built from source (some minutes), for the tests that compare with it
# make lab    opens JupyterLab on notebooks/index.ipynb; it saves a notebook only when you say so
# make lint   ruff on Python and notebooks; pyright against the number of findings that are left
# make bench  measures models, kernels, loading, merging and conversion beside others (15 GB of disk, an hour); llama.cpp
#             is among them after make consumers
# make browser  every notebook in JupyterLab, in Chromium (ten to fifteen minutes); screenshots in reports/ci
# make sanitize  tests compiled code under AddressSanitizer and UBSan, with 2,000 random changes of models (an hour)
# make compat  exports tiny models with the oldest and the newest packages that pyproject.toml allows (12 GB of disk)
# make torture  10,000 damaged checkpoints, 200 kills and full disks, 100,000 tokens, 100 notebooks in a row (two hours)
# make clean  removes .venv, the demo model, build folders, compiled kernels and traced graphs; reports stay
#
# Each sets up in .venv what it needs.

# Threads of torch that wait must not take a core from other processes; rwkv_lab/threads.py.
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
TESTS_READY := .venv/ready-tests
MERGEKIT := .venv/mergekit
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN := $(BIN)/python -m rwkv_lab.workbench.batch --cwd .
DEMO := reports/demo

.PHONY: demo test consumers lab lint bench browser sanitize torture compat clean

# What notebooks need; nothing of the tests.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rwkv_lab needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up .venv: torch, JupyterLab and what they need (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e '.[workbench,train]'
	@touch $@

$(TESTS_READY): $(READY)
	@echo "adding what the tests need to .venv: linters, other implementations to compare with (once)"
	@$(PIP) -e '.[all]'
	@touch $@

demo: $(READY)
	@mkdir -p demo $(DEMO)
	@echo "1/3 pretraining the demo model on the help texts of Python"
	@$(RUN) notebooks/train.ipynb $(DEMO)/pretrain.ipynb -r report $(DEMO)/pretrain \
		-r kind pretrain -r base "" -r data english -r out demo/demo-base.pth -p overwrite True
	@echo "2/3 tuning its state on the source code of the standard library"
	@$(RUN) notebooks/train.ipynb $(DEMO)/state.ipynb -r report $(DEMO)/state \
		-r kind state -r base demo/demo-base.pth -r data python -r out demo/demo-state.pth -p overwrite True
	@echo "3/3 merging the state into the model"
	@$(RUN) notebooks/merge.ipynb $(DEMO)/merge.ipynb -r report $(DEMO)/merge
	@$(BIN)/python -c 'import json; print(json.load(open("$(DEMO)/merge/result.json"))["metrics"]["summary"])'
	@echo "The report: $(CURDIR)/$(DEMO)/merge/report.html"

# Without what it asks for: large packages that its methods do not import.
$(MERGEKIT): $(TESTS_READY)
	@$(PIP) --no-deps mergekit
	@touch $(MERGEKIT)

# One process more than cores: some wait for the disk, a browser, a time limit.
test: $(TESTS_READY) $(MERGEKIT)
	$(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(min(os.cpu_count() + 1, 4))') \
		--dist loadfile --no-loadscope-reorder

consumers: $(TESTS_READY)
	@echo "building llama.cpp into .venv (once)"
	@$(PIP) llama-cpp-python

lab: $(READY)
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '{"@jupyterlab/docmanager-extension:plugin": {"autosave": false}}' > .venv/share/jupyter/lab/settings/overrides.json
	$(BIN)/jupyter lab --KernelManager.transport=ipc --ServerApp.root_dir=. notebooks/index.ipynb

lint: $(TESTS_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/type_findings.py

bench: $(TESTS_READY)
	$(BIN)/python -m rwkv_lab.bench all --peers rwkv \
		$$($(BIN)/python -c 'import importlib.util as u; print("llama.cpp" * bool(u.find_spec("llama_cpp")))')
	$(BIN)/python -m rwkv_lab.bench merge
	$(BIN)/python -m rwkv_lab.bench convert

browser: $(TESTS_READY)
	$(BIN)/python -m pytest tests/browser/test_in_short.py tests/browser/tour.py

sanitize: $(TESTS_READY)
	RWKV_LAB_LOOPS=1000 $(BIN)/python tests/sanitize.py

compat: $(READY)
	$(BIN)/python tests/compat.py

torture: $(TESTS_READY)
	cd tests && PYTHONPATH=. ../$(BIN)/python -m torture

clean:
	rm -rf .venv .compat build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	folder="$${RWKV_LAB_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/rwkv_lab}"; rm -rf "$$folder/kernels" "$$folder/graphs"
