.PHONY: style quality test bench clean

style:
	ruff check --fix .
	ruff format .

quality:
	ruff check .
	ruff format --check .

test:
	pytest

# Every comparison with a peer is one script, and each prints its own table; other files are what they share.
bench:
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; python "$$script"; done

# build/ first of all: pip leaves it behind, and the next build packages deleted modules from it.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis htmlcov .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
