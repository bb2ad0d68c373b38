# The commands of CONTRIBUTING.md; PYTHON=... chooses another interpreter.
PYTHON ?= python

.PHONY: help style check test-fast test breadth fuzz

help:
	@echo "make style      format and mend what ruff can mend (it changes files)"
	@echo "make check      ruff, format, mypy: what must be clean"
	@echo "make test-fast  the tests without the slow ones"
	@echo "make test       all tests"
	@echo "make breadth    every model type of transformers through files: about five minutes"
	@echo "make fuzz       damaged files, senseless arguments: about a quarter of an hour"

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

breadth:
	SVDQ_BREADTH=files $(PYTHON) -m pytest -q -n 2 tests/scenarios/test_breadth.py

fuzz:
	SVDQ_FUZZ_SECONDS=600 SVDQ_EXAMPLES=140 $(PYTHON) -m pytest -q -s tests/scenarios/test_fuzz.py \
		tests/kernels/test_fuzz_ops.py tests/scenarios/test_every_tensor.py
