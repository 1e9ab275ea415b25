.PHONY: style quality test notebooks lower-bounds bench docs gallery clean

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

# The notebooks with their pictures, in place.
notebooks:
	PYTHONWARNINGS=ignore jupyter execute --inplace notebooks/*.ipynb

# The fast tests with exactly the lower bounds of pyproject.toml, in a fresh environment: some GB, half an hour.
lower-bounds:
	python benchmarks/lower_bounds.py

# Every comparison with a peer, onto docs/benchmarks.md. Continues where it was stopped.
bench:
	python benchmarks/run_all.py

# The documentation site, into build/docs/: needs the extra `docs`, and no network to build or to read. Any warning or
# broken link is an error.
docs:
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

# The pictures of docs/gallery/: needs the extras `teacher` and `test`, and trains for some minutes.
gallery:
	python docs/site/gallery.py

# build/ above all: pip leaves it behind, and the next build packages deleted modules from it.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis htmlcov .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
