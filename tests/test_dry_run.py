"""A dry run says what a run would take, and writes nothing."""

import pytest
import torch
from torch import nn

from hf_mim import cli
from hf_mim.training.trainer import memory


def test_the_peak_of_a_chain_of_products_is_counted_by_hand():
    layers = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 8, bias=False))
    with memory.LiveMemory() as counted:
        x = torch.zeros(16, 32)
        layers(x)
    # Nothing but the result is kept: x, then hidden, then out are alive at once, as hidden is saved for the backward.
    assert max(counted.course) == 4 * 16 * (32 + 64 + 8)
    del x
    assert counted.now == 0


def test_views_and_what_was_there_before_are_not_counted():
    before = torch.zeros(1000)
    with memory.LiveMemory() as counted:
        view = before.view(10, 100)[2:]
        before.add_(1)
        made = view + 1
    assert max(counted.course) == counted.now == made.nbytes


def test_what_is_freed_makes_room():
    with memory.LiveMemory() as counted:
        for _ in range(5):
            kept = torch.zeros(1000)
        del kept
    assert max(counted.course) == 8000 and counted.now == 0  # the new one is there before the old one goes


TINY = ("model.image_size=16", "data.max_train_images=40", "training.per_device_train_batch_size=20")


def lines_of(capsys) -> dict[str, str]:
    printed = capsys.readouterr().out
    return dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)


def test_a_pretraining_is_described_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "quick", *TINY, "training.num_train_epochs=3", "--dry-run"]) == 0
    lines = lines_of(capsys)
    assert lines["length"].startswith("6 steps of 20 images")
    assert lines["masks"] == "12 of 16 tokens hidden, on a grid of 4x4"
    assert " of computing, " in lines["time"] and "optimizer " in lines["memory"]
    assert lines["dry run"].startswith("nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", [8, 32])
def test_memory_grows_by_the_same_with_every_image_and_adam_holds_two_numbers_a_weight(batch, tmp_path):
    from hf_mim.training.commands import pretrain

    overrides = [*TINY[:2], f"training.per_device_train_batch_size={batch}", f"training.output_dir={tmp_path}"]
    run = pretrain.set_up("quick", overrides)
    trainer = pretrain.make_trainer(run)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    need = memory.measure_memory(trainer, (1, 16, 16))
    weights = sum(tensor.nbytes for tensor in (*run.model.parameters(), *run.model.buffers()))
    trained = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    assert need.weights == weights and need.optimizer == 8 * trained
    trainer.model.eval()
    with memory.LiveMemory() as counted:  # of the whole batch
        memory.compute_gradients(trainer, batch, (1, 16, 16))
    assert need.step == pytest.approx(max(counted.course), rel=0.01)
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())
    assert need.total == need.weights + need.optimizer + need.step


@pytest.mark.parametrize("keep", ["weights", "features"])
def test_the_distance_to_the_start_is_measured_with_the_step(keep, tmp_path):
    from test_adaptation import make

    trainer = make(tmp_path, keep=keep)
    distance, network = trainer.distance, trainer.bare_model
    kept = sum(weight.nbytes for weight in network.mim.encoder.parameters())
    if keep == "weights":  # but for the mask token
        kept -= sum(w.nbytes for name, w in network.mim.encoder.named_parameters() if "mask_token" in name)
    need = memory.measure_memory(trainer, (3, 16, 16))
    trainer.distance = None
    without = memory.measure_memory(trainer, (3, 16, 16))
    assert kept > 0 and need.weights - without.weights == kept and need.step > without.step
    with torch.no_grad():
        for parameter in network.mim.encoder.parameters():
            parameter.add_(0.1)
    gradients = []
    for part in (None, distance):
        trainer.distance = part
        torch.manual_seed(0)
        with memory.unchanged(trainer):
            memory.compute_gradients(trainer, 4, (3, 16, 16))
            gradients.append(
                {n: p.grad.clone() for n, p in network.mim.encoder.named_parameters() if p.grad is not None}
            )
    more = {name: gradients[1][name] - plain for name, plain in gradients[0].items()}
    if keep == "features":
        assert max(value.abs().max() for value in more.values()) > 1e-4
        return
    for name, value in more.items():  # of half the square of 0.1
        expected = torch.full_like(value, 0 if "mask_token" in name else 0.1 * distance.weight)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_a_fine_tuning_too(capsys, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", str(checkpoint), "data.max_train_images=60", "--dry-run"]) == 0
    assert {"data", "time", "memory", "dry run"} <= lines_of(capsys).keys()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(tmp_path_factory):
    from hf_mim import MIMConfig, MIMForPreTraining

    folder = tmp_path_factory.mktemp("run")
    encoder = {"patch_size": 7, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MIMConfig(image_size=28, num_channels=1, encoder_config=encoder, decoder_config=decoder)
    MIMForPreTraining(config).save_pretrained(folder)
    return folder


def test_too_much_is_said(capsys, tmp_path, monkeypatch):
    from hf_mim.training.commands import dry_run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 2**20)
    assert cli.main(["pretrain", "quick", *TINY, "--dry-run"]) == 0
    assert "lower training.per_device_train_batch_size" in capsys.readouterr().out
