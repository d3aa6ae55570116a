# Each target sets up what it needs; the first one creates .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# torchvision, which FID and LPIPS need, does not run beside the small CPU build of PyTorch.
BIN_PAPER := .venv-paper/bin
INSTALLED_PAPER := .venv-paper/installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# whose models `make models` trains, and with which script
DATASET ?= digits
MODELS_digits := train.py
MODELS_cifar10_small := train_cifar10.py

# Small networks on a CPU: without these, glibc gives the memory of every layer back to the system
# and takes it again, and threads that wait keep the others from working.
export MALLOC_TRIM_THRESHOLD_ := 1073741824
export MALLOC_MMAP_THRESHOLD_ := 33554432
export OMP_WAIT_POLICY := PASSIVE
# Modules are compiled when first imported (see below), which must be kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help book test test-paper models reproduce lint bench clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

book: $(INSTALLED)  ## run the notebooks and build the book: _build/html/index.html
	$(BIN)/python book/build.py

test: $(INSTALLED)  ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadgroup

test-paper: $(INSTALLED_PAPER)  ## the tests of FID, LPIPS and latent models, in .venv-paper
	$(BIN_PAPER)/python -m pytest tests/paper

models: $(INSTALLED)  ## train the embedded models again; on a GPU DATASET=cifar10_small
	$(BIN)/python data/models/$(or $(MODELS_$(DATASET)),$(error DATASET must be digits or \
	  cifar10_small; $(DATASET) was given))

reproduce: $(INSTALLED)  ## compute every shipped result again and compare
	$(BIN)/python -m amedlib.study.reproduce digits

bench: $(INSTALLED)  ## measure speed and memory
	$(BIN)/python -m benchmarks

lint: $(INSTALLED)  ## check style, and that notebooks carry no outputs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --keep-id --verify $(NOTEBOOKS))

clean:  ## remove what was built; .venv stays
	rm -rf _build .pytest_cache .ruff_cache

# Again only when the requirements changed. --no-compile: modules are compiled when first imported,
# which saves compiling the many that never are.
$(INSTALLED): pyproject.toml constraints.txt
	$(call environment,.venv,book,constraints.txt,about a minute)

$(INSTALLED_PAPER): pyproject.toml constraints-paper.txt
	$(call environment,.venv-paper,paper,constraints-paper.txt,some gigabytes)

# folder, extra, constraints, how long it takes
define environment
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"amedlib needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=...")'
	$(PYTHON) -m venv $(1)
	@echo "Installing into $(1) ($(4))"
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  --constraint $(3) --editable '.[$(2),dev]'
	@touch $@
endef
