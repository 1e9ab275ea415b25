"""benchmarks/methods.py stays alive: teachers, cells, tables, and nothing done twice."""

import argparse
import json

import methods
import methods_report
import numpy as np
import pytest
import torch

from hf_mim.modeling.targets import TARGETS
from hf_mim.training import recipe as recipes


@pytest.mark.slow
def test_a_reduced_run(tmp_path, monkeypatch):
    out, page = tmp_path / "out", tmp_path / "results.md"
    arguments = ["--steps", "2", "--images", "60", "--seeds", "0", "--students", "vit", "--out", str(out)]
    arguments += ["--methods", "untrained", "dtm, vit teacher", "a2mim, no final norm"]
    monkeypatch.setattr(methods, "TEACHERS", {"vit": ("quick", 2)})
    shown = methods.main(arguments)
    assert "| untrained |" in shown and "| dtm, vit teacher |" in shown and "| mae |" not in shown
    scores = json.loads((out / "vit-dtm-vit-teacher-seed0-2.json").read_text())
    assert 0 < scores["knn"] <= 100 and {"linear_1", "linear_10", "linear_100", "target_std"} <= set(scores)
    assert (out / "runs" / "vit-dtm-vit-teacher-0-2" / "model.safetensors").is_file()  # for other comparisons
    assert json.loads((out / "vit-a2mim-no-final-norm-seed0-2.json").read_text())["hidden_l1"] > 0
    page.write_text("Words of mine.\n\n<!-- methods -->\nold\n<!-- end of methods -->\n\nMore words.\n")
    monkeypatch.setattr(methods, "run_cell", lambda *args: pytest.fail("a finished cell ran again"))
    assert methods.main(arguments) == shown
    assert methods.main([*arguments, "--table", "--page", str(page)]) == shown
    text = page.read_text()
    assert shown in text and "Words of mine." in text and "More words." in text and "old" not in text
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_every_row_is_a_recipe_whose_settings_fit():
    """Names of targets, options and recipes; what needs a teacher is built in the reduced run."""
    places = {"TEACHERS": "teachers", "RUNS": "runs", "STEPS": 5}
    for table in (methods.STUDENTS, methods.ABLATIONS):
        for rows in table.values():
            for recipe, overrides in rows.values():
                settings = [o for o in overrides or [] if o not in (methods.NO_TOKEN, *methods.RAW)]
                model = recipes.resolve(recipe, [methods.replaced(o, places) for o in settings])["model"]
                assert model["target"] in TARGETS
                if model["target"] in ("pixel", "hog", "frequency"):
                    methods.MIMConfig(**model)


def test_the_teacher_that_is_a_student_s_run_comes_first():
    args = argparse.Namespace(seeds=[1, 0], students=["vit"], methods=None)
    cells = methods.cells(args)
    assert cells[0] == ("vit", "mae", 0) and len(cells) == len(set(cells))
    assert len(cells) == 2 * len(methods.STUDENTS["vit"]) + len(methods.ABLATIONS["vit"])
    args.methods = ["mae"]
    assert methods.cells(args) == [("vit", "mae", 1), ("vit", "mae", 0)]


def test_means_and_deviations_are_over_the_seeds_that_are_there():
    cells = [{"knn": 70.0, "target": {"raw": 0.5}}, {"knn": 74.0}, {}]
    assert methods_report.of(cells, "knn") == f"72.0 ± {np.std([70, 74], ddof=1):.1f}"
    assert methods_report.of(cells, "target", "raw", digits=2) == "0.50" and methods_report.of(cells, "loss") == ""


def test_draws_are_of_every_class():
    labels = torch.arange(10).repeat_interleave(200)
    chosen = methods.draw(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [20] * 10 and len(chosen.unique()) == 200
    assert labels[methods.draw(labels, 0.01, seed=0)].bincount().tolist() == [5] * 10
