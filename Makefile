# The commands of the README. Each makes .venv and installs what it needs, when that is missing.
#
#   make reproduce                     the six notebooks, on the default profile, into runs/; are its numbers the committed ones?
#   make reproduce RUN_ARGS="--only 04 --force"
#   make test      PYTEST_ARGS="-k steer"
#   make refresh                       the same, then takes notebooks, figures and quoted numbers over into the repository
#   make docs                          the site: lessons, reference, formats
#   make ablations                     the grid of SAEs of notebook 02, trained and measured anew
#
# PYTHON: which Python makes .venv. PIP_ARGS: more words for pip, e.g. "--index-url ...".

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PROFILE := $(or $(PATCHSAE_PROFILE),openmoji)
NOTEBOOKS := $(wildcard notebooks/0*.ipynb)
STRIP := -m nbstripout --keep-output --keep-count --keep-id --extra-keys "metadata.widgets cell.metadata.execution cell.metadata.papermill metadata.papermill metadata.language_info.version"

# The kernel "python3" is the one of .venv, whatever else is registered on the machine.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH
export PIP_ARGS
# Threads that spin at barriers cost five to ten times beside any other busy program.
export OMP_WAIT_POLICY ?= passive

.PHONY: help reproduce refresh test ablations lab explore docs lint notebooks-clean notebooks-check clean-runs venv

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

reproduce:
	@$(PYTHON) tools/install.py
	@$(PY) -m patchsae_utils.reproduce $(RUN_ARGS)

refresh:
	@$(PYTHON) tools/install.py
	@$(PY) -m patchsae_utils.reproduce --refresh $(RUN_ARGS)

test:
	@$(PYTHON) tools/install.py test explore docs
	env -u PATCHSAE_PROFILE -u PATCHSAE_SET $(PY) -m pytest tests notebooks -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=1800 $(PYTEST_ARGS)

# An hour or two on two cores; goes on where it was stopped.
ablations:
	@$(PYTHON) tools/install.py
	$(PY) -m experiments.ablations $(RUN_ARGS)

lab:
	@$(PYTHON) tools/install.py explore
	$(PY) -m jupyterlab --ServerApp.root_dir=notebooks

explore:
	@$(PYTHON) tools/install.py explore
	$(PY) -m voila notebooks/06_latent_explorer.ipynb

# The site, in build/site; a warning is an error.
docs:
	@$(PYTHON) tools/install.py docs
	$(PY) -m mkdocs build --strict

lint:
	@$(PYTHON) tools/install.py test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check patchsae_utils tests tools
	$(PY) -m mypy

notebooks-clean:
	@$(PYTHON) tools/install.py test
	$(PY) $(STRIP) $(NOTEBOOKS)

notebooks-check:
	@$(PYTHON) tools/install.py test
	$(PY) $(STRIP) --verify $(NOTEBOOKS)

clean-runs:
	rm -rf "runs/$(PROFILE)"

venv:
	@$(PYTHON) tools/install.py
