# make demo   sets everything up, trains the demo model, tunes a state, merges it, and ends with the path of a report
# make test   sets everything up and runs all tests
# make lab    opens JupyterLab on the notebooks
# make lint   ruff on Python and notebooks; pyright against the number of findings that are left
# make bench  measures models, kernels, loading and merging beside others (about 12 GB of disk, most of an hour)
# make clean  removes the environment, caches and the demo model; reports stay

# Threads of torch that wait must not take a core from other processes; rwkv_lab/threads.py.
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
MERGEKIT := .venv/mergekit
RUN := $(BIN)/python -m papermill --cwd . --no-progress-bar --log-output --log-level WARNING

.PHONY: demo test lab lint bench clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rwkv_lab needs Python 3.11 or newer; say which: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $(READY)

demo: $(READY)
	@mkdir -p demo reports/demo
	@echo "1/3 pretraining the demo model on the help texts of Python"
	@$(RUN) notebooks/train.ipynb reports/demo/pretrain.ipynb -r report reports/demo/pretrain \
		-r kind pretrain -r base "" -r data english -r out demo/demo-base.pth -p overwrite True
	@echo "2/3 tuning its state on the source code of the standard library"
	@$(RUN) notebooks/train.ipynb reports/demo/state.ipynb -r report reports/demo/state \
		-r kind state -r base demo/demo-base.pth -r data python -r out demo/demo-state.pth -p overwrite True
	@echo "3/3 merging the state into the model"
	@$(RUN) notebooks/merge.ipynb reports/demo/merge.ipynb -r report reports/demo/merge
	@echo "The report: $(CURDIR)/reports/demo/merge/report.html"

# Without what it asks for: large packages that its methods do not import.
$(MERGEKIT): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps mergekit
	@touch $(MERGEKIT)

test: $(READY) $(MERGEKIT)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lab: $(READY)
	$(BIN)/jupyter lab notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/type_findings.py

bench: $(READY)
	$(BIN)/python -m rwkv_lab.bench all
	$(BIN)/python -m rwkv_lab.bench merge

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
