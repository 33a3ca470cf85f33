# make run      executes the notebooks into build/ (.ipynb and .html)      PROFILE=smoke | quick | full
# make lab      opens them in JupyterLab     ARGS=--port=8889: what Jupyter is told besides
# make colab    writes self-contained notebooks into build/colab: one file to upload, nothing to install
# make badges   where origin is on GitHub: stamps "Open in Colab" into README.md and the notebooks     TAG=v1
# make html     writes the series as linked pages into build/html, from the committed outputs; opens without a network
# make test     unit tests, and every notebook in the smoke profile; needs no network     WITH=torch: on torch too
# make floor    the notebooks and their exercises at the lowest versions that requirements.txt allows, in .venv-floor
# make refresh  re-executes in place what is committed: outputs, figures, results
#
# PYTHON=python3.12  the Python to make .venv with
# PIN=               the newest versions that requirements.txt allows, instead of the tested ones in requirements.lock

PROFILE ?= quick
PIN ?= requirements.lock
VENV = .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c '$(HAS_WHEEL)' 2> /dev/null && echo $$p && exit; done; echo python3)
# TensorFlow has wheels for 64-bit CPython 3.10 to 3.13, and none for Macs with an Intel processor.
HAS_WHEEL = import platform as p, sys, sysconfig as s; sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 13) \
	and sys.maxsize > 2**32 and p.python_implementation() == "CPython" and not s.get_config_var("Py_GIL_DISABLED") \
	and (p.system(), p.machine()) != ("Darwin", "x86_64")))
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(SCRIPTS)
READY := $(VENV)/ready-$(notdir $(PIN))
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(PIN),--constraint $(PIN),--upgrade --upgrade-strategy eager)

.PHONY: run lab colab badges html test floor refresh clean
.DELETE_ON_ERROR:

run: $(READY)
	@CLR_PROFILE=$(PROFILE) $(BIN)/python tools/run_notebooks.py $(NOTEBOOKS)

lab: $(READY)
	@CLR_PROFILE=$(PROFILE) $(BIN)/python -m jupyter lab notebooks $(ARGS)

colab: $(READY)
	@$(BIN)/python tools/make_colab.py $(NOTEBOOKS)

badges: $(READY)
	@$(BIN)/python tools/stamp_badges.py $(if $(TAG),--tag $(TAG))

html: $(READY)-html
	@$(BIN)/python -m sphinx -q -E -a -W --keep-going -c tools/html -d build/doctrees . build/html
	@echo "build/html/index.html"

# Two processes, each with whole files (the cells of a notebook belong together) and one thread for the arithmetic, or
# they would fight for the same cores. `make floor` runs the exercises.
test: SLOW = --ignore=tests/test_exercises.py
test: export TF_NUM_INTRAOP_THREADS = 1
test: export OMP_NUM_THREADS = 1
test: $(READY)-test
	@$(if $(WITH),$(INSTALL) $(WITH))
	@CLR_PROFILE=smoke CLR_SYNTHETIC=always $(BIN)/python -m pytest -n 2 --dist loadfile $(SLOW) $(ARGS)

floor: FLOOR = .venv-floor/$(SCRIPTS)/python
floor:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info > (3, 13))' || { echo "The lowest versions have no wheels for" \
		"$(PYTHON): they need Python 3.10 to 3.12, as in make floor PYTHON=python3.12"; exit 1; }
	@mkdir -p build && sed -n 's/>=\([0-9.]*\).*/==\1.*/p' requirements.txt > build/floor.txt
	@$(MAKE) --no-print-directory .venv-floor/ready-floor.txt VENV=.venv-floor PIN=build/floor.txt
	@$(FLOOR) -m pip install --quiet --disable-pip-version-check --constraint build/floor.txt pytest hypothesis
	@CLR_PROFILE=smoke CLR_SYNTHETIC=always $(FLOOR) -m pytest -o addopts= tests/test_exercises.py \
		'tests/test_experiments.py::test_code_of_a_network_with_branches_and_batchnorm_is_the_same_with_every_version_of_keras'

refresh: $(READY)
	@CLR_PROFILE=$(PROFILE) $(BIN)/python tools/run_notebooks.py --in-place $(NOTEBOOKS)

clean:
	rm -rf $(VENV) .venv-floor build

$(READY): requirements.txt $(PIN)
	@$(PYTHON) -c '$(HAS_WHEEL)' 2> /dev/null || { echo "$(PYTHON) will not do: TensorFlow runs on 64-bit CPython 3.10 to 3.13" \
		"(not on Macs with an Intel processor). Install one of these, then for example: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV), once: about 2 GB on disk, some minutes ..."
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) --requirement requirements.txt
	@rm -f $(VENV)/ready-*  # of other versions, which are gone now
	@touch $@

$(READY)-html: $(READY) tools/html/requirements.txt
	@$(INSTALL) --requirement tools/html/requirements.txt
	@touch $@

$(READY)-test: $(READY)-html tests/requirements.txt
	@$(INSTALL) --requirement tests/requirements.txt
	@touch $@
