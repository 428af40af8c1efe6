# Every target makes the virtual environment when it is missing. Packages are pinned in constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
test check bench: export OMP_NUM_THREADS = 1

.PHONY: run test check docs bench venv clean

run: $(STAMP)            ## decode the shipped prompts with a pool of drafters chosen online
	$(BIN)/nab run --trace out/run.jsonl --plot out/run.png

test: $(STAMP)           ## the test suite, doctests included
	$(BIN)/python -m pytest

check: $(STAMP)          ## what CI runs: style, types, tests; these build the site, strictly, and the wheel
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

docs: $(STAMP)           ## the site, into out/site; any warning fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(STAMP)          ## opt-in measurements
	$(BIN)/python benchmarks/learners.py
	$(BIN)/python benchmarks/overhead.py

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,cli,plots,sim,docs,metrics,dev]'
	touch $@

clean:
	rm -rf $(VENV) out
