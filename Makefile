# For a newcomer on a machine with Python 3.11 or newer, pip and make: make demo, make test; make .venv/dmc brings the
# packages of a suite (requirements/dmc.txt).
PYTHON ?= python3
SEED ?= 0
DEMO_LOGDIR ?= ./logdir/quickstart

.PHONY: demo test clean

# Train a small agent on CartPole within ten minutes on two CPU cores, then say how well it does and where to look. A
# second `make demo` goes on from the first; make demo DEMO_LOGDIR=./logdir/again SEED=1 trains another.
demo: .venv/core
	.venv/bin/python dreamer.py --configs quickstart --logdir $(DEMO_LOGDIR) --seed $(SEED)

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q -n 2 --dist loadfile tests

.venv/core: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The packages of one group under requirements/: make .venv/atari.
.venv/%: requirements/%.txt .venv/core
	.venv/bin/pip install --quiet --disable-pip-version-check $(if $(filter procgen,$*),--no-deps) -r $<
	touch $@

# Everything that a test needs: the core and each group under requirements/, procgen without what it asks for.
GROUPS := $(filter-out requirements/procgen.txt, $(wildcard requirements/*.txt))

.venv/test: requirements.txt requirements/procgen.txt $(GROUPS)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt $(addprefix -r ,$(GROUPS))
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/procgen.txt
	touch .venv/core $@

# What can be made anew. Runs are not: logdir stays.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
