"""benchmarks/adapting.py stays alive: cells, tables, and nothing done twice."""

import adapting
import pytest


ARGUMENTS = ["--images", "40", "--seeds", "0", "1", "--steps", "1", "--source-steps", "1", "--evaluated", "60"]


@pytest.mark.slow
def test_a_reduced_run(tmp_path, monkeypatch):
    ways = ["LoRA", "near the features, 1"]
    monkeypatch.setattr(adapting, "WAYS", {way: adapting.WAYS[way] for way in ways})
    monkeypatch.setattr(adapting, "LATER", ())
    monkeypatch.setattr(adapting, "references", {})
    page = tmp_path / "adapting.md"
    page.write_text("Words of mine.\n\n<!-- adapting -->\nstale words\n<!-- end of adapting -->\n")
    arguments = [*ARGUMENTS, "--out", str(tmp_path / "out"), "--page", str(page)]
    shown = adapting.main(arguments)
    assert "### 40 new images, 1 steps of 64" in shown and all(f"| {way} |" in shown for way in ways)
    assert len(list((tmp_path / "out").glob("*.json"))) == 2 * (4 + len(ways))
    monkeypatch.setattr(adapting, "run_cell", lambda *args: pytest.fail("a finished cell ran again"))
    assert adapting.main([*arguments, "--table"]) == shown
    assert shown in page.read_text() and "Words of mine." in page.read_text() and "stale words" not in page.read_text()


def test_the_halves_are_disjoint():
    halves = adapting.open_halves(adapting.model_config())
    classes = {half: set(parts["test"].labels.tolist()) for half, parts in halves.items()}
    assert {len(numbers) for numbers in classes.values()} == {5} and not classes["old"] & classes["new"]
    few = adapting.some_of(halves["new"]["train"], 50, 0)
    assert len(few) == 50 and few.__getitems__([0, 7])[0].images.shape == (2, 1, 28, 28)


def test_changes_are_those_of_the_same_seed():
    scores = [{half: {"knn": value, "linear": 2 * value} for half in adapting.HALVES} for value in (50, 60, 53, 67)]
    for cell, cka in zip(scores, (1.0, 1.0, 0.5, 0.7)):
        cell["cka"] = {"old": cka, "new": cka}
    start, plain = adapting.START, "plain"
    cells = {(start, 9, 0): scores[0], (start, 9, 1): scores[1], (plain, 9, 0): scores[2], (plain, 9, 1): scores[3]}
    table = adapting.change_table(cells, 9, [0, 1])
    # +3 and +7: mean 5, deviation sqrt(8).
    assert "| plain | +5.0 ± 2.8 | +10.0 ± 5.7 |" in table and "| 0.60 ± 0.14 | 0.60 ± 0.14 | 2 |" in table
    assert "| start | 55.0 ± 7.1 | 110.0 ± 14.1 |" in table
