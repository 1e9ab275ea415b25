"""benchmarks/methods.py stays alive: teachers, cells, tables, and nothing done twice."""

import argparse
import json

import methods
import methods_report
import numpy as np
import pytest
import torch
from stored_teacher import StoredMaps

from hf_mim.modeling.targets import TARGETS
from hf_mim.training import recipe as recipes


@pytest.mark.slow
def test_a_reduced_run(tmp_path, monkeypatch):
    out, page = tmp_path / "out", tmp_path / "results.md"
    arguments = ["--steps", "2", "--images", "60", "--seeds", "0", "--students", "vit", "--out", str(out)]
    arguments += ["--methods", "untrained", "a2mim, vit", "a2mim, vit, no final norm"]
    shown = methods.main(arguments)
    assert "| untrained |" in shown and "a2mim, vit less a2mim, vit, no final norm" in shown and "| mae |" not in shown
    scores = json.loads((out / "vit-a2mim-vit-seed0-2-60.json").read_text())
    assert 0 < scores["knn"] <= 100 and {"linear_1", "linear_10", "linear_100", "hidden_l1"} <= set(scores)
    assert (out / "runs" / "vit-a2mim-vit-0-2" / "model.safetensors").is_file()  # for other comparisons
    page.write_text("Words of mine.\n\n<!-- methods -->\nold\n<!-- end of methods -->\n\nMore words.\n")
    monkeypatch.setattr(methods, "run_cell", lambda *args: pytest.fail("a finished cell ran again"))
    assert methods.main(arguments) == shown
    assert methods.main([*arguments, "--table", "--page", str(page)]) == shown
    text = page.read_text()
    assert shown in text and "Words of mine." in text and "More words." in text and "old" not in text
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_every_row_is_a_recipe_whose_settings_fit():
    """Names of targets, options and recipes; what needs a teacher is built in a run only."""
    for table in (methods.STUDENTS, methods.LATER):
        for rows in table.values():
            for method in rows.values():
                model = recipes.resolve(method.recipe, list(method.overrides))["model"]
                assert model["target"] in TARGETS
                if method.blend is None:
                    methods.MIMForPreTraining(methods.MIMConfig(**model))
    for student, claims in methods_report.CLAIMS.items():
        assert {name for claim in claims for name in claim} <= {*methods.STUDENTS[student], *methods.LATER[student]}


def test_whole_tables_of_a_seed_come_first():
    args = argparse.Namespace(seeds=[1, 0], students=["vit"], methods=None)
    cells = methods.cells(args)
    first = len(methods.STUDENTS["vit"])
    assert {seed for *_, seed in cells[:first]} == {1} and len(cells) == len(set(cells))
    assert len(cells) == 2 * first + 2 * len(methods.LATER["vit"])
    args.methods = ["mae"]
    assert methods.cells(args) == [("vit", "mae", 1), ("vit", "mae", 0)]


def test_maps_are_computed_once_per_image_and_blended_towards_their_mean(tmp_path):
    calls = []

    def maps(pixels, grid):
        calls.append(len(pixels))
        return [pixels.flatten(2)[:, :, :4].reshape(len(pixels), -1, *grid) * 2]

    images = torch.randn(6, 3, 4, 4)
    stored = StoredMaps(maps, tmp_path, capacity=10)
    want = maps(images, (2, 2))[0]
    calls.clear()
    assert torch.allclose(stored(images[:4], (2, 2))[0], want[:4], atol=4e-3)  # float16 of values below 8
    assert torch.allclose(stored(images[[5, 1, 4, 3]], (2, 2))[0], want[[5, 1, 4, 3]], atol=4e-3)
    assert calls == [4, 2]
    stored.save()
    half = StoredMaps(lambda *call: pytest.fail("computed again"), tmp_path, blend=0.5, capacity=10)
    half.compute = maps  # only for the shape
    blended = half(images, (2, 2))[0]
    assert torch.allclose(blended, (want + want.mean((2, 3), keepdim=True)) / 2, atol=4e-3)
    assert sum(calls) == 7


def test_differences_are_those_of_the_same_seed():
    better = [{"seed": seed, "knn": 70.0 + 10 * seed} for seed in range(3)]
    other = [{"seed": seed, "knn": 69.0 + 10 * seed} for seed in (1, 2)]  # the first is not there yet
    table = methods_report.claim_table({"resnet": {"a2mim": better, "untrained": other}})
    assert "| a2mim less untrained | +1.0 ± 0.0 (++) |" in table


def test_a_difference_has_its_sign_in_every_seed():
    assert (
        methods_report.difference([(3.0, 1.0), (1.0, 2.0), (2.0, 2.0)])
        == f"+0.3 ± {np.std([2, -1, 0], ddof=1):.1f} (+-0)"
    )


def test_means_and_deviations_are_over_the_seeds_that_are_there():
    cells = [{"knn": 70.0, "target": {"raw": 0.5}}, {"knn": 74.0}, {}]
    assert methods_report.of(cells, "knn") == f"72.0 ± {np.std([70, 74], ddof=1):.1f}"
    assert methods_report.of(cells, "target", "raw", digits=2) == "0.50" and methods_report.of(cells, "loss") == ""


def test_draws_are_of_every_class():
    labels = torch.arange(10).repeat_interleave(200)
    chosen = methods.draw(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [20] * 10 and len(chosen.unique()) == 200
    assert labels[methods.draw(labels, 0.01, seed=0)].bincount().tolist() == [5] * 10
