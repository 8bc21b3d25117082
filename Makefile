.PHONY: setup run test check bench

python := .venv/bin/python
stamp := .venv/.ready

setup: $(stamp)

# Made once; again when the dependencies change. PYTHON=python3.12 make setup picks another interpreter.
$(stamp): pyproject.toml constraints.txt scripts/setup.sh
	bash scripts/setup.sh
	touch $(stamp)

run: $(stamp)  ## the main job: five tasks of real digits in sequence; writes runs/split_digits
	.venv/bin/modmoe run configs/continual/split_digits.yaml --out runs/split_digits

check: $(stamp)  ## style, types, import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	$(python) -m pytest -q tests/test_imports.py

test: check
	$(python) -m pytest -n auto --dist loadfile  # workers as there are cores; a file stays with one, with its fixtures

bench: $(stamp)
	$(python) benchmarks/kernels.py --json benchmarks/results/kernels.json
	$(python) benchmarks/plot_kernels.py
