"""Folders of images and tars on the Hub: nothing of them is lost or merged without a word. The builders of `datasets`
are the real ones, over local folders, as they are over repositories."""

import io
import tarfile

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest

from hf_mim.training.common.errors import DataError
from hf_mim.training.data import hub_files, sources
from hf_mim.training.data.arguments import DataArguments


def image(number: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def put(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number, "AVIF" if name.endswith("avif") else "PNG"))


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """What is opened where `tmp_path / "repo"` is an id on the Hub."""
    monkeypatch.setattr(sources, "place_of", lambda name: None)
    return lambda **data: sources.open_dataset(DataArguments(dataset=str(tmp_path / "repo"), **data))


def labels(split) -> list:
    return [split[i]["label"] for i in range(len(split))] if "label" in split.features else []


@pytest.mark.parametrize("root", ["", "data/"])
def test_labels_stay_where_a_test_split_has_none(tmp_path, opened, root):
    """`datasets` drops the labels of all splits, because some images lie in no class folder."""
    classes = [f"{root}train/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)]
    put(tmp_path / "repo", *classes, *(f"{root}test/{i}.png" for i in range(2)))
    assert "label" not in datasets.load_dataset(str(tmp_path / "repo"))["train"].features
    splits = opened()
    assert labels(splits["train"]) == ["cat"] * 3 + ["dog"] * 3 and len(splits["test"]) == 2
    assert not labels(splits["test"])


def test_a_folder_is_streamed(tmp_path, opened):
    put(tmp_path / "repo", *(f"train/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)))
    train = opened(streaming=True)["train"]
    assert isinstance(train, datasets.IterableDataset)
    assert [row["label"] for row in train] == ["cat"] * 3 + ["dog"] * 3


def test_files_of_no_split_are_named(tmp_path, opened):
    classes = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("cat", "dog") for i in range(2)]
    put(tmp_path / "repo", *classes, *(f"unlabeled/{i}.png" for i in range(5)))
    splits = opened()
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "test": 4}
    assert "5 files are in no split of the data set on the Hub: unlabeled" in splits.notes


def test_images_of_types_that_datasets_does_not_know_are_read(tmp_path, opened):
    put(tmp_path / "repo", *(f"{i}.{ending}" for ending in ("png", "avif") for i in range(3)), "notes/readme.txt")
    assert len(datasets.load_dataset(str(tmp_path / "repo"))["train"]) == 3
    splits = opened()
    assert len(splits["train"]) == 6 and any("1 .txt" in note for note in splits.notes)


def test_tables_of_labels_and_masks(tmp_path, opened):
    put(tmp_path / "repo", *(f"{kind}/{i}.png" for kind in ("photos", "maps") for i in range(4)))
    rows = [f"photos/{i}.png,{'ab'[i % 2]},maps/{i}.png" for i in range(4)]
    (tmp_path / "repo" / "metadata.csv").write_text("\n".join(["file_name,label,mask_file_name", *rows]))
    train = opened()["train"]
    assert labels(train) == ["a", "b", "a", "b"] and "mask" in train.features


def test_members_of_tars_are_not_merged(tmp_path, opened):
    members = [(f"{i:02}.jpg", image(i, "JPEG")) for i in range(6)]
    tar(tmp_path / "repo" / "a.tar", members + [(f"{i:02}.cls", b"1") for i in range(6)])
    assert len(datasets.load_dataset(str(tmp_path / "repo"))["train"]) == 12  # twice as many as there are
    with pytest.raises(DataError, match="lie apart"):
        opened()


@pytest.mark.parametrize("streaming", [False, True])
def test_types_in_tars_may_change(tmp_path, opened, streaming):
    members = [(f"{i:02}.{'jpg' if i < 3 else 'png'}", image(i, "JPEG" if i < 3 else "PNG")) for i in range(6)]
    tar(tmp_path / "repo" / "train" / "a.tar", members)
    rows = list(opened(streaming=streaming)["train"])
    assert len(rows) == 6 and all(row["jpg"]["bytes"] for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_beside_tars_is_no_tar(tmp_path, opened, streaming):
    tar(tmp_path / "repo" / "a.tar", [(f"{i:02}.png", image(i)) for i in range(6)])
    put(tmp_path / "repo", "preview.png")
    splits = opened(streaming=streaming)
    assert len(list(splits["train"])) == 6
    assert "1 files are in no split of the data set on the Hub: ." in splits.notes


def test_a_damaged_tar_is_named(tmp_path, opened):
    tar(tmp_path / "repo" / "a.tar", [(f"{i:02}.png", image(i)) for i in range(6)])
    (tmp_path / "repo" / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="cannot read .*repo as webdataset"):
        opened()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'me/x' doesn't exist"), "'me/x' was not found, locally or"),
        (OSError(28, "No space left on device"), "cannot read 'me/x': .*No space left"),
        (
            ConnectionError("Couldn't reach 'me/x' on the Hub (timeout)"),
            "there is no folder 'me/x' here, and the Hub cannot be",
        ),
        (OSError(""), "cannot read 'me/x': OSError"),
    ],
)
def test_only_what_is_not_there_was_not_found(monkeypatch, error, message):
    def fail(*args):
        raise error

    monkeypatch.setattr(hub_files.datasets, "load_dataset_builder", fail)
    with pytest.raises(DataError, match=f"^{message}"):
        hub_files.open_hub(DataArguments(dataset="me/x"))


@pytest.fixture
def asked(tmp_path, monkeypatch) -> dict:
    """What `snapshot_download` is asked for where `tmp_path / "repo"`, which is its answer, is me/photos on the Hub."""
    root, remote, options = str(tmp_path / "repo"), "hf://datasets/me/photos@abc", dict[str, object]()
    load, list_place = datasets.load_dataset_builder, hub_files.list_place

    def load_remote(*names):
        builder = load(root)
        builder.base_path = remote
        files = builder.config.data_files
        builder.config.data_files = {name: [file.replace(root, remote) for file in files[name]] for name in files}
        return builder

    def list_remote(place):
        listing = list_place(root)
        listing.files, listing.tables = (
            [file.replace(root, remote) for file in files] for files in (listing.files, listing.tables)
        )
        return listing

    monkeypatch.setattr(hub_files.datasets, "load_dataset_builder", load_remote)
    monkeypatch.setattr(hub_files, "list_place", list_remote)
    monkeypatch.setattr(hub_files, "snapshot_download", lambda repo, **given: options.update(given, repo=repo) or root)
    return options


def downloaded(asked: dict, files: list[str]) -> list[str]:
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    return list(huggingface_hub.utils.filter_repo_objects(files, **patterns))


def test_what_is_not_streamed_is_downloaded(tmp_path, asked):
    """The names are those of the local copy, in the Hub's cache."""
    put(tmp_path / "repo", *(f"train/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(2)), "test/cat/0.png")
    splits = hub_files.open_hub(DataArguments(dataset="me/photos"))
    assert asked["repo"] == "me/photos" and asked["revision"] == "abc" and asked["repo_type"] == "dataset"
    there = ["train/cat/0.png", "test/cat/0.png", "x.bin", "unlabeled/0.png", "train/notes.bin"]
    assert downloaded(asked, there) == there[:2]
    assert labels(splits["train"]) == ["cat", "cat", "dog", "dog"]
    assert splits["train"][0]["image"]["path"] == str(tmp_path / "repo" / "train/cat/0.png")


def test_what_is_in_no_split_is_not_downloaded(tmp_path, asked):
    """Also where the splits are those of the files' names, and their folder is that of all."""
    wanted = [f"{split}-{i}.png" for split in ("train", "test") for i in range(2)]
    others = ["[draft].png", *(f"extra/{i}.png" for i in range(3))]
    put(tmp_path / "repo", *wanted, *others)
    splits = hub_files.open_hub(DataArguments(dataset="me/photos"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 2}
    assert downloaded(asked, [*wanted, *others]) == wanted
    assert asked["ignore_patterns"] == ["[[]draft].png", "extra/*"]
