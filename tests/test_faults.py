"""What goes wrong on a long run: damaged and slow shards, a clock that jumps, a loader's worker that is killed."""

import io
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from test_data import config, rows
from test_pretrain import TINY, equal, weights
from test_resume import STEPS, finish, trainer
from test_sources import broken, shard
from test_streaming import consume, numbered, solid, take

from hf_mim import cli
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.data import bad_images, shards
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import TooManyBadImages
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.shards import Shards, UnreadableShard
from hf_mim.training.trainer.saving import last_checkpoint
from hf_mim.training.trainer.trainer import MIMTrainer


# ---- damaged shards ------------------------------------------------------------------------------------------------
def tars(folder, count=4, cut=2) -> str:
    """Shards of six images each, of which one ends in the middle of its fourth image."""
    for i in range(count):
        shard(folder / f"train-{i}.tar", range(6 * i, 6 * i + 6), ("png",))
    file = folder / f"train-{cut}.tar"
    inside = file.read_bytes().find(f"{6 * cut + 3:04}.png".encode())
    os.truncate(file, inside + 512 + 100)
    return str(folder)


def parquets(folder, count=4, cut=2) -> str:
    """Files of three row groups of two images, of which one has nonsense in place of its second row group."""
    for i in range(count):
        table = rows(24).select(range(6 * i, 6 * i + 6))
        table.to_parquet(folder / f"train-{i}.parquet", batch_size=2)
    file = folder / f"train-{cut}.parquet"
    at = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(b"\xff" * 40)
    return str(folder)


def opened(place: str, most: float = 0.01, buffer=3):
    data = DataArguments(dataset=place, streaming=True, shuffle_buffer=buffer, max_bad_images=most)
    return load_splits(data, config(), seed=3).train


@pytest.mark.parametrize(("make", "good"), [(tars, 3), (parquets, 4)])
def test_a_damaged_shard_is_used_as_far_as_it_goes(tmp_path, make, good):
    place = make(tmp_path)
    images = opened(place)
    lane = list(itertools.islice(shards.Lane(images.shards, 0, 1, 3, 3).rows(0), 2 * (18 + good)))
    for epoch in range(2):
        files = [file["bytes"] for number, _, file in lane if number == epoch]
        assert len(files) == len(set(files)) == 18 + good
    (words,) = images.damaged_shards()
    assert words.startswith(f"{tmp_path}/train-2.") and words.endswith(f"is damaged: {good} of its images can be read")
    assert images.shards.lengths.tolist() == [6, 6, good, 6]
    # What goes on from a checkpoint has the same order, and knows of it.
    whole = take(opened(place), 12, workers=2)
    run = opened(place)
    take(run, 5, workers=2)
    later = opened(place)
    later.seek(run.position(20))
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], take(later, 7, workers=1), strict=True))


def test_a_run_says_which_shard_is_damaged(tmp_path):
    (tmp_path / "tars").mkdir()
    words = [*TINY, "data.streaming=true", f"data.dataset={tars(tmp_path / 'tars')}", "data.max_train_images=null"]
    words += ["training.per_device_train_batch_size=8", "training.max_steps=4", "training.watch_every=0"]
    out = io.StringIO()
    pretrain("quick", [*words, f"training.output_dir={tmp_path / 'run'}"], Console(file=out, width=300))
    sentence = f"{tmp_path / 'tars' / 'train-2.tar'} is damaged: 3 of its images can be read"
    assert out.getvalue().count(f"{sentence}, the others are left out") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["damaged_shards"] == [sentence]


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damaged_shards_than_are_allowed_stop_the_run_in_one_line(tmp_path, workers):
    place = tars(tmp_path)
    words = r"^cannot read .*train-2.tar: .*; 1 of 4 shards are damaged, more than data.max_bad_"
    with pytest.raises(UnreadableShard, match=words) as caught:
        take(opened(place, most=0), 12, workers)
    assert "\n" not in str(caught.value)
    os.truncate(tmp_path / "train-1.tar", 5000)
    with pytest.raises(UnreadableShard, match="2 of 4 shards"):
        take(opened(place), 12)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError("no answer"), "cannot read shard 1 of 2: no answer"),
        (OSError(5, "Input/output error"), "1 of 2: .*Input/output error"),
        (FileNotFoundError(2, "No such file"), "1 of 2: .*No such file"),
    ],
)
def test_what_may_be_read_tomorrow_stops_the_run(error, words):
    """It would be left out for good otherwise."""

    def failing(parts):
        yield from itertools.islice(({"image": {"bytes": solid(i), "path": None}} for i in range(6)), 3)
        raise error

    stream = datasets.IterableDataset.from_generator(failing, gen_kwargs={"parts": [[0], [1]]})
    found = Shards(stream, "image", 0.01)
    with pytest.raises(UnreadableShard, match=words):
        list(found.read(0))
    assert not found.damaged.any()


def test_a_damaged_shard_that_cannot_be_reached_stops_the_run_too():
    errors = [EOFError("cut short"), ConnectionResetError("gone")]

    def failing(parts):
        yield {"image": {"bytes": solid(1), "path": None}}
        raise errors.pop(0)

    found = Shards(datasets.IterableDataset.from_generator(failing, gen_kwargs={"parts": [[0], [1]]}), "image", 0.01)
    with pytest.raises(UnreadableShard, match="cannot read shard 1 of 2: gone"):
        list(found.read(0))


def test_a_file_of_which_nothing_can_be_read_is_left_out(tmp_path):
    place = parquets(tmp_path)
    images = opened(place)
    os.truncate(tmp_path / "train-2.parquet", 300)  # its table of contents is at its end
    lane = list(itertools.islice(shards.Lane(images.shards, 0, 1, 3, 3).rows(0), 36))
    assert {epoch for epoch, _, _ in lane} == {0, 1} and len({file["bytes"] for _, _, file in lane}) == 18
    assert images.shards.lengths.tolist() == [6, 6, 0, 6]
    assert "train-2.parquet is damaged: 0 of" in images.damaged_shards()[0]


def test_a_shard_that_had_more_images_stops_the_run(tmp_path):
    place = tars(tmp_path)
    images = opened(place, buffer=0)
    take(images, 6)
    later = opened(place)
    later.seek(images.position(0))
    shard(tmp_path / "train-1.tar", range(2), ("png",))
    with pytest.raises(UnreadableShard, match="train-1.tar had 6 images before and has 2 now: restore it"):
        take(later, 6)


def test_bad_images_are_replaced_by_the_next_of_their_lane(tmp_path, monkeypatch):
    place = broken(tmp_path / "images", 12, (3, 4, 11))
    first = opened(place, most=3)
    whole = take(first, 7, workers=2)
    assert first.bad_images().count == 3
    again = opened(place, most=3)
    again.seek(first.position(16))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], take(again, 3), strict=True))
    monkeypatch.setattr(bad_images, "SETTLED", 1)
    with pytest.raises(TooManyBadImages, match="(03|04|11).png"):
        take(opened(place, most=0), 7)
    # Nothing but bad ones, and as many allowed as there are.
    with pytest.raises(TooManyBadImages, match="cannot decode|is not a recognised image file"):
        take(opened(broken(tmp_path / "all", 3, range(3)), most=100), 1)


# ---- slow shards, jumping clocks -----------------------------------------------------------------------------------
def test_a_slow_shard_changes_no_order(monkeypatch):
    images, read = numbered(), Shards.read
    expected = sum(consume(images, 12, monkeypatch, workers=2), [])

    def slow(self, index: int):
        for file in read(self, index):
            time.sleep(0.03 * (index == 5))
            yield file

    monkeypatch.setattr(Shards, "read", slow)
    again = numbered()
    again.arrange(4, workers=2)
    loader = torch.utils.data.DataLoader(again, 4, num_workers=2, collate_fn=lambda batch: batch)
    found = [int(image.images[0, 0, 0, 0]) for batch in itertools.islice(loader, 12) for image in batch]
    assert found == expected


def test_a_clock_that_jumps_changes_neither_order_nor_checkpoints(tmp_path, monkeypatch):
    whole = finish(tmp_path / "whole", streamed=True, save_steps=2)
    clock, jumps = time.time, itertools.cycle((0, -(10**6), 10**7, -(10**8)))
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    publish = MIMTrainer._save_checkpoint

    def backwards(self, *args):
        publish(self, *args)
        for path in (tmp_path / "broken").glob("checkpoint-*"):  # the later the step, the older the folder
            when = 10**9 - int(path.name.partition("-")[2]) * 1000
            os.utime(path, (when, when))

    monkeypatch.setattr(MIMTrainer, "_save_checkpoint", backwards)
    broken_off = finish(tmp_path / "broken", streamed=True, stops=(5,), save_steps=2)
    assert equal(whole[0], broken_off[0]) and whole[1] == broken_off[1]
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["checkpoint-6", f"checkpoint-{STEPS}"]


# ---- a worker that is killed ---------------------------------------------------------------------------------------
def kill_a_worker(monkeypatch, at_step: int) -> None:
    step, killed = MIMTrainer.training_step, []

    def killing(self, *args, **kwargs):
        if self.state.global_step == at_step and not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MIMTrainer, "training_step", killing)


def test_a_killed_worker_ends_the_run_and_loses_nothing(tmp_path, monkeypatch):
    options = {"streamed": True, "dataloader_num_workers": 2, "save_steps": 2}
    whole = finish(tmp_path / "whole", **options)
    kill_a_worker(monkeypatch, 5)
    words = r"a data loader worker was killed after step \d \(.*\); resume from .*checkpoint-[46] with training.resume"
    with pytest.raises(ChildProcessError, match=words):
        trainer(tmp_path / "run", **options).train()
    assert not multiprocessing.active_children()  # nor is the other one left
    assert not (tmp_path / "run" / "unfinished").exists()
    assert last_checkpoint(tmp_path / "run").name in ("checkpoint-4", "checkpoint-6")  # it is noticed a step later, too
    again = finish(tmp_path / "run", **options)
    assert equal(whole[0], again[0])
    np.testing.assert_array_equal(whole[1], again[1])


def test_on_the_command_line_a_killed_worker_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for i in range(3):
        rows(20).to_parquet(tmp_path / "data" / f"train-{i}.parquet")
    words = [
        "pretrain",
        "quick",
        *TINY,
        "data.streaming=true",
        f"data.dataset={tmp_path / 'data'}",
        "data.max_train_images=null",
    ]
    words += ["training.per_device_train_batch_size=4", "training.save_strategy=steps", "training.save_steps=5"]
    words += ["training.max_steps=20", "training.dataloader_num_workers=2", "training.watch_every=0"]
    assert cli.main([*words, f"training.output_dir={tmp_path / 'whole'}"]) == 0
    kill_a_worker(monkeypatch, 12)
    capsys.readouterr()
    assert cli.main([*words, f"training.output_dir={tmp_path / 'run'}"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("error: a data loader worker was killed after step 1")
    last = last_checkpoint(tmp_path / "run")
    assert last.name in ("checkpoint-10", "checkpoint-15")
    assert f"resume from {last} with training.resume=true" in printed[-1]
    assert not any("Traceback" in line for line in printed)
    assert cli.main(["pretrain", str(tmp_path / "run"), "training.resume=true"]) == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_worker_that_says_why_is_heard(tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    words = ["pretrain", "quick", *TINY, "data.streaming=true", f"data.dataset={tars(tmp_path / 'tars')}"]
    words += ["data.max_train_images=null", "data.max_bad_images=0", "training.max_steps=20"]
    words += ["training.dataloader_num_workers=1", f"training.output_dir={tmp_path / 'run'}"]
    assert cli.main(words) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith(f"error: cannot read {tmp_path / 'tars' / 'train-2.tar'}: ")


# ---- a home that cannot be used ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_cache_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    words = [*TINY, "training.max_steps=1", f"training.output_dir={tmp_path / 'run'}"]
    for name in ("HF_HOME", "HOME"):
        environment = {k: v for k, v in os.environ.items() if k != "HF_HOME"} | {name: str(tmp_path / "file" / "home")}
        command = [sys.executable, "-m", "hf_mim", "pretrain", "quick", *words]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 2 and not (tmp_path / "run").exists()
        assert process.stderr.count("\n") == 1 and str(tmp_path / "file") in process.stderr, process.stderr
        assert "HF_HOME says where downloads and caches go" in process.stderr
