"""benchmarks/methods.py stays alive: teachers, two cells, a table, and nothing done twice."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_reduced_run(tmp_path, monkeypatch):
    methods = load("methods")
    arguments = ["--steps", "2", "--images", "60", "--seeds", "0", "--students", "vit", "--out", str(tmp_path)]
    arguments += ["--methods", "untrained", "dtm, vit teacher"]
    monkeypatch.setattr(methods, "TEACHERS", {"vit": "quick"})
    table = methods.main(arguments)
    assert "| vit | untrained |" in table and "| vit | dtm, vit teacher |" in table and "mae" not in table
    scores = json.loads((tmp_path / "vit-dtm-vit-teacher-seed0-2.json").read_text())
    assert 0 < scores["knn"] <= 100 and {"linear_1", "linear_10", "linear_100"} <= set(scores)
    monkeypatch.setattr(methods, "run_cell", lambda *args: pytest.fail("a finished cell ran again"))
    assert methods.main(arguments) == table


def test_draws_are_of_every_class():
    labels = torch.arange(10).repeat_interleave(200)
    chosen = load("methods").draw(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [20] * 10 and len(chosen.unique()) == 200
    assert labels[load("methods").draw(labels, 0.01, seed=0)].bincount().tolist() == [5] * 10
