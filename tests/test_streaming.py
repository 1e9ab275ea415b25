"""Streams: which image comes when, who reads which shard, and how a stream goes on."""

import io
import itertools
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from test_data import config, folder, rows
from test_pretrain import ROOT
from test_trainer import make, model

from hf_mim.training.data import shards
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.shards import Shards
from hf_mim.training.data.streaming import StreamedImages


SIZES = (5, 1, 9, 0, 7, 12, 2, 6)  # images in each shard: 42 in all


def solid(value: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def generate(parts):
    for part in parts:
        yield from ({"image": {"bytes": solid(value), "path": None}} for value in part)


def numbered(sizes=SIZES, buffer=4, seed=3) -> StreamedImages:
    """A stream whose image i has the value i in all its pixels."""
    ends = np.cumsum(sizes).tolist()
    parts = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs={"parts": parts})
    assert stream.num_shards == len(sizes)
    return StreamedImages(stream, config(), DataArguments(shuffle_buffer=buffer), seed)


def values(batch: dict) -> list[int]:
    return batch["pixel_values"][:, 0, 0, 0].tolist()


def consume(images, count: int, monkeypatch, processes=1, workers=1, batch=4) -> list[list[int]]:
    """The first batches of all processes, in their order; the workers are only acted."""
    readers = []
    for process, worker in itertools.product(range(processes), range(workers)):
        images.arrange(batch, process, processes, workers)
        info = type("Info", (), {"id": worker, "num_workers": workers})
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.data, "get_worker_info", lambda info=info: info)
            reader = iter(images)
            readers.append([next(reader) for _ in range(-(-count // (processes * workers)) * batch)])
    found = [[int(image.images[0, 0, 0, 0]) for image in reader] for reader in readers]
    # Worker w of process p gives the batches p + processes * (w + workers * j).
    at = [[p * workers + w for w in range(workers) for p in range(processes)], []]
    for j in range(count):
        turn, who = divmod(j, processes * workers)
        at[1].append(found[at[0][who]][turn * batch : (turn + 1) * batch])
    return at[1]


# ---- order ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("buffer", [0, 1, 4, 100])
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_between_them_the_lanes_give_each_image_once_per_pass(lanes, buffer):
    images = numbered(buffer=buffer)
    by_pass, last = {}, []
    for number in range(lanes):
        lane = list(itertools.islice(shards.Lane(images.shards, number, lanes, 3, buffer).rows(0), 300))
        assert [epoch for epoch, _, _ in lane] == sorted(epoch for epoch, _, _ in lane)
        last.append(lane[-1][0])
        for epoch, index, file in lane:
            by_pass.setdefault(epoch, []).append((index, file["bytes"]))
    assert min(last) >= 4
    for epoch in range(min(last)):
        numbers, files = zip(*by_pass[epoch], strict=True)
        assert len(files) == 42 == len(set(files)) == len(set(numbers))
    orders = [[file for _, file in sorted(by_pass[epoch])] for epoch in range(4)]
    assert all((a == b) == (buffer == 0 and lanes == 1) for a, b in itertools.pairwise(orders))


def test_lanes_take_turns_in_having_one_shard_more():
    images = numbered((1, 1, 1, 1, 1))
    lanes = [shards.Lane(images.shards, number, 2, 3, 4) for number in range(2)]
    counts = [[len(lane.dealt(epoch)) for lane in lanes] for epoch in range(4)]
    assert counts == [[3, 2], [2, 3]] * 2


def test_the_buffer_draws_as_it_says():
    """Against the same rule written with arrays: a row takes the place of one that is drawn from those held."""
    rng, size = np.random.default_rng(5), 6
    draws = np.random.default_rng(5).integers(size, size=1000)
    held, expected = list(range(size)), []
    for row, at in zip(range(size, 40), draws, strict=False):
        expected.append(held[at])
        held[at] = row
    found = list(shards.shuffled(iter(range(40)), [], size, rng))
    assert found[:34] == expected and sorted(found[34:]) == sorted(held)


@pytest.mark.parametrize(("processes", "workers", "batch"), [(2, 2, 4), (3, 1, 4), (1, 5, 4), (2, 1, 8), (1, 1, 16)])
def test_the_order_is_that_of_the_run_whoever_reads(monkeypatch, processes, workers, batch):
    run = numbered()
    whole = sum(consume(run, 48, monkeypatch, processes=2, workers=2), [])  # four lanes, four and a half passes
    assert run.lanes == 4 and run.block == 4
    for done in (0, 16, 96):
        for known in (True, False):
            position = run.position(done)
            position["lengths"] = position["lengths"] if known else [-1] * 8
            later = numbered()
            later.seek(json.loads(json.dumps(position)))
            count = (192 - done) // batch
            assert sum(consume(later, count, monkeypatch, processes, workers, batch), []) == whole[done:192]


@pytest.mark.parametrize(
    ("processes", "workers", "lanes", "opened"),
    [(2, 2, 4, 2), (2, 4, 8, 1), (1, 0, 1, 8), (2, 3, 6, 2), (4, 4, 8, 1), (7, 1, 7, 2), (11, 1, 1, 8)],
)
def test_each_reader_opens_its_own_shards_only(monkeypatch, processes, workers, lanes, opened):
    images, read, found = numbered((5,) * 8), Shards._open, {}
    monkeypatch.setattr(Shards, "_open", lambda self, index: (found[who].add(index), read(self, index))[1])
    for who in itertools.product(range(processes), range(max(1, workers))):
        found[who] = set()
        images.arrange(4, who[0], processes, workers)
        info = type("Info", (), {"id": who[1], "num_workers": max(1, workers)})
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda info=info: info)
        lane = shards.Lane(images.shards, *lane_of(images, who), 3, 4)
        assert len(list(itertools.islice(lane.rows(0), 5 * len(lane.dealt(0))))) >= 5
    assert images.lanes == lanes and max(map(len, found.values())) == opened
    assert set().union(*found.values()) == set(range(8))


def lane_of(images, who) -> tuple[int, int]:
    first = next(images._mine()) // images.block
    later = {number // images.block % images.lanes for number in itertools.islice(images._mine(), 40)}
    assert later == {first % images.lanes}  # never another one
    return first % images.lanes, images.lanes


def test_what_lies_before_is_not_read_again(monkeypatch):
    images = numbered((20,) * 8, buffer=4)
    rows = list(itertools.islice(shards.Lane(images.shards, 0, 1, 3, 4).rows(0), 400))
    read, found = Shards._open, []
    monkeypatch.setattr(Shards, "_open", lambda self, index: (found.append(index), read(self, index))[1])
    assert list(itertools.islice(shards.Lane(images.shards, 0, 1, 3, 4).rows(295), 5)) == rows[295:300]
    assert len(found) <= 3, found  # of 8: that of the place, and those of the images that wait in the buffer


# ---- going on ------------------------------------------------------------------------------------------------------
def take(images, count: int, workers: int = 0, batch: int = 4) -> list[torch.Tensor]:
    images.arrange(batch, workers=workers)
    loader = torch.utils.data.DataLoader(
        images,
        batch,
        collate_fn=MIMCollator(config(), (2, 2)),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
    batches = list(itertools.islice(loader, count))
    return [torch.cat([b["pixel_values"].flatten(1), b["bool_masked_pos"].float()], dim=1) for b in batches]


def stream(seed=3, count=10, buffer=6) -> StreamedImages:
    data = DataArguments(shuffle_buffer=buffer, crop_scale=[0.3, 1.0])
    return StreamedImages(rows(count).to_iterable_dataset(num_shards=2), config(), data, seed)


@pytest.mark.parametrize(("workers", "then"), [(0, 2), (2, 0), (2, 1)])
def test_crops_and_masks_too_go_on_with_any_number_of_workers(workers, then):
    images = stream()
    whole = take(images, 7, workers)  # two passes of 10 images and 8 of a third
    assert images.lanes == max(1, workers)
    assert len(torch.cat(whole).unique(dim=0)) == 28  # a pass has crops and masks of its own
    for done, lengths in ((1, [-1, -1]), (4, [5, 5])):
        later = stream()
        later.seek({**images.position(done * 4), "lengths": lengths})
        assert all(torch.equal(a, b) for a, b in zip(whole[done:], take(later, 7 - done, then), strict=True))


def test_a_stream_knows_where_it_is():
    images = stream()
    take(images, 3)
    position = {"images": 12, "lanes": 1, "block": 4, "lengths": [5, 5], "damaged": []}
    assert images.position(12) == position
    images.seek(position)
    assert images.position(4)["images"] == 16


@pytest.mark.parametrize(
    ("position", "words"),
    [
        ({"images": 12, "length": 10}, "older version of hf_mim.*go on with that version.*model.init_from"),
        ({"images": 12, "lanes": 1, "block": 4, "lengths": [5], "damaged": []}, "has 2 shards now and had 1 at"),
    ],
)
def test_a_position_elsewhere_is_refused(position, words):
    with pytest.raises(ValueError, match=words):
        stream().seek(position)


def test_a_streamed_folder_has_shards_for_every_reader(tmp_path):
    place = folder(tmp_path, [f"{i:02}.png" for i in range(12)])
    images = load_splits(DataArguments(dataset=place, streaming=True), config()).train
    images.arrange(4, workers=3)
    assert images.shards.count == 12 and images.lanes == 3
    first = load_splits(DataArguments(dataset=place, streaming=True, max_train_images=5), config()).train
    first.arrange(4, workers=3)
    assert first.lanes == 1
    files = [file["path"][-6:-4] for _, _, file in itertools.islice(shards.Lane(first.shards, 0, 1, 3, 4).rows(0), 10)]
    assert sorted(files[:5]) == sorted(files[5:]) and len(set(files[:5])) == 5
    assert sorted(files[:5]) != ["00", "01", "02", "03", "04"]  # a subset is drawn at random


def test_a_subset_of_a_stream_does_not_sleep_at_the_end_of_a_pass(tmp_path, monkeypatch):
    """`datasets` sleeps whenever it has read shards side by side, as its `shuffle` does by default."""
    datasets.disable_progress_bars()
    for number in range(3):
        rows(6).to_parquet(tmp_path / f"train-{number}.parquet")
    images = load_splits(DataArguments(dataset=str(tmp_path), streaming=True, max_train_images=9), config()).train
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    images.arrange(4)
    assert len(list(itertools.islice(images, 30))) == 30


def test_a_look_at_a_stream_is_whole_images_and_moves_nothing():
    images = stream()
    look = list(itertools.islice(images.without_augmentation(), 10))
    images.arrange(4, 1, 2, 2)
    images.start = 24
    again = list(itertools.islice(images.without_augmentation(), 10))
    assert all(torch.equal(a.images, b.images) for a, b in zip(look, again, strict=True))
    assert (images.lanes, images.start, images.process, images.data.crop_scale) == (2, 24, 1, [0.3, 1.0])


def test_no_images_are_said_to_be_none():
    with pytest.raises(ValueError, match="the data set has no images"):
        next(iter(numbered((0, 0))))


def test_the_benchmark_counts_what_is_read(tmp_path):
    import stream_reading  # not above: `stream_worker.py` imports this file where benchmarks are not at hand

    page = tmp_path / "scaling.md"
    rows = stream_reading.main(["--images", "32", "--out", str(page)])
    one, four = (float(row[3]) for row in rows[:2])  # all readers together, of the stream
    assert one > 2.5 > 1.5 > four > 0.9 and f"| {rows[0][1]} |" in page.read_text()


# ---- several processes ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_processes_with_workers_divide_a_pass_and_train_as_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*start, str(ROOT / "tests" / "stream_worker.py"), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2)]
    seen = sum((part["seen"] for part in found), [])
    assert sorted(seen) == list(range(64)) and not set(found[0]["seen"]) & set(found[1]["seen"])
    # What each has learned of the shards, both know.
    position = json.loads((tmp_path / "run" / "checkpoint-2" / "stream.json").read_text())
    assert position == {"images": 32, "lanes": 4, "block": 8, "lengths": [8] * 8, "damaged": []}
    # In one lane, the order does not depend on who reads: two processes are one with the doubled batch.
    images = numbered((64,), buffer=16)
    trainer = make(tmp_path / "one", model(), images, per_device_train_batch_size=16, max_steps=3, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(found[0]["losses"], losses, rtol=1e-4)
