"""The processes of a data loader: how many there are, and that they end when training does."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest
from test_pretrain import ROOT, TINY
from test_trainer import arguments, dataset, make

from hf_mim.training.common import device
from hf_mim.training.common.device import cores_per_process


WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: range(4), raising=False)


def test_there_are_no_more_workers_than_cores(tmp_path, monkeypatch, four_cores):
    assert cores_per_process() == 4
    assert arguments(tmp_path).workers == ""
    assert arguments(tmp_path, dataloader_num_workers=1).workers == "1 loader worker"
    assert arguments(tmp_path, dataloader_num_workers=4).workers == "4 loader workers"
    many = arguments(tmp_path, dataloader_num_workers=8)
    assert many.dataloader_num_workers == 4
    assert many.workers == "4 loader workers (training.dataloader_num_workers=8 is more than the CPU cores)"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # of a launcher
    assert cores_per_process() == arguments(tmp_path, dataloader_num_workers=8).dataloader_num_workers == 1


@pytest.mark.parametrize("fails", [False, True])
def test_workers_that_stay_between_epochs_end_with_training(tmp_path, monkeypatch, four_cores, fails):
    run = make(tmp_path, data=dataset(8), num_train_epochs=2, per_device_train_batch_size=4, **WORKERS)
    step, alive = run.training_step, []

    def watched(*args, **kwargs):
        alive.append(len(multiprocessing.active_children()))
        if fails and len(alive) == 3:
            raise ZeroDivisionError
        return step(*args, **kwargs)

    before = len(multiprocessing.active_children())
    monkeypatch.setattr(run, "training_step", watched)
    if fails:
        with pytest.raises(ZeroDivisionError):
            run.train()
    else:
        run.train()
    assert alive == [before + 2] * (3 if fails else 4)
    assert len(multiprocessing.active_children()) == before


@pytest.mark.slow
def test_a_run_with_workers_that_stay_ends_at_once(tmp_path):
    words = [*TINY, f"training.output_dir={tmp_path / 'run'}"]
    words += [f"training.{key}={str(value).lower()}" for key, value in WORKERS.items()]
    command = [sys.executable, "-m", "hf_mim", "pretrain", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = ""
    for line in process.stdout:
        printed, last = printed + line, time.monotonic()
    assert process.wait(60) == 0 and "Traceback" not in printed, printed
    assert time.monotonic() - last < 10  # a worker that is sent SIGTERM goes on for 30 seconds
