# The four commands of CONTRIBUTING.md; PYTHON=... chooses another interpreter.
PYTHON ?= python

.PHONY: style check test-fast test

style:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test-fast:
	$(PYTHON) -m pytest -q -n 2 -m "not slow"

test:
	$(PYTHON) -m pytest -q -n 2
