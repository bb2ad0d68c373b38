# The commands of CONTRIBUTING.md; PYTHON=... chooses another interpreter.
PYTHON ?= python

.PHONY: style check test-fast test fuzz

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

fuzz:
	SVDQ_FUZZ_SECONDS=600 SVDQ_EXAMPLES=140 $(PYTHON) -m pytest -q -s tests/scenarios/test_fuzz.py \
		tests/kernels/test_fuzz_ops.py tests/scenarios/test_every_tensor.py
