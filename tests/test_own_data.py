"""Whose data a command works on, and that a run's own pictures never become data."""

import io

import numpy as np
import PIL.Image
import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from hf_mim.cli import main
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import FolderError, RecipeError
from hf_mim.training.data.files import find_runs, list_place
from hf_mim.training.own_data import own_data


TINY = [
    *("model.image_size=16", "model.num_channels=3", "model.encoder_config.patch_size=4"),
    *("model.encoder_config.hidden_size=16", "model.encoder_config.num_hidden_layers=1"),
    *("model.encoder_config.num_attention_heads=2", "model.encoder_config.intermediate_size=32"),
    *("model.decoder_config.hidden_size=16", "model.decoder_config.num_attention_heads=2"),
    *("model.decoder_config.intermediate_size=32", "training.max_steps=2", "training.per_device_train_batch_size=8"),
]


def photos(folder, count=20, size=16):
    """Colour images of two classes, which differ in their brightest channel."""
    rng = np.random.default_rng(0)
    for number in range(2 * count):
        pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
        pixels[..., number % 2] += 100
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
    return folder


def write_recipe(folder, **data):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {}, "data": data, "training": {}}))
    return str(folder)


def chosen(sources, choice=None):
    out = io.StringIO()
    section = own_data(sources, choice or {}, RunConsole(Console(file=out, width=400)))
    return section, out.getvalue().strip()


def test_data_are_those_of_the_run_and_always_named(tmp_path):
    run = write_recipe(tmp_path / "run", dataset="photos", label_column="kind", crop_scale=[0.2, 1], max_eval_images=9)
    section, line = chosen([run])
    assert section == {"dataset": "photos", "label_column": "kind"}
    assert line == f"data: photos, as in {run}/recipe.yaml; data.dataset=... chooses other data"
    (tmp_path / "run" / "checkpoint-7").mkdir()
    assert chosen([f"{run}/checkpoint-7"])[0] == section
    # A choice stands alone: columns of other data do not apply.
    assert chosen([run], {"dataset": "others"}) == ({}, "data: others")
    assert chosen([run], {"dataset": None}) == ({}, "data: Fashion-MNIST subset (shipped)")
    assert chosen([run], {"split": "x"})[0] == section
    assert chosen(["me/model"]) == ({}, "data: Fashion-MNIST subset (shipped); data.dataset=... chooses other data")


def test_runs_of_different_data_need_a_choice(tmp_path):
    one, same = (write_recipe(tmp_path / name, dataset="photos") for name in "ab")
    other = write_recipe(tmp_path / "c")
    assert chosen([one, "me/model", same])[0] == {"dataset": "photos"}
    with pytest.raises(RecipeError, match=r"\(photos\) and of .*c/recipe.yaml \(Fashion-MNIST .* differ"):
        chosen([one, other])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    data = photos(folder / "photos")
    (data / "notes.txt").touch()
    words = [f"data.dataset={data}", f"training.output_dir={folder / 'run'}", "data.crop_scale=[0.5, 1.0]", *TINY]
    return pretrain("quick", words, Console(quiet=True))


COMMANDS = {
    "doctor": [],
    "probe": ["probe.poolers=[mean]", "probe.epochs=1", "probe.seeds=[0]", "probe.untrained=false"],
    "analyze": ["analyze.images=8", "analyze.measurements=[health]", "analyze.prototype_images=4"],
    "finetune": ["training.max_steps=1"],
    "teacher": [],
    "reconstruct": ["--out", "examples.png"],
    "codebook": ["codes.safetensors", "--codes", "4", "--images", "8"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_runs_own_data(run, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([command, str(run), *COMMANDS[command]]) in (0, 1)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"data: {run.parent / 'photos'}, as in {run}/recipe.yaml" in printed
    assert "1 of 41 files were passed over: 1 .txt" in printed and "columns: images from 'image'" in printed
    assert "values: uint8 from" in printed or command == "analyze"
    if command == "codebook":
        assert load_file("codes.safetensors")["codes"].shape == (4, 16)
        assert "images: 16x16 pixels, 3 channels" in printed


# ---- a run's pictures are no data ----------------------------------------------------------------------------------
def test_an_output_folder_inside_the_data_is_refused(tmp_path):
    data = photos(tmp_path / "photos")
    inside = data / "out"
    with pytest.raises(FolderError, match="lies in the data folder") as error:
        pretrain("quick", [f"data.dataset={data}", f"training.output_dir={inside}", *TINY], Console(quiet=True))
    assert error.value.folder == str(inside) and not inside.exists()


def test_folders_of_runs_are_left_out_and_named(tmp_path, run):
    data = photos(tmp_path / "photos")
    for name in ("old/run", "a/killed/watch"):
        (data / name).mkdir(parents=True)
    for name in ("recipe.yaml", "config.json", "reconstructions.png", "watch/step-1.png"):
        path = data / "old/run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (data / "a/killed/recipe.yaml").touch()
    (data / "a/killed/watch/step-1.png").touch()
    listing = list_place(str(data))
    assert len(listing.files) == 40 and listing.runs == ["a/killed", "old/run"]
    assert listing.notes()[0] == "left out, since they are output folders of runs: a/killed, old/run"
    out = io.StringIO()
    pretrain("quick", [f"data.dataset={data}", f"training.output_dir={tmp_path / 'new'}", *TINY], Console(file=out))
    assert "output folders of runs: a/killed, old/run" in " ".join(out.getvalue().split())
    with pytest.raises(ValueError, match="is the output folder of a run"):
        list_place(str(run))


def test_what_is_a_folder_of_a_run():
    run = ["r/recipe.yaml", "r/config.json"]
    assert find_runs([*run, "r/deep/recipe.yaml", "r/deep/metrics.json", "x/1.png"]) == ["r"]
    assert find_runs(["p/probe.json", "p/probe.png", "q/report.json", "q/report.html"]) == ["p", "q"]
    assert find_runs(["k/recipe.yaml", "k/checkpoint-12/config.json"]) == ["k"]
    assert find_runs(["recipe.yaml", "metrics.json"]) == ["."]
    # A model or a recipe beside images makes no run of their folder.
    assert find_runs(["m/config.json", "m/model.safetensors", "n/recipe.yaml", "n/1.png", "watch/1.png"]) == []
