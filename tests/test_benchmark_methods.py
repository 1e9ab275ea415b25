"""benchmarks/methods.py stays alive: teachers, cells, tables, and nothing done twice."""

import argparse
import json

import methods
import methods_report
import pytest
import torch
from helpers import target_options, tiny_config
from stored_teacher import store_maps

from hf_mim import MIMForPreTraining
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


def test_stored_maps_are_blended_towards_their_mean(tmp_path):
    pixels = torch.randn(3, 3, 32, 32)
    want = pretrained_with_teacher(tmp_path).target.teacher.maps(pixels, (8, 8))[0]
    for blend in (0.5, -0.5):
        model = pretrained_with_teacher(tmp_path)
        store_maps(model, tmp_path, blend)
        blended = model.target.teacher.maps(pixels, (8, 8))[0]
        mean = want.mean((2, 3), keepdim=True)
        assert torch.allclose(blended, want * (1 - blend) + mean * blend, atol=4e-3)  # float16 of values below 8


def pretrained_with_teacher(folder) -> MIMForPreTraining:
    return MIMForPreTraining(
        tiny_config(image_size=32, target="teacher_feature", target_config=target_options("teacher_feature", folder))
    )
