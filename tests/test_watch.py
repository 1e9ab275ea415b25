"""Watching: what is written and logged, that training does not notice, and what each warning is given for."""

import io
import json

import PIL.Image
import pytest
import torch
from helpers import target_options, tiny_config
from rich.console import Console
from test_pretrain import TINY, equal, weights
from test_trainer import dataset, make, model

from hf_mim import MIMForPreTraining
from hf_mim.cli import main
from hf_mim.modeling.targets import TARGETS
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.data.pretraining import Splits
from hf_mim.training.evaluation.feature_statistics import (
    describe_explained,
    effective_rank,
    explained_share,
    loss_of_the_mean,
    nearly_constant,
)
from hf_mim.training.trainer import monitor as watch
from hf_mim.training.trainer import saving


def run(folder, *words) -> str:
    out = io.StringIO()
    pretrain("quick", [*TINY, f"training.output_dir={folder}", *words], Console(file=out, width=400))
    return out.getvalue()


def history(folder) -> list[dict]:
    state = json.loads((saving.last_checkpoint(folder) / "trainer_state.json").read_text())
    return state["log_history"]


def test_looks_are_written_logged_and_not_noticed(tmp_path):
    words = ["training.per_device_train_batch_size=16", "model.encoder_config.drop_path_rate=0.2"]
    words += ["data.crop_scale=[0.5, 1.0]", "data.memory_limit_mb=0", "training.dataloader_num_workers=1"]
    run(tmp_path / "watched", "training.watch_every=3", "training.report_to=tensorboard", *words)
    run(tmp_path / "alone", "training.watch_every=0", *words)
    assert equal(weights(tmp_path / "watched"), weights(tmp_path / "alone"))
    losses = [[e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("watched", "alone")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    pictures = sorted((tmp_path / "watched" / "watch").iterdir())
    assert [path.name for path in pictures] == ["step-000003.png", "step-000006.png", "step-000008.png"]
    assert min(PIL.Image.open(pictures[0]).size) > 300
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    looks = [entry for entry in history(tmp_path / "watched") if "watch_knn" in entry]
    assert [entry["step"] for entry in looks] == [3, 6, 8]
    for entry in looks:
        assert 0 <= entry["watch_knn"] <= 100 and 1 <= entry["watch_effective_rank"] <= 16
        assert entry["watch_mean_loss"] == looks[0]["watch_mean_loss"] > 0
    by_step = {entry["step"]: entry["loss"] for entry in history(tmp_path / "watched") if "loss" in entry}
    for entry, steps in zip(looks, ([1, 2], [4, 5], [7])):  # a step's own loss is logged after the look
        expected = 1 - sum(by_step[step] for step in steps) / len(steps) / entry["watch_mean_loss"]
        assert entry["watch_explained"] == pytest.approx(expected, rel=1e-6)
    metrics = json.loads((tmp_path / "watched" / "metrics.json").read_text())
    assert metrics["explained"] == round(looks[-1]["watch_explained"], 4)
    assert not (tmp_path / "alone" / "watch").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "watched").rglob("events.out.tfevents*")
    found = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in found.Images("reconstructions")] == [3, 6, 8]
    assert "train/watch_knn" in found.Tags()["scalars"] and "train/loss" in found.Tags()["scalars"]


def test_a_share_and_a_stream(tmp_path):
    source = ["data.streaming=true", "training.max_steps=10", "training.watch_every=0.5"]
    printed = run(tmp_path / "run", *source, "training.per_device_train_batch_size=4")
    assert f"pictures: {tmp_path}/run/watch, {tmp_path}/run/loss.png\n" in printed
    assert len(list((tmp_path / "run" / "watch").iterdir())) == 2
    assert [e["step"] for e in history(tmp_path / "run") if "watch_effective_rank" in e] == [5, 10]


def test_the_effective_rank_is_the_number_of_equal_directions():
    axes, _ = torch.linalg.qr(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).double())
    axes = axes - axes.mean(0)
    for count in (1, 3, 8):
        features = torch.linalg.qr(axes[:, :count])[0] @ torch.eye(8, dtype=torch.float64)[:count] + 5
        rank, spread = effective_rank(features)
        assert rank == pytest.approx(count, rel=1e-6)
    rank, spread = effective_rank(torch.ones(10, 4))
    assert (rank, spread) == (1.0, 0.0)


def test_the_loss_of_the_mean_is_the_variance_of_the_targets():
    network = MIMForPreTraining(tiny_config(target_config={"normalize": False}))
    pixels, masks = torch.randn(6, 3, 16, 16), torch.zeros(6, 16, dtype=torch.bool)
    masks[:, :5] = True
    values = network.target.targets(pixels, (4, 4))["patches"][masks]
    expected = values.var(dim=0, unbiased=False).mean().item()
    assert loss_of_the_mean(network, pixels, masks) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_target_has_a_loss_of_the_mean(name, tmp_path):
    network = MIMForPreTraining(tiny_config(image_size=32, encoder_config={"patch_size": 8}, target=name,
                                            target_config=target_options(name, tmp_path)))  # fmt: skip
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[:, 3:9] = True
    loss = loss_of_the_mean(network, torch.randn(4, 3, 32, 32), masks)
    assert loss is not None and 0 < loss < float("inf")


def watched(folder, network, **options) -> list[str]:
    """The warnings of a short run."""
    said, data = [], dataset(32)
    trainer = make(folder, network, data=data, logging_steps=1, **options)
    trainer.add_callback(watch.TrainingMonitor(trainer, Splits(data, None, None, ""), folder, 0.25, said.append))
    trainer.train()
    return said


def test_collapse_is_named_with_a_remedy(tmp_path):
    network = model()
    with torch.no_grad():  # features that are the same for every image, whatever the input
        network.mim.encoder.final_norm.weight.zero_()
    said = watched(tmp_path, network, learning_rate=0.0)
    (warning,) = [text for text in said if "collapsed" in text]
    assert "all images have the same" in warning and "lower training.base_learning_rate" in warning


def test_a_loss_that_learns_nothing_is_named_and_one_that_learns_is_not(tmp_path, monkeypatch):
    # Nothing but a bias far from the data: worse than the mean, at a learning rate of zero.
    network = model(target_config={"normalize": False})
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.fill_(0.5)
    options = {"learning_rate": 0.0, "max_steps": 8}
    (warning,) = [text for text in watched(tmp_path / "a", network, **options) if "predicting the mean" in text]
    assert "nothing is learned" in warning and "Raise training.base_learning_rate" in warning
    monkeypatch.setattr(watch, "loss_of_the_mean", lambda *args, **kwargs: 1e6)
    assert not [text for text in watched(tmp_path / "b", network, **options) if "predicting the mean" in text]


def test_a_warning_that_still_holds_comes_again_at_the_end(tmp_path):
    words = ["training.learning_rate=0", "training.watch_every=2", "training.per_device_train_batch_size=16"]
    printed = run(tmp_path / "run", *words).splitlines()
    plateaus = [i for i, line in enumerate(printed) if "is no better than always predicting the mean" in line]
    table = next(i for i, line in enumerate(printed) if "accuracy of the frozen encoder" in line)
    assert len(plateaus) == 2 and plateaus[0] < table < plateaus[1]
    assert any("at the end, the loss is above that of predicting" in line for line in printed[table:])
    assert any("warning: the encoder cannot be told from the untrained one" in line for line in printed[table:])


def test_what_is_explained_is_a_share_of_the_variance():
    torch.manual_seed(0)
    network = MIMForPreTraining(tiny_config(target_config={"normalize": False}))
    pixels, masks = torch.randn(6, 3, 16, 16), torch.zeros(6, 16, dtype=torch.bool)
    masks[:, :5] = True
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(6, 16, 48)[masks]
    with torch.no_grad():
        predicted = network(pixels, masks, return_loss=False).logits
        predicted = predicted[masks] if predicted.shape[1] == 16 else predicted.flatten(0, 1)
    residual, variance = (patches - predicted).square().mean(), (patches - patches.mean(dim=0)).square().mean()
    share = explained_share(network, pixels, masks)
    assert share == pytest.approx(1 - (residual / variance).item(), rel=1e-4) and share < 0
    assert describe_explained(network, share) == "the loss is above that of predicting the mean"
    assert describe_explained(network, 0.25) == "25.0 percent of the target's variance is explained"
    hog = MIMForPreTraining(tiny_config(target="pixel", target_config={"loss": "l1"}))
    assert describe_explained(hog, 0.25) == "the loss is 25.0 percent below that of predicting the mean"


def test_nearly_constant_images_are_said():
    noise = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flat = torch.full((3, 3, 16, 16), 40, dtype=torch.uint8)
    flat[:, :, ::2] += 3  # deviates by 1.5 levels
    assert nearly_constant(torch.cat([noise, flat[:2]])) is None
    assert nearly_constant(torch.cat([noise, flat])).startswith("50 percent of 6 images are all but constant")
    flat[:, :, ::2] += 3
    assert nearly_constant(torch.cat([noise, flat])) is None


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(tmp_path, monkeypatch, capsys, broken):
    step = saving.CheckpointingTrainer.get_batch_samples

    def spoil(self, *args, **kwargs):
        if self.state.global_step == 4:
            with torch.no_grad():
                parameter = next(p for n, p in self.model.named_parameters() if n.endswith("weight"))
                parameter[0].fill_(float("nan"))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(saving.CheckpointingTrainer, "get_batch_samples", spoil)
    folder = tmp_path / "run"
    words = [*TINY, "training.per_device_train_batch_size=16", f"training.output_dir={folder}"]
    words += ["training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=1"]
    words += [f"training.logging_steps={1 if broken == 'loss' else 100}", "training.watch_every=0"]
    assert main(["pretrain", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    what = "the loss is" if broken == "loss" else "the weights ("
    assert error.startswith(f"error: {what}") and "not finite at step 5" in error
    assert f"the last good checkpoint is {folder / 'checkpoint-4'}" in error and "model.init_from" in error
    assert ("at learning rate" in error) == (broken == "loss")
    kept = MIMForPreTraining.from_pretrained(folder / "checkpoint-4")
    assert all(torch.isfinite(parameter).all() for parameter in kept.parameters())


@pytest.mark.slow
def test_trackio_gets_numbers_and_pictures(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    logged = []
    monkeypatch.setattr(trackio, "log", lambda values, step=None: logged.append((step, values)))
    monkeypatch.setattr(trackio, "init", lambda **kwargs: None)
    monkeypatch.setattr(trackio, "finish", lambda *args, **kwargs: None)
    from transformers.integrations import TrackioCallback

    monkeypatch.setattr(TrackioCallback, "setup", lambda self, *args, **kwargs: setattr(self, "_initialized", True))
    run(tmp_path / "run", "training.report_to=trackio", "training.watch_every=1")
    pictures = [step for step, values in logged if "reconstructions" in values]
    assert pictures == [1, 2]
