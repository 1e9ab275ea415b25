"""benchmarks/token_morphing.py stays alive, and both of its arms compute the same."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
token_morphing = pytest.importorskip("token_morphing")


def test_both_arms_match_the_same_tokens(capsys):
    rows = token_morphing.main(["--batch", "2", "--tokens", "36", "--dim", "16", "--rounds", "1"])
    assert len({(row["what"], row["iterations"]) for row in rows}) == 6
    assert all(row["same"] == 1.0 and row["ratio"][0] > 0 for row in rows)
    assert capsys.readouterr().out.count("|") > 50
