"""Labels and splits keep their meaning: what numbers, texts and folders mean, and what is left out is said."""

import io
import json
import math
import os

import datasets
import numpy as np
import PIL.Image
import pytest
from rich.console import Console
from test_data import config, folder, picture
from test_pretrain import TINY

from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.files import list_place
from hf_mim.training.data.labelled import load_labelled_splits
from hf_mim.training.data.labels import read_labels
from hf_mim.training.data.metadata import read_metadata
from hf_mim.training.data.pretraining import load_splits


def labels_of(values, feature=None):
    features = feature and datasets.Features({"label": feature})
    return read_labels(datasets.Dataset.from_dict({"label": values}, features=features), "label")


def table(path, labels: list, feature=None, **columns):
    """A parquet file of images with labels."""
    images = [{"bytes": encoded(i), "path": None} for i in range(len(labels))]
    features = {"image": datasets.Image()}
    if feature is not None:
        features["label"] = feature
    rows = datasets.Dataset.from_dict({"image": images, "label": labels, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    (rows.cast(datasets.Features(features)) if feature is not None else rows).to_parquet(path)
    return path


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def splits_of(place, **data):
    return load_splits(DataArguments(dataset=str(place), **data), config())


# ---- values --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [int, float, str, lambda number: f"{number}.0"])
def test_whole_numbers_keep_their_numbers(kind):
    numbers = np.random.default_rng(0).permutation(np.repeat(range(12), 3)).tolist()
    labels = labels_of([kind(number) for number in numbers])
    assert labels.classes == [str(i) for i in range(12)] and labels.numbers.tolist() == numbers


def test_numbers_with_gaps():
    assert labels_of([0, 1, 3]).classes == ["0", "1", "2", "3"]  # 3 stays 3, though no image has a 2
    assert labels_of([10, 2, 1]).classes == ["1", "2", "10"]
    assert labels_of([0, 7_000_000]).classes == ["0", "7000000"]
    assert labels_of(["007", "12"]).classes == ["007", "12"]  # a name
    assert labels_of([True, False]).classes == ["False", "True"]


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, -1, None],
        [0.0, 1.0, -1.0, math.nan],
        ["0", "1", "-1", ""],
        ["a", "b", " ", None],
        ["a", "b", "", None],
    ],
)
def test_what_is_missing_is_no_class(values):
    labels = labels_of(values)
    assert labels.numbers.tolist() == [0, 1, -1, -1] and len(labels.classes) == 2 and labels.missing == 2
    assert not labels.unknown


def test_class_labels_go_by_their_names():
    names = datasets.ClassLabel(names=["a", "b", "c"])
    assert labels_of([2, 0, None, -1], names).numbers.tolist() == [2, 0, -1, -1]
    other = datasets.Dataset.from_dict(
        {"label": [0, 1]}, features=datasets.Features({"label": datasets.ClassLabel(names=["c", "d"])})
    )
    labels = read_labels(other, "label", ["a", "b", "c"])
    assert labels.numbers.tolist() == [2, -1] and labels.unknown == {"d": 1} and labels.missing == 0


def test_measured_values_are_no_classes(tmp_path):
    with pytest.raises(DataError, match="float64 values such as 0.5"):
        labels_of([0.5, 1.0])
    table(tmp_path / "train.parquet", [i / 7 for i in range(30)])
    splits = splits_of(tmp_path)
    assert splits.test is None and "float64 values such as" in splits.note and len(splits.train) == 30


# ---- pretraining goes on -------------------------------------------------------------------------------------------
def names_in(split: str, **counts) -> list[str]:
    return [f"{split}/{kind}/{i:02}.png" for kind, count in counts.items() for i in range(count)]


CANNOT_BE_EVALUATED = {
    "unlabelled test": ([f"test/{i}.png" for i in range(4)], "the split test has no labels"),
    "class in test only": (names_in("test", cat=3, fox=3), "class 'fox' is in the split test but not in the training"),
}


@pytest.mark.parametrize("names, reason", CANNOT_BE_EVALUATED.values(), ids=CANNOT_BE_EVALUATED)
def test_pretraining_goes_on_where_nothing_can_be_evaluated(tmp_path, names, reason):
    place = folder(tmp_path, [*names_in("train", cat=10, dog=10), *names])
    splits = splits_of(place)
    assert len(splits.train) == 20 and splits.test is None and reason in splits.note
    assert any(line.startswith("Not evaluated: ") and reason in line for line in splits.report)


def test_one_class_is_not_evaluated(tmp_path):
    table(tmp_path / "train.parquet", ["a"] * 30)
    assert splits_of(tmp_path).note == "all 30 labelled images are of one class, 'a'"


def test_unlabelled_images_are_trained_on_and_left_out_of_evaluation(tmp_path):
    table(tmp_path / "train.parquet", [None if i % 5 == 0 else "ab"[i % 2] for i in range(60)])
    splits = splits_of(tmp_path)
    assert (splits.train_eval.labels < 0).sum() == 12 and (splits.test.labels >= 0).all()
    assert len(splits.train) + len(splits.test) == 60 and len(splits.test) == 4
    assert any("12 without a label" in line for line in splits.report)


def test_a_run_evaluates_on_the_labelled_images_and_says_what_it_left_out(tmp_path):
    table(tmp_path / "images" / "train.parquet", [-1 if i % 6 == 0 else i % 2 for i in range(60)])
    (tmp_path / "images" / "notes.doc").write_text("")
    out = io.StringIO()
    words = [*TINY, f"data.dataset={tmp_path / 'images'}", f"training.output_dir={tmp_path / 'run'}"]
    pretrain("quick", [*words, "data.max_train_images=null"], Console(file=out, width=300))
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["evaluation"]["train_images"] == 45 and results["evaluation"]["test_images"] == 5
    printed = out.getvalue()
    before = printed[: printed.index("step ")] if "step " in printed else printed
    for line in ("1 of 2 files were passed over: 1 .doc", "classes: 2 (0, 1)", "10 without a label", "labels from 'la"):
        assert line in before, line


# ---- fine-tuning ---------------------------------------------------------------------------------------------------
def test_fine_tuning_holds_out_what_it_needs(tmp_path):
    place = folder(tmp_path, [*names_in("train", cat=20, dog=20), *[f"test/{i}.png" for i in range(4)]])
    splits = load_labelled_splits(DataArguments(dataset=place), config())
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [32, 4, 4]
    assert splits.notes["test"] == "held out from train"
    assert any("the split test has no labels" in line for line in splits.report)


def test_rare_classes_stay_in_training(tmp_path):
    place = folder(tmp_path, [f"{kind}/{i}.png" for kind, n in {"a": 40, "b": 1, "c": 2}.items() for i in range(n)])
    splits = load_labelled_splits(DataArguments(dataset=place), config())
    assert set(splits.train.labels.tolist()) == {0, 1, 2} and len(splits.train) + len(splits.test) < 43


def test_a_run_keeps_numbers_and_leaves_out_what_has_none(tmp_path):
    table(tmp_path / "train.parquet", [i % 13 - 1 for i in range(130)])
    splits = load_labelled_splits(DataArguments(dataset=str(tmp_path)), config())
    assert splits.classes[2] == "2" and len(splits.classes) == 12
    assert any("10 of 130 images of train have no label" in line for line in splits.report)
    few = load_labelled_splits(DataArguments(dataset=str(tmp_path), max_train_images=24), config(), seed=1)
    assert len(set(few.train.labels.tolist())) == 12  # a subset has every class


# ---- folders -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("other", ["unlabeled", "extra", "more", "2021"])
@pytest.mark.parametrize("held", ["test", "val", "valid", "dev", "validation"])
def test_splits_stay_splits_beside_other_folders(tmp_path, held, other):
    names = [*names_in("train", cat=10, dog=10), *names_in(held, cat=2, dog=2), *[f"{other}/{i}.png" for i in range(7)]]
    place = folder(tmp_path, names)
    splits = splits_of(place)
    assert (len(splits.train), len(splits.test)) == (20, 4) and splits.train.classes == ["cat", "dog"]
    assert any(f"split {other} (7 images) is not used" in line for line in splits.report)
    more = splits_of(place, extra_splits=[other])
    assert len(more.train) == 27 and len(more.test) == 4 and (more.train.labels < 0).sum() == 7
    with pytest.raises(ValueError, match="extra_splits"):
        splits_of(place, extra_splits=["nothing"])


def test_an_archive_in_a_folder_of_its_own_and_two_folders_of_one_split(tmp_path):
    names = [*names_in("train2014", cat=2, dog=2), *names_in("train2017", cat=3, dog=3), *names_in("val", cat=1, dog=1)]
    splits = splits_of(folder(tmp_path / "place", [f"photos/{name}" for name in names]))
    assert (len(splits.train), len(splits.test)) == (10, 2) and splits.train.classes == ["cat", "dog"]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", "cat/.thumbnails"])
def test_hidden_folders_are_no_classes(tmp_path, hidden):
    place = folder(tmp_path, [*(f"{kind}/{i:02}.png" for kind in ("cat", "dog") for i in range(12)), f"{hidden}/a.png"])
    (tmp_path / ".DS_Store").write_bytes(b"")
    splits = splits_of(place)
    assert splits.train.classes == ["cat", "dog"] and len(splits.train) + len(splits.test) == 24
    assert "2 of 26 files were passed over: 2 hidden" in splits.report


def test_no_image_counts_twice(tmp_path):
    folder(tmp_path / "images", ["a/0.png", "a/1.png", "b/2.png"])
    folder(tmp_path / "elsewhere", ["3.png"])
    images = tmp_path / "images"
    os.symlink("../a/0.png", images / "b" / "again.png")  # an image
    os.symlink("a", images / "c")  # a folder
    os.symlink("..", images / "a" / "up")  # a loop
    os.symlink(tmp_path, images / "all")  # a folder around them
    os.symlink(tmp_path / "elsewhere", images / "e")
    os.symlink(tmp_path / "elsewhere" / "3.png", images / "b" / "3.png")
    os.symlink("nowhere.png", images / "b" / "lost.png")
    listing = list_place(str(images))
    assert len({os.path.realpath(file) for file in listing.files}) == len(listing.files) == 4
    assert listing.passed_over["linked to nothing"] == 1 and listing.passed_over["linked twice"] >= 4


@pytest.mark.parametrize("ending", ["jfif", "avif", "jp2", "JPG"])
def test_what_pillow_reads_is_read(tmp_path, ending):
    kinds = {"jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "JPG": "JPEG"}
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.{ending}", kinds[ending])
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    splits = splits_of(tmp_path)
    assert len(splits.train) == 3 and splits.train[0].images.shape[1] == 3
    assert "2 of 5 files were passed over: 1 .heic, 1 .txt" in splits.report


# ---- tables of `datasets` ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_labels_of_a_metadata_table_are_used(tmp_path, kind):
    folder(tmp_path, [f"sub/{i:02}.png" for i in range(30)])
    rows = [{"file_name": f"sub/{i:02}.png", "label": "ab"[i % 2], "size": i} for i in range(29)]
    rows.append({"file_name": "sub/gone.png", "label": "a", "size": 3})
    if kind == "csv":
        lines = ["file_name,label,size", *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = map(json.dumps, rows)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "metadata.parquet")
    else:
        (tmp_path / f"metadata.{kind}").write_text("\n".join(lines))
    splits = splits_of(tmp_path)
    assert splits.train.classes == ["a", "b"] and splits.test is not None
    for line in ("1 of 30 rows of", "1 without a label"):
        assert any(line in entry for entry in splits.report), splits.report
    paths = splits.train.files[:]["image"]
    expected = [
        ("ab".index("ab"[int(file["path"][-6:-4]) % 2]) if "29.png" not in file["path"] else -1) for file in paths
    ]
    assert splits.train.labels.tolist() == expected


def test_a_table_that_cannot_be_used_is_named(tmp_path):
    folder(tmp_path, [f"{i:02}.png" for i in range(4)])
    (tmp_path / "metadata.csv").write_text("image,label\n00.png,a\n")
    assert any("has no column file_name" in line for line in splits_of(tmp_path).report)
    (tmp_path / "metadata.csv").write_text("file_name,label\n00.png,a\n00.png,b\n")
    with pytest.raises(DataError, match="two rows of different values for .*00.png"):
        splits_of(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    for ending in ("jsonl", "parquet"):
        table = tmp_path / f"metadata.{ending}"
        table.write_text("{nothing")
        with pytest.raises(DataError, match=f"cannot read .*metadata.{ending}"):
            splits_of(tmp_path)
        table.unlink()


def test_a_parquet_file_alone_is_the_data_whatever_its_name(tmp_path):
    folder(tmp_path / "images", [f"{i:02}.png" for i in range(30)])
    rows = [{"image": {"bytes": (tmp_path / f"images/{i:02}.png").read_bytes()}, "label": i % 2} for i in range(30)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "table/metadata.parquet")
    assert splits_of(tmp_path / "table").train.classes == ["0", "1"]


def test_files_that_a_table_names_beside_images_are_no_images(tmp_path):
    folder(tmp_path, [f"{kind}/{i:02}.png" for kind in ("photos", "maps") for i in range(30)])
    names = [f"photos/{i:02}.png,maps/{i:02}.png" for i in range(29)]
    outside = ["photos/29.png,/etc/hostname"]  # a table must not make the run read any file
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,mask_file_name", *names, *outside]))
    splits = splits_of(tmp_path)
    paths = [file["path"] for part in (splits.train, splits.test) for file in part.files[:]["image"]]
    assert len(paths) == 31 and sum("maps" in path for path in paths) == 1  # the map that no row names
    assert any("1 masks or other files that" in line for line in splits.report)


def test_columns_that_name_no_images_stay_text(tmp_path):
    folder(tmp_path, [*(f"{i}.png" for i in range(4)), "mask.png"])
    rows = ["0.png,a.txt,mask.png", "1.png,b.txt,", "2.png,,mask.txt", "3.png,d.txt,mask.png"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption_file_name,mask_file_name", *rows]))
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    metadata = read_metadata([str(tmp_path / "metadata.csv")], [*files, str(tmp_path / "mask.png")])
    columns = metadata.columns(files)
    mask = str(tmp_path / "mask.png")
    assert columns["caption_file_name"] == (["a.txt", "b.txt", "", "d.txt"], datasets.Value("string"))
    assert columns["mask"] == ([mask, None, None, mask], datasets.Image(decode=False)) and len(columns) == 2
    assert [note.partition(" that")[0] for note in metadata.notes] == ["1 masks or other files"]  # mask.txt


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_leaves_is_read(tmp_path, several, streaming):
    rows = datasets.Dataset.from_dict({"image": [picture(i) for i in range(24)], "label": [i % 2 for i in range(24)]})
    if several:
        datasets.DatasetDict(train=rows, test=rows.select(range(6)), more=rows.select(range(3))).save_to_disk(tmp_path)
    else:
        rows.save_to_disk(tmp_path, num_shards=2)
    splits = splits_of(tmp_path, streaming=streaming)
    if streaming:
        assert next(iter(splits.train)).images.shape[1] == 3
    else:
        assert (len(splits.train), len(splits.test)) == ((24, 6) if several else (22, 2))
        assert not several or any("split more (3 images) is not used" in line for line in splits.report)


def test_files_of_other_splits_are_not_mixed_into_training(tmp_path):
    for name, count in {"train-00000-of-00001": 20, "test-00000-of-00001": 4, "unsupervised-00000-of-00001": 9}.items():
        table(tmp_path / f"{name}.parquet", [i % 2 for i in range(count)])
    splits = splits_of(tmp_path)
    assert len(splits.train) == 20 and any(
        "split unsupervised (9 images) is not used" in line for line in splits.report
    )
    assert len(splits_of(tmp_path, extra_splits=["unsupervised"]).train) == 29


# ---- resuming ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
def test_a_run_that_resumes_on_other_data_says_so(tmp_path, change):
    place = folder(tmp_path / "images", [f"{i:02}.png" for i in range(12)])
    words = [*TINY, f"data.dataset={place}", "data.max_train_images=null", "training.watch_every=0"]
    words += ["training.max_steps=2", "training.save_strategy=steps", "training.save_steps=1"]
    run = tmp_path / "run"
    pretrain("quick", [*words, f"training.output_dir={run}"], Console(file=io.StringIO()))
    for name in ("config.json", "model.safetensors", "metrics.json"):
        (run / name).unlink()

    def resumed() -> str:
        out = io.StringIO()
        pretrain(str(run), ["training.resume=true"], Console(file=out, width=300))
        return out.getvalue()

    assert "training data have changed" not in resumed()
    if change == "removed":
        (tmp_path / "images" / "03.png").unlink()
    else:
        name = "03.png" if change == "replaced" else "99.png"
        PIL.Image.new("RGB", (20, 20)).save(tmp_path / "images" / name)
    printed = resumed()
    assert "training data have changed (" in printed
    assert "instead of 12" in printed if change != "replaced" else "as many, but not the same" in printed
