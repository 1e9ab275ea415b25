"""Stopping and going on: final weights are those of a run without a break, and no checkpoint is ever half there."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from helpers import tiny_config
from rich.console import Console
from test_data import rows
from test_pretrain import ROOT, TINY, equal, weights
from test_trainer import dataset

from hf_mim import MIMForPreTraining
from hf_mim.training import recipe as recipes
from hf_mim.training.commands import pretrain as commands
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.streaming import StreamedImages
from hf_mim.training.trainer import saving, stopping
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.saving import UNFINISHED, last_checkpoint
from hf_mim.training.trainer.trainer import MIMTrainer


# Two passes of 22 images in batches of 4 with 2 accumulated: 3 steps an epoch, the last of two batches, one of them
# short. Drop path and the moving average make the weights depend on torch's random state and on what moves.
MODEL = {
    "encoder_config": {"drop_path_rate": 0.3},
    "target": "moving_average",
    "target_config": {"decay": 0.5, "end_decay": 0.5},
}
STEPS = 8


def images(streamed: bool):
    if not streamed:
        return dataset(22, seed=5)
    data = DataArguments(crop_scale=[0.5, 1.0])
    return StreamedImages(rows(22).to_iterable_dataset(num_shards=2), tiny_config(), data, seed=5)


def trainer(folder, streamed=False, stop_at=None, **options) -> MIMTrainer:
    torch.manual_seed(0)
    model = MIMForPreTraining(tiny_config(**MODEL))
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **options}
    arguments = MIMTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=STEPS,
        learning_rate=1e-2, bf16=False, logging_steps=1, **options,
    )  # fmt: skip
    made = MIMTrainer(
        model=model,
        args=arguments,
        train_dataset=images(streamed),
        data_collator=MIMCollator(model.config, model.mask_grid(16, 16)),
    )
    if stop_at is not None:
        step = made.training_step

        def die(*args, **kwargs):
            if made.state.global_step == stop_at:
                raise ZeroDivisionError
            return step(*args, **kwargs)

        made.training_step = die
    return made


def finish(folder, streamed=False, stops=(), **options) -> tuple[dict, list[float]]:
    """The weights and losses of a run that dies in the middle of each step of `stops` and is resumed each time."""
    for stop in stops:
        last = last_checkpoint(folder) if folder.exists() else None
        with pytest.raises(ZeroDivisionError):
            trainer(folder, streamed, stop, **options).train(resume_from_checkpoint=str(last) if last else None)
        torch.manual_seed(stop)  # as another process would
    made, last = trainer(folder, streamed, **options), last_checkpoint(folder) if folder.exists() else None
    made.train(resume_from_checkpoint=str(last) if last else None)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return made.model.state_dict() | made.target.moving_state(), losses


@pytest.mark.parametrize(("streamed", "workers"), [(False, 0), (True, 0), (True, 2)])
def test_a_resumed_run_is_the_run_without_a_break(tmp_path, streamed, workers):
    whole = finish(tmp_path / "whole", streamed, save_strategy="no", dataloader_num_workers=workers)
    for name, saves, stops in (("every", 1, (2, 3, 7)), ("between", 2, (3, 5))):
        broken = finish(tmp_path / name, streamed, stops, save_steps=saves, dataloader_num_workers=workers)
        assert equal(whole[0], broken[0]) and whole[1] == broken[1]
    assert len(set(whole[1])) == STEPS


def test_after_a_resume_in_the_middle_of_an_epoch_the_epoch_is_exact(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, stop_at=4).train()
    fetched, fetch = [], MIMDataset.__getitems__
    monkeypatch.setattr(
        MIMDataset, "__getitems__", lambda self, i: (fetched.append((self.epoch, list(i))), fetch(self, i))[1]
    )
    trainer(tmp_path).train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    orders = [torch.randperm(22, generator=torch.Generator().manual_seed(42 + epoch)).tolist() for epoch in range(3)]
    # Step 4 is the first of epoch 1: its two batches are done. Epoch 2 has two steps of two batches left.
    expected = [(1, orders[1][i : i + 4]) for i in range(8, 22, 4)] + [
        (2, orders[2][i : i + 4]) for i in range(0, 16, 4)
    ]
    assert fetched[: len(expected)] == expected


@pytest.mark.parametrize("streamed", [False, True])
def test_a_complete_run_takes_no_further_step(tmp_path, streamed):
    whole, losses = finish(tmp_path, streamed, save_steps=STEPS)  # in the middle of the third epoch
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    for options in ({"save_steps": STEPS}, {"save_strategy": "epoch"}):
        again, logged = finish(tmp_path, streamed, **options)
        assert equal({name: whole[name] for name in again}, again) and logged == losses
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


# ---- checkpoints ---------------------------------------------------------------------------------------------------
def test_a_checkpoint_appears_when_it_is_complete(tmp_path, monkeypatch):
    seen, publish = [], saving.publish

    def spy(source, target):
        seen.append(({path.name for path in source.iterdir()}, sorted(p.name for p in tmp_path.glob("checkpoint-*"))))
        publish(source, target)

    monkeypatch.setattr(saving, "publish", spy)
    trainer(tmp_path, save_steps=4, save_total_limit=1).train()
    files = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert all(names >= files | {saving.MOVING_STATE} for names, _ in seen)
    assert [before for _, before in seen] == [[], ["checkpoint-4"]]  # the old one goes when the new one is there
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]
    assert not (tmp_path / UNFINISHED).exists()


def test_what_is_half_written_is_not_picked_up(tmp_path):
    (tmp_path / UNFINISHED / "checkpoint-9").mkdir(parents=True)
    (tmp_path / UNFINISHED / "checkpoint-9" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()  # by another program, killed before it wrote the state
    (tmp_path / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path) is None
    for step in (7, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_extra_state", "save_model"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, part):
    write = getattr(MIMTrainer, part)

    def full(self, *args, **kwargs):
        write(self, *args, **kwargs)
        if self.state.global_step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MIMTrainer, part, full)
    with pytest.raises(
        OSError, match=r"cannot save .*checkpoint-3: the disk of .* is full .*; the last complete one is .*-2$"
    ):
        trainer(tmp_path, save_total_limit=1).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    monkeypatch.undo()
    made = trainer(tmp_path)
    made.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    assert made.state.global_step == STEPS


# ---- the command ---------------------------------------------------------------------------------------------------
RUN = [*TINY, "training.per_device_train_batch_size=16", "training.save_strategy=steps", "training.save_steps=3"]
RUN += ["data.crop_scale=[0.5, 1.0]", "data.max_eval_images=0", "training.num_train_epochs=3"]


def run(*words, recipe="quick") -> str:
    out = io.StringIO()
    pretrain(recipe, list(words), Console(file=out, width=400))
    return out.getvalue()


def test_resume_says_what_it_does(tmp_path):
    folder = f"training.output_dir={tmp_path / 'run'}"
    printed = run(*RUN, folder, "training.resume=true")
    assert f"no complete checkpoint in {tmp_path / 'run'}: starting from the beginning" in printed
    assert "resume" not in recipes.read(str(tmp_path / "run"))["training"]
    with pytest.raises(ValueError, match="holds another run .*training.resume=true"):
        run(*RUN, folder)
    before = weights(tmp_path / "run")
    printed = run("training.resume=true", recipe=str(tmp_path / "run"))  # there is nothing left to do
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-12'}" in printed and "other settings" not in printed
    assert equal(before, weights(tmp_path / "run"))
    printed = run("training.resume=true", "training.num_train_epochs=4", recipe=str(tmp_path / "run"))
    assert "with other settings than before: training.num_train_epochs" in printed
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 16
    with pytest.raises(ValueError, match="which run to resume"):
        run("training.resume=true")


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, monkeypatch, number, error):
    step = commands.MIMTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 4:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    folder = f"training.output_dir={tmp_path / 'run'}"
    run(*RUN, f"training.output_dir={tmp_path / 'whole'}")
    handlers = [signal.getsignal(number) for number in stopping.StopCallback.SIGNALS]
    monkeypatch.setattr(commands.MIMTrainer, "training_step", signalled)
    out = io.StringIO()
    with pytest.raises(error) as caught:
        pretrain("quick", [*RUN, folder], Console(file=out, width=400))
    if error is SystemExit:
        assert caught.value.code == 128 + number
    assert handlers == [signal.getsignal(number) for number in stopping.StopCallback.SIGNALS]
    last = out.getvalue().strip().splitlines()[-1]
    assert last == f"stopped at step 5 of 12; resume with: hf-mim pretrain {tmp_path / 'run'} training.resume=true"
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-5"
    assert (tmp_path / "run" / "model.safetensors").is_file()
    monkeypatch.undo()
    run("training.resume=true", recipe=str(tmp_path / "run"))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def start(*words) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hf_mim", "pretrain", *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **options)


def wait_for(folder: Path, step: int, process) -> None:
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        found = last_checkpoint(folder)
        if found is not None and int(found.name.partition("-")[2]) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step}: {process.communicate()[0] if process.poll() else ''}")


@pytest.mark.slow
def test_killed_twice_and_terminated_once_ends_with_the_same_weights(tmp_path):
    """Streamed and in real processes: kill -9, kill -9, SIGTERM (code 143, one line), SIGINT (130), the end."""
    datasets.disable_progress_bars()
    rows(50).to_parquet(tmp_path / "train.parquet")
    words = [*TINY, "data.streaming=true", f"data.dataset={tmp_path / 'train.parquet'}", "training.max_steps=240"]
    words += ["training.per_device_train_batch_size=4", "training.save_strategy=steps", "training.save_steps=10"]
    words += ["data.crop_scale=[0.5, 1.0]", "training.dataloader_num_workers=1"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    reference = start(*words, f"training.output_dir={whole}")
    process = start(*words, f"training.output_dir={folder}")
    for step, number, code in ((10, 9, -9), (60, 9, -9), (110, 15, 143), (160, 2, 130)):
        wait_for(folder, step, process)
        os.killpg(process.pid, number)  # workers too, as terminals and schedulers do
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == code, printed
        if number != 9:
            assert printed.strip().splitlines()[-1].endswith(f"hf-mim pretrain {folder} training.resume=true"), printed
            assert "Traceback" not in printed
        process = start(str(folder), "training.resume=true")
    assert "resuming from" in process.communicate(timeout=300)[0] and process.returncode == 0
    assert reference.wait(timeout=300) == 0
    assert equal(weights(whole), weights(folder))
