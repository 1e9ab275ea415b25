"""Data sets at URLs: the same images as from a local folder, in loader workers too, and errors in one sentence."""

import functools
import http.server
import itertools
import threading
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from flaky import Flaky
from fsspec.registry import known_implementations
from helpers import write_pairs
from test_data import config, folder, picture, rows
from test_sources import png, shard

from hf_mim.training.data import urls
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.files import list_files
from hf_mim.training.data.masked import load_masked_splits
from hf_mim.training.data.pretraining import load_splits


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Twelve images as shards, as parquet files and as a folder with classes; here and in memory, with its URL."""
    root = tmp_path_factory.mktemp("forms")
    for name in ("shards", "parquet"):
        (root / name).mkdir()
    for part, numbers in enumerate((range(5), range(5, 12))):
        shard(root / "shards" / f"train-{part:05}.tar", numbers)
        rows().select(numbers).to_parquet(root / "parquet" / f"train-{part}.parquet")
    folder(root / "folder", [f"{split}/{'ab'[i % 2]}/{i:02}.png" for split in ("train", "val") for i in range(12)])
    fs = fsspec.filesystem("memory")
    fs.put(f"{root}/", "/forms/", recursive=True)
    yield root, "memory://forms"
    fs.rm("/forms", recursive=True)


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # offline, `datasets` copies from no URL at all


@pytest.fixture
def flaky(monkeypatch):
    Flaky.reset()
    monkeypatch.setattr(urls, "PAUSES", (0, 0))
    yield Flaky
    Flaky.reset()


def batch(dataset: str, streamed=False, **changes):
    data = DataArguments(
        dataset=dataset, streaming=streamed, shuffle_buffer=0, max_eval_images=0, crop_scale=[0.3, 1.0], **changes
    )
    train = load_splits(data, config(), seed=4).train
    fetched = list(itertools.islice(train, 12)) if streamed else train.__getitems__(range(12))
    return MIMCollator(config(), (2, 2))(fetched)["pixel_values"]


@pytest.mark.parametrize("memory", [0, 1024])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("form", ["shards", "parquet", "folder"])
def test_a_url_gives_the_images_of_a_local_folder(forms, form, streamed, memory):
    here, there = (batch(f"{place}/{form}", streamed, memory_limit_mb=memory) for place in forms)
    assert torch.equal(here, there)


def test_a_file_url_is_the_local_folder(forms):
    assert torch.equal(batch(f"file://{forms[0]}/folder"), batch(f"{forms[0]}/folder"))


def test_classes_and_splits_of_a_folder_at_a_url(forms):
    here, there = (load_splits(DataArguments(dataset=f"{place}/folder"), config()) for place in forms)
    assert there.note == here.note == "split val" and there.train.classes == ["a", "b"]
    assert torch.equal(there.train.labels, here.train.labels) and torch.equal(there.test.labels, here.test.labels)


def test_pairs_of_images_and_masks_at_a_url(tmp_path, flaky):
    write_pairs(tmp_path / "images", tmp_path / "masks", 6, channels=1)
    fsspec.filesystem("flaky").put(f"{tmp_path}/", "/pairs/", recursive=True)
    here, there = (
        load_masked_splits(DataArguments(dataset=p), config(channels=1)).train for p in (str(tmp_path), "flaky://pairs")
    )
    assert len(here) == len(there) > 0
    for mine, other in zip((here[i] for i in range(len(here))), (there[i] for i in range(len(there)))):
        assert (mine[0] == other[0]).all() and (mine[1] == other[1]).all()


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_workers_open_urls(forms, form):
    data = DataArguments(dataset=f"{forms[1]}/{form}", max_eval_images=0, memory_limit_mb=0)
    train = load_splits(data, config()).train
    collate = MIMCollator(config(), (2, 2))
    alone, by_workers = (
        list(torch.utils.data.DataLoader(train, 4, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    assert len(alone) == 3
    for a, b in zip(alone, by_workers, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])


@pytest.fixture
def web(forms):
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(forms[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path, streamed", [("shards/train-00001.tar", False), ("shards/train-00001.tar", True)])
def test_a_shard_on_a_web_server(forms, web, path, streamed):
    pytest.importorskip("aiohttp")
    data = {"shuffle_buffer": 0, "max_eval_images": 0, "streaming": streamed}
    found = []
    for place in (forms[0], web):
        train = load_splits(DataArguments(dataset=f"{place}/{path}", **data), config(), seed=4).train
        fetched = list(itertools.islice(train, 7)) if streamed else train.__getitems__(range(7))
        found.append(MIMCollator(config(), (2, 2))(fetched)["pixel_values"])
    assert torch.equal(*found)


def test_a_folder_on_a_web_server(forms, web):
    assert [Path(file).name for file in list_files(f"{web}/shards")] == ["train-00000.tar", "train-00001.tar"]
    assert torch.equal(batch(f"{web}/folder"), batch(f"{forms[0]}/folder"))


# ---- what goes wrong -----------------------------------------------------------------------------------------------
def refused(dataset: str, **changes) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_splits(DataArguments(dataset=dataset, **changes), config())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_urls_are_refused_in_one_sentence(flaky, monkeypatch):
    assert "unknown protocol of nosuch://x/y; choose among s3://" in refused("nosuch://x/y")
    monkeypatch.setitem(known_implementations, "cloud", {"class": "cloudfs_x.FS", "err": "Install cloudfs_x"})
    assert refused("cloud://x") == "cloud://x needs a package that is not installed: pip install cloudfs_x"
    assert refused("flaky://empty") == "there is nothing at flaky://empty"
    assert refused("flaky://empty/a.tar") == "there is nothing at flaky://empty/a.tar"
    assert "no file or folder file:///no/such" in refused("file:///no/such")
    fsspec.filesystem("flaky").pipe("/text/notes.txt", b"nothing to see")
    assert "there are no images in flaky://text" in refused("flaky://text")
    assert "flaky://text/notes.txt is a file, but not a parquet, arrow or tar file" in refused("flaky://text/notes.txt")
    flaky.always = {"list": PermissionError("Access Denied")}
    assert refused("flaky://text") == "no permission to read flaky://text: Access Denied"
    flaky.always = {"list": RuntimeError("the net is down\nand more")}
    assert refused("flaky://text") == "cannot read flaky://text: the net is down"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("ending", ["parquet", "tar"])
def test_a_broken_shard_at_a_url_is_named(flaky, ending, streamed):
    fsspec.filesystem("flaky").pipe(f"/broken/train-0.{ending}", b"no shard at all")
    assert "cannot read flaky://broken" in refused("flaky://broken", streaming=streamed)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/x.tar",
        "https://hunter2@host/x.tar",
        "sftp://me:hunter2@host/photos",
        "https://host/x.tar?X-Amz-Signature=hunter2",
        "https://host/x.tar?a=1&token=hunter2",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="data.dataset holds a password or token") as caught:
        DataArguments(dataset=url)
    assert "hunter2" not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize("url", ["hf://datasets/me/x@main/a", "sftp://me@host/x", "https://host/x.tar?download=true"])
def test_other_urls_are_not(url):
    assert DataArguments(dataset=url).dataset == url


def four_images() -> DataArguments:
    fsspec.filesystem("flaky").pipe({f"/photos/{i}.png": png(picture(i)) for i in range(4)})
    return DataArguments(dataset="flaky://photos", memory_limit_mb=0)


def test_a_net_that_fails_for_a_moment_makes_no_bad_image(flaky):
    data = four_images()
    wanted = load_splits(data, config()).train.__getitems__(range(4))[0].images
    train = load_splits(data, config()).train
    flaky.faults = [("read", f"{i}.png", TimeoutError("slow")) for i in (0, 2, 2)]
    assert torch.equal(train.__getitems__(range(4))[0].images, wanted)
    assert not flaky.faults and train.bad_images().count == 0


def test_a_net_that_stays_away_ends_the_run_and_a_missing_file_does_not(flaky):
    data = four_images()
    data.max_bad_images = 1
    train = load_splits(data, config()).train
    fsspec.filesystem("flaky").rm("/photos/2.png")
    train.__getitems__(range(4))
    assert train.bad_images().count == 1 and "flaky://photos/2.png" in train.bad_images().first
    flaky.always = {"read": TimeoutError("no answer")}
    loader = torch.utils.data.DataLoader(train, 2, collate_fn=MIMCollator(config()), num_workers=1)
    with pytest.raises(urls.Unreachable) as caught:
        list(loader)
    assert str(caught.value) == "cannot read flaky://photos/0.png: no answer"


def test_names_that_leave_their_folder_are_left_out(flaky, monkeypatch):
    names = {"/photos/a.png": {}, "/photos/../b.png": {}, "/photos//etc/c.png": {}, "/other/d.png": {}}
    monkeypatch.setattr(Flaky, "find", lambda *_, **__: names)
    assert urls.list_below("flaky://photos") == ["a.png"]
