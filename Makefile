# Everything goes through .venv, built on first use from the tested pins in constraints.txt.
# TORCH_INDEX chooses the build of torch, for example
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cpu      (no GPU, small download)
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cu130    (a given CUDA)
# TORCH pins it for test-latest alone: make test-latest TORCH=torch==2.13.0
PYTHON ?= python3
TORCH_INDEX ?=
TORCH ?= torch
OUT ?= runs
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: run test test-all test-latest real record notebooks readme docs-check .venv help clean

help:
	@echo "make run        the organism through the whole pipeline: table, HTML report, executed notebooks"
	@echo "make test       everything but slow and GPU tests;  make test-all adds those"
	@echo "make test-latest  the same tests in .venv-latest, with the newest versions that settings.ini allows"
	@echo "make real       real tokenizers for the tests that want them (npm, seconds)"
	@echo "make record     run configs/organism.yaml, attacks.yaml, frontier.yaml and published*.yaml in full and rewrite nbs/recorded/"
	@echo "make notebooks  re-execute nbs/ in place;  make .venv  only the environment"

.venv: .venv/.installed

# pip compiles modules one after the other; all processors do it together (some packages hold templates that are no Python)
PIP := $(BIN)/pip install -q --disable-pip-version-check --no-compile
COMPILE := $(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null || true

.venv/.torch: constraints.txt settings.ini setup.py
	@echo "building .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PIP) torch -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

.venv/.installed: .venv/.torch
	$(PIP) -e ".[dev]" -c constraints.txt
	@$(COMPILE)
	@touch $@

# with all that .installed stands for
.venv/.peers: .venv/.torch
	$(PIP) -e ".[dev,peers]" -c constraints.txt
	@$(COMPILE)
	@touch .venv/.installed $@

run: .venv/.installed
	$(BIN)/mechunlearn run --model organism --task sports-athlete-editing --forget-size 64 --seeds 0 \
	  --localizations flu,causal-tracing-mlps,random-mlps,late,all-mlps,nonlocalized --draws 1 --out $(OUT)

# pages are checked beside the notebooks
test: .venv/.peers
	$(BIN)/python tests/docs_check.py exports
	@export OMP_NUM_THREADS=1; $(BIN)/python tests/docs_check.py pages & docs=$$!; \
	$(BIN)/nbdev_test --n_workers 2 --timing; notebooks=$$?; wait $$docs && exit $$notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2 --dist loadfile --no-loadscope-reorder --durations 20 -m "not slow and not gpu"

test-all: .venv/.peers docs-check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --flags slow
	$(BIN)/python -m pytest tests -q

# built again each time: what is newest changes
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install -q --disable-pip-version-check "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.venv-latest/bin/pip install -q --disable-pip-version-check "$(TORCH)" -e ".[dev,peers,capability]"
	.venv-latest/bin/pip freeze --exclude-editable > .venv-latest/versions.txt
	OMP_NUM_THREADS=1 .venv-latest/bin/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest tests -q -n 2 --dist loadfile -m "not slow and not gpu"

real: .venv/.installed
	$(BIN)/python tests/real.py .real

docs-check: .venv/.installed
	$(BIN)/python tests/docs_check.py

record: .venv/.installed
	for grid in organism attacks frontier; do $(BIN)/mechunlearn batch configs/$$grid.yaml --workers 2 --out $(OUT)/recorded/$$grid || exit 1; done
	$(BIN)/mechunlearn report $(OUT)/recorded --record nbs/recorded
	for grid in published published-attacks; do $(BIN)/mechunlearn batch configs/$$grid.yaml --workers 2 --out $(OUT)/$$grid && $(BIN)/python tests/add_recorded.py $(OUT)/$$grid/organism/* || exit 1; done

notebooks: .venv/.installed
	$(BIN)/python tests/execute_notebooks.py
	$(BIN)/nbdev_clean
	$(BIN)/python tests/make_readme.py

readme: .venv/.installed
	$(BIN)/python tests/make_readme.py

clean:
	rm -rf _proc _docs build dist *.egg-info
