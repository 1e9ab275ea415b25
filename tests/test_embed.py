"""`hf-mim embed` writes what the encoder says of each image, once, and `hf-mim search` finds the nearest."""

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModel

from hf_mim import MIMConfig, MIMModel, cli
from hf_mim.training.commands import embed as commands
from hf_mim.training.commands.search import find_nearest, read_parts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    encoder = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MIMModel(MIMConfig(image_size=16, encoder_config=encoder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """10 training and 4 test images of two classes, 20 x 20 pixels, one of them damaged."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        for label in ("cats", "dogs"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / split / label / f"{label}{i}.png")
    (folder / "test/dogs/dogs1.png").write_bytes(b"\x89PNG no image")
    return folder


@pytest.fixture(scope="module")
def vectors(checkpoint, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "vectors"
    words = [str(out), f"data.dataset={photos}", "data.max_bad_images=1"]
    assert cli.main(["embed", str(checkpoint), *words]) == 0
    return out


def test_every_image_has_its_vector_name_and_label(vectors, checkpoint, photos):
    table = datasets.load_dataset("parquet", data_dir=str(vectors))
    assert {split: len(rows) for split, rows in table.items()} == {"train": 10, "test": 3}
    model = AutoModel.from_pretrained(checkpoint)
    mean, std = (torch.tensor(values)[:, None, None] for values in model.config.statistics())
    for split, rows in table.items():
        for row in rows:
            path = Path(row["file"])
            assert path.parent == photos / split / row["label"] and path.is_file()
            image = torch.from_numpy(np.array(PIL.Image.open(path))).permute(2, 0, 1) / 255
            with torch.no_grad():
                tokens = model((image[None] - mean) / std).last_hidden_state
            np.testing.assert_allclose(row["features"], tokens[0, 1:].mean(dim=0).numpy(), atol=1e-5)


def test_it_goes_on_where_it_stopped(checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "PART", 4)
    calls, original = [], commands.Embedder.__call__

    def failing(self, pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, pixel_values)

    monkeypatch.setattr(commands.Embedder, "__call__", failing)
    words = ["embed", str(checkpoint), str(tmp_path), f"data.dataset={photos}", "data.split=train"]
    assert cli.main(words) == 130 and len(list(tmp_path.glob("*.parquet"))) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert cli.main(words) == 0 and calls == [4, 4, 2, 2]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert cli.main(words) == 0 and len(calls) == 4  # nothing is left to do
    assert not list(tmp_path.glob("*.unfinished"))
    assert sorted(row for _, rows in read_parts(tmp_path) for row in rows["index"]) == list(range(10))


def test_an_image_that_is_left_out_is_named(checkpoint, photos, tmp_path, capsys):
    words = ["embed", str(checkpoint), str(tmp_path), f"data.dataset={photos}", "data.split=test"]
    assert cli.main([*words, "data.max_bad_images=1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "skipped 1 image that cannot be used; the first: " in printed and "test/dogs/dogs1.png" in printed


def test_images_are_decoded_when_they_are_needed(checkpoint, photos):
    model = MIMModel.from_pretrained(checkpoint)
    splits, _ = commands.open_splits(commands.DataArguments(dataset=str(photos), max_bad_images=1), model)
    assert all(split.images is None for split in splits.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pooler", "abmilp"), "pooler abmilp has weights"),
        (("--pooler", "cls"), "holds vectors of other pooler"),
        (("data.eval_crop=0.5",), "holds vectors of other data.eval_crop"),
        (("data.value_range=[0,100]",), "holds vectors of other data.value_range"),
        (("--layer", "7"), "there is no layer 7"),
        (("data.streaming=true",), "set data.streaming=false"),
        (("data.split=nothing",), "there is no split 'nothing'"),
        (("elsewhere",), "one folder to write, not 2"),
    ],
)
def test_what_cannot_be_is_said(vectors, checkpoint, photos, capsys, words, message):
    before = sorted(path.name for path in vectors.iterdir())
    arguments = ["embed", str(checkpoint), str(vectors), f"data.dataset={photos}", "data.max_bad_images=1", *words]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in vectors.iterdir()) == before


def test_what_does_not_change_a_vector_may_change_and_what_has_no_effect_is_said(vectors, checkpoint, photos, capsys):
    words = ["data.max_bad_images=2", "data.crop_scale=[0.5,1]", "data.max_eval_images=3", "data.cache_size=20"]
    assert cli.main(["embed", str(checkpoint), str(vectors), f"data.dataset={photos}", *words]) == 0
    assert "data.crop_scale, data.max_eval_images" in " ".join(capsys.readouterr().out.split())


def test_a_folder_is_searched_from_everywhere_and_nothing_is_printed_of_data_that_are_gone(
    vectors, checkpoint, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(photos.parent)
    out, image = str(tmp_path / "vectors"), str(photos / "train/dogs/dogs3.png")
    words = [f"data.dataset={photos.name}", "data.split=train"]
    assert cli.main(["embed", str(checkpoint), out, *words]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", out, image, "--out", "a.png"]) == 0
    path = tmp_path / "vectors" / commands.RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "data": {"dataset": str(tmp_path / "gone")}}))
    capsys.readouterr()
    assert cli.main(["search", out, image, "--out", "b.png"]) == 2
    assert "similarity" not in capsys.readouterr().out


def test_an_image_is_nearest_to_itself_and_the_others_are_in_order(vectors, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "nearest.png"
    words = ["search", str(vectors), str(photos / "train/dogs/dogs3.png"), "--out", str(out), "--count", "4"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "dogs/dogs3.png" in printed and "1.000" in printed
    assert PIL.Image.open(out).width > 4 * 128
    assert cli.main(words) == 2 and "exists already" in capsys.readouterr().err
    everything = np.concatenate([rows["features"] for _, rows in read_parts(vectors)])
    query = everything[3]
    cosine = [np.dot(query, row) / np.linalg.norm(query) / np.linalg.norm(row) for row in everything]
    nearest = find_nearest(vectors, query, 5)
    np.testing.assert_allclose([one.similarity for one in nearest], sorted(cosine, reverse=True)[:5], atol=1e-6)


def test_vectors_of_a_model_that_changed_are_not_searched(vectors, photos, tmp_path, capsys):
    record = json.loads((vectors / commands.RECORD).read_text())
    copy = tmp_path / "vectors"
    copy.mkdir()
    (copy / commands.RECORD).write_text(json.dumps({**record, "weights": "others"}))
    image = str(photos / "train/dogs/dogs3.png")
    assert cli.main(["search", str(copy), image, "--out", str(tmp_path / "a.png")]) == 2
    assert "embed again" in capsys.readouterr().err
    assert cli.main(["search", str(tmp_path), image, "--out", str(tmp_path / "a.png")]) == 2
    assert "holds no embedding.json" in capsys.readouterr().err
