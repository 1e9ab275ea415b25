"""Several small batches, accumulated or in several processes, are the large batch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_pretrain import ROOT, TINY, equal, run, weights
from test_trainer import dataset, make, model


def gradients(folder, batch: int, steps: int, **changes) -> torch.Tensor:
    """What the optimizer is given in the first step, before clipping."""
    network, found = model(**changes), []
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
    trainer = make(folder, network, dataset(16), max_steps=1, learning_rate=0.0, **options)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    )
    trainer.train()
    return found[0].clone()


# As released, spectra are averaged over the batch at hand, and `batch_weight` scales by its largest frequency: by
# definition neither is a mean over images.
FREQUENCY = {"target": "frequency", "target_config": {"batch_weight": False, "average_spectra": False}}


@pytest.mark.parametrize("changes", [{}, FREQUENCY, {"masking": "block", "decoder": "cross_attention"}])
def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path, changes):
    large = gradients(tmp_path, 16, 1, **changes)
    assert large.abs().max() > 1e-4
    for batch, steps in ((8, 2), (2, 8)):
        # float32: sums of 16 images in another order differ in the last bits of the largest terms.
        torch.testing.assert_close(gradients(tmp_path, batch, steps, **changes), large, rtol=1e-4, atol=2e-6)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def launch(folder, *words, command=("-m", "hf_mim", "pretrain"), code=0) -> tuple[str, str]:
    """Runs a command in two processes under accelerate and returns what it printed and its errors."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
    # accelerate has no switch for several processes on one machine's CPU; without a GPU this one does it.
    start += ["--multi_gpu", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", *command, *words]
    done = subprocess.run(
        [*start, f"training.output_dir={folder}"], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch_and_go_on_after_one_was_killed(tmp_path):
    words = [*TINY, "data.crop_scale=[0.5, 1.0]", "training.save_strategy=steps", "training.save_steps=3"]
    words += ["training.save_total_limit=10", "training.watch_every=4"]
    losses, folders = [], [tmp_path / "1", tmp_path / "2"]
    for processes, folder in enumerate(folders, start=1):
        batch = [f"training.per_device_train_batch_size={16 // processes}"]
        printed = launch(folder, *words, *batch)[0] if processes > 1 else run(folder, *batch, base=words)
        for line in ("accuracy of the frozen encoder", f"pictures: {folder}", "training: total batch 16"):
            assert printed.count(line) == 1  # only one process prints
        state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        assert json.loads((folder / "metrics.json").read_text())["processes"] == processes
    assert len(losses[0]) == 8
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    # What is written is the same; but for the random state, of which every process has its own.
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in folders]
    assert all("rng_state" in name for name in files[0] ^ files[1])
    killed = tmp_path / "killed"
    words = [*words, *batch, "data.max_eval_images=0", "training.watch_every=0"]
    # That it ends at all: the other process would wait for half an hour.
    _, errors = launch(killed, *words, command=(str(ROOT / "tests" / "killed_worker.py"), "pretrain"), code=1)
    (message,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    again = f"accelerate launch --num_processes 2 ... -m hf_mim pretrain {killed} training.resume=true"
    assert "process 1 of 2 (pid " in message and "was killed" in message
    assert f"the last complete checkpoint is {killed / 'checkpoint-3'}; resume with: {again}" in message
    assert "hf_mim/training" not in errors  # no traceback of ours
    printed, _ = launch(killed, *words, "training.resume=true")
    assert printed.count(f"resuming from {killed / 'checkpoint-3'}") == 1
    assert equal(weights(folders[1]), weights(killed))
