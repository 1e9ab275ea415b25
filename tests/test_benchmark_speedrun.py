"""benchmarks/speedrun.py stays alive: its entries are runs that can be set up, and a finished cell is not run again."""

import numpy as np
import pytest
import speedrun

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.training import recipe as recipes
from hf_mim.training.trainer.arguments import MIMTrainingArguments


def test_every_entry_is_a_run_of_a_recipe(tmp_path):
    for recipe, *words in speedrun.ENTRIES.values():
        resolved = recipes.resolve(recipe, words, "pretrain")
        MIMForPreTraining(MIMConfig(**resolved["model"]))
        MIMTrainingArguments(output_dir=str(tmp_path), **resolved["training"])  # which checks them
        assert not recipes.without_effect(resolved)


def test_the_quickest_entry_that_reached_the_goal_comes_first():
    pixels = {"raw_pixels": {"knn": 81.0, "linear": 84.0}, "machine": "CPU.", "images": 64}
    cells = {
        "far": [{"knn": 50.0, "linear": 83.9, "seconds": 1.0, **pixels}],
        "slow": [{"knn": 80.0, "linear": 84.5, "seconds": 9.0, **pixels}],
        "quick": [{"knn": 80.0, "linear": linear, "seconds": 5.0, **pixels} for linear in (83.0, 85.0)],
    }
    rows = [row.split("|")[1].strip() for row in speedrun.report(cells, {}).splitlines() if row.startswith("| ")]
    assert rows[2:] == ["quick", "slow", "far", "raw pixels"]


@pytest.mark.slow
def test_a_reduced_run(tmp_path, monkeypatch):
    words = ["--entries", "quick", "--seeds", "0", "--steps", "2", "--out", str(tmp_path / "out")]
    shown = speedrun.main(words)
    assert "| quick | 128 |" in shown and "| raw pixels |" in shown
    monkeypatch.setattr(speedrun, "run_cell", lambda *args: pytest.fail("a finished cell ran again"))
    page = tmp_path / "speedrun.md"
    page.write_text("<!-- speedrun -->\n<!-- end of speedrun -->\n")
    speedrun.main([*words, "--table", "--page", str(page)])
    assert shown in page.read_text()
    monkeypatch.setattr(speedrun, "PACE_ROUNDS", 2)
    rows = speedrun.main([*words, "--pace"])
    pace = speedrun.read_pace(tmp_path / "out")
    assert pace["quick"] > 0 and pace["quick, 600 steps"] == pace["quick"] and "mae_small" not in pace
    assert f"| quick | 128 | {pace['quick']:.0f} | {2 * pace['quick'] / 1000:.0f} |" in rows


def test_a_part_has_the_images_at_its_indices():
    part = speedrun.Part(np.arange(10) * 2, np.array([7, 1, 4]))
    assert len(part) == 3 and [part[i] for i in range(3)] == [14, 2, 8] and part.ndim == 1
