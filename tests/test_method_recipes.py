"""The small recipes, whole: two steps, saved, reloaded bit for bit, resumed to the same weights, exported."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from test_pretrain import equal, weights

from hf_mim import MIMForPreTraining
from hf_mim.conversion import export
from hf_mim.training.commands.pretrain import pretrain


# Recipe -> where its checkpoint can go.
EXPORTS = {
    "fcmae_small": ["transformers", "official"],
    "pixio_small": ["transformers", "timm"],
    "crossmae_small": ["timm"],
    "hiera_small": [],
}
COMMON = [
    *("data.max_train_images=16", "data.max_eval_images=16", "training.max_steps=2", "training.watch_every=0"),
    *("training.per_device_train_batch_size=4", "training.save_strategy=steps", "training.save_steps=1"),
    *("training.save_total_limit=2", "training.logging_steps=1", "training.bf16=false"),
]


def run(folder, recipe, *overrides) -> str:
    out = io.StringIO()
    pretrain(recipe, [*COMMON, *overrides, f"training.output_dir={folder}"], Console(file=out, width=200))
    return out.getvalue()


@pytest.mark.parametrize("recipe", EXPORTS)
def test_a_recipe_from_its_first_step_to_its_export(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mim.training.commands.pretrain.evaluate", lambda run: {})
    folder = tmp_path / "run"
    run(folder, recipe)
    whole = weights(folder)
    saved = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in saved["log_history"] if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)

    reloaded = MIMForPreTraining.from_pretrained(folder)
    again = tmp_path / "again"
    reloaded.save_pretrained(again)
    assert equal(whole, weights(again))
    assert any(not torch.equal(whole[name], value) for name, value in weights(folder / "checkpoint-1").items())

    shutil.rmtree(folder / "checkpoint-2")
    (folder / "model.safetensors").unlink()
    run(folder, recipe, "training.resume=true")
    assert equal(whole, weights(folder))

    for to in EXPORTS[recipe]:
        assert export(str(folder), tmp_path / to, to=to)
