# Two commands for a newcomer, on a machine with Python 3.11 or newer, pip and make.
PYTHON ?= python3
SEED ?= 0
DEMO_LOGDIR ?= ./logdir/quickstart

.PHONY: demo test clean

# Train a small agent on CartPole within ten minutes on two CPU cores, then say how well it does and where to look.
demo: .venv/core
	.venv/bin/python dreamer.py --configs quickstart --logdir $(DEMO_LOGDIR) --seed $(SEED)

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -q tests

.venv/core: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements.txt requirements/dmc.txt requirements/plots.txt requirements/wandb.txt requirements/test.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r requirements/dmc.txt -r requirements/plots.txt \
	  -r requirements/wandb.txt -r requirements/test.txt
	touch .venv/core $@

clean:
	rm -rf .venv logdir
