.PHONY: style quality test lower-bounds bench clean

style:
	ruff check --fix .
	ruff format .

# The type checker is configured in pyproject.toml.
quality:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest

# The fast tests with exactly the lower bounds of pyproject.toml, in a fresh environment: some GB, half an hour.
lower-bounds:
	python benchmarks/lower_bounds.py

# Every comparison with a peer, onto docs/benchmarks.md. Continues where it was stopped.
bench:
	python benchmarks/run_all.py

# build/ above all: pip leaves it behind, and the next build packages deleted modules from it.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis htmlcov .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
