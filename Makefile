# Two commands for a fresh machine with Python, pip and make: `make demo` and `make test`.
# Another Python: `make PYTHON=python3.12 demo`. Another place for the environment: `make VENV=/some/folder demo`.
# More processes for the tests, 2 GB each: `make JOBS=8 test`.

PYTHON ?= $(shell command -v python3 || command -v python)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
UNFINISHED := $(VENV).unfinished
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint notebooks docs clean distclean

help:
	@echo "make demo       train, test and explain on synthetic fabric and trays; results in results/demo"
	@echo "make test       run every test"
	@echo "make check      run the quick tests, for daily work"
	@echo "make lint       check style, format and the direction of imports"
	@echo "make notebooks  execute the notebooks and keep their results; NOTEBOOKS=FILE for one of them"
	@echo "make docs       build the user guide in results/site; every link is checked"
	@echo "make install    only create the environment $(VENV) (the others do that first)"
	@echo "make clean      remove results, builds and caches;  make distclean: the environment too"

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py --out results/demo

# Two processes with one thread each take half the time of one with two: most tests are small. Each process gets its
# half in order, so that what a file shares is made once; who is ready first takes over half of what is left.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not cli"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache

# Tests fail where the results of a notebook are not those of its code.
notebooks: $(INSTALLED)
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

# The variable silences the theme's notice about its own future, nothing else.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The stamp is made last, and bears the time of the beginning: an edit of pyproject.toml meanwhile is not lost.
# An installation that was cut short leaves half-written packages that pip takes for whole ones: then begin again;
# what was downloaded is in pip's cache. Where Python has venv but no ensurepip (Debian), the outer pip fills in.
$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "anomalib-ot needs Python 3.10 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 ..."; exit 1; }
	@if [ -e "$(UNFINISHED)" ]; then echo "An earlier installation was cut short: $(VENV) begins again."; rm -rf "$(VENV)"; fi
	@touch "$(UNFINISHED)"
	@echo "Installing into $(VENV). The first time takes some minutes (with PyTorch's CUDA build about 6 GB)."
	"$(PYTHON)" -m venv "$(VENV)" || \
	    { "$(PYTHON)" -m venv --clear --without-pip "$(VENV)" && "$(PYTHON)" -m pip --python "$(BIN)/python" install pip; }
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@mv "$(UNFINISHED)" "$@"

clean:
	rm -rf results build dist openvino_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path "./$(VENV)" -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean
	rm -rf "$(VENV)" "$(UNFINISHED)"
