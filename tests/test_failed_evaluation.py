"""An evaluation that fails loses nothing: the model is saved, metrics.json says why, one command evaluates again."""

import io
import json
import re
import shlex

import numpy as np
import PIL.Image
import pytest
from rich.console import Console
from test_own_data import TINY, photos

from hf_mim.cli import main
from hf_mim.training.commands import classification, pretrain


def broken(*args, **kwargs):
    raise np.linalg.LinAlgError("it did not converge\nfor some reason")


def results_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def printed_command(error: str) -> list[str]:
    """The words after `hf-mim` of the command that a message ends with."""
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return shlex.split(re.search(r"evaluate again with: hf-mim (.*)$", line)[1])


@pytest.mark.parametrize("saves", ["no", "epoch"])
def test_a_pretraining_is_kept_and_evaluated_again(tmp_path, monkeypatch, capsys, saves):
    data, folder = photos(tmp_path / "photos"), tmp_path / "run"
    words = [f"data.dataset={data}", f"training.output_dir={folder}", f"training.save_strategy={saves}", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.frozen, "evaluate_encoder", broken)
        assert main(["pretrain", "quick", *words]) == 2
    error = capsys.readouterr().err
    assert "the model is trained and saved, but its evaluation failed (LinAlgError: it did not converge)" in error
    results = results_of(folder)
    assert results["evaluation_error"] == "LinAlgError: it did not converge" and results["steps"] == 2
    assert "trained" not in results and (folder / "model.safetensors").is_file()
    assert "test_failed_evaluation" in (folder / "evaluation_error.txt").read_text()  # the traceback
    again = printed_command(error)
    assert again[0] == ("probe" if saves == "no" else "pretrain") and str(folder) in again
    if saves == "no":
        out = tmp_path / "probe"
        again += [f"probe.output_dir={out}", "probe.poolers=[mean]", "probe.epochs=1", "probe.untrained=false"]
        assert main([*again, "probe.seeds=[0]"]) == 0 and (out / "probe.json").is_file()
    else:
        before = (folder / "model.safetensors").read_bytes()
        assert main(again) == 0
        results = results_of(folder)
        assert "evaluation_error" not in results and set(results["trained"]) >= {"knn_mean", "linear_mean"}
        assert (folder / "model.safetensors").read_bytes() == before


def test_a_fine_tuning_is_kept(tmp_path, monkeypatch, capsys):
    data, folder = photos(tmp_path / "photos"), tmp_path / "run"
    start = ["quick", f"data.dataset={data}", f"training.output_dir={folder}", "data.max_eval_images=0", *TINY]
    pretrain.pretrain(start[0], start[1:], Console(file=io.StringIO()))
    tuned = tmp_path / "tuned"
    words = ["training.max_steps=1", f"training.output_dir={tuned}", "data.max_eval_images=8"]
    with monkeypatch.context() as patch:
        patch.setattr(classification, "confusion_matrix", broken)
        assert main(["finetune", str(folder), *words]) == 2
    again = printed_command(capsys.readouterr().err)
    assert results_of(tuned)["evaluation_error"].startswith("LinAlgError") and again[0] == "finetune"
    assert main(again) == 0 and "test" in results_of(tuned)


def test_pixels_that_are_the_same_in_every_image_do_not_end_an_evaluation(tmp_path):
    """A frame, a mask and an empty background: more values than images, most of which never change."""
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = np.full((16, 16, 3), (230, 10, 10), dtype=np.uint8)
        inside = slice(4, 12) if number % 3 else slice(6, 9)
        pixels[inside, inside] = rng.integers(0, 120, (inside.stop - inside.start,) * 2 + (3,)) + 100 * (number % 2)
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
    words = [f"data.dataset={tmp_path / 'photos'}", f"training.output_dir={tmp_path / 'run'}", *TINY]
    pretrain.pretrain("quick", words, Console(file=io.StringIO()))
    results = results_of(tmp_path / "run")
    assert results["raw_pixels"]["linear"] > 60 and "evaluation_error" not in results
