"""How fast a run is: FLOPs, waiting, and the profile of a step."""

import gzip
import json

import pytest
import torch
from helpers import tiny_config
from test_trainer import make, model

from hf_mim import MIMForPreTraining
from hf_mim.training.trainer import throughput
from hf_mim.training.trainer.profiling import PARTS, ProfileCallback
from hf_mim.training.trainer.throughput import Throughput, flops_per_image, mean_throughput, peak_flops


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def block(rows: int, dim: int, wide: int) -> int:
    """Projections, two products of the attention, and the two layers of the MLP."""
    return linear(rows, dim, 4 * dim) + 2 * linear(rows, rows, dim) + 2 * linear(rows, dim, wide)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_are_those_of_a_count_by_hand(attention):
    encoder = {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = tiny_config(
        encoder_config={**encoder, "intermediate_size": 64, "mask_style": "token"},
        decoder="transformer",
        decoder_config=decoder,
    )
    network = MIMForPreTraining(config)
    network.set_attn_implementation(attention)
    network.train()
    before, weights = torch.get_rng_state(), [parameter.clone() for parameter in network.parameters()]
    found = flops_per_image(network)
    length = 1 + 16  # class token and patches of 16 x 16 pixels
    forward = linear(16, 4 * 4 * 3, 16) + 2 * block(length, 16, 64) + linear(length, 16, 8) + block(length, 8, 32)
    forward += linear(16, 8, 4 * 4 * 3)
    first = linear(16, 4 * 4 * 3, 16)  # pixels need no gradient
    assert found == 3 * forward - first
    assert torch.equal(before, torch.get_rng_state()) and network.training
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_peak_is_known_or_absent():
    assert peak_flops("NVIDIA H100 80GB HBM3", True) == 989e12 and peak_flops("NVIDIA H100 PCIe", True) == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", False) is None and peak_flops("a toaster", True) is None


def test_speed_waiting_and_utilisation_between_two_readings(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds
        return seconds

    counter = Throughput(images_per_step=32, flops=5e9, peak=1e12)
    assert counter.read(0) == {}
    assert counter.fetch(wait, 2) == 2
    clock[0] += 6
    wanted = {"images_per_second": 40.0, "data_wait": 0.25, "gflops_per_image": 5.0, "mfu": 0.2}
    assert counter.read(10) == wanted
    clock[0] += 1
    assert counter.read(10) == {}  # no step in between
    history = [{"loss": 1.0, "data_wait": 0.2}, {"loss": 1.0, "data_wait": 0.4, "mfu": 0.5}, {"train_runtime": 1.0}]
    assert mean_throughput(history) == {"data_wait": pytest.approx(0.3), "mfu": 0.5}


def test_a_run_logs_how_fast_it_is_and_where_the_time_goes(tmp_path):
    trainer, said = make(tmp_path, model(), logging_steps=1, max_steps=12), []
    trainer.count_flops()
    trainer.add_callback(ProfileCallback(trainer, tmp_path, said.append))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "images_per_second" in entry]
    assert len(logged) > 3 and all(e["images_per_second"] > 0 and 0 <= e["data_wait"] <= 1 for e in logged)
    page = (tmp_path / "profile" / "summary.md").read_text()
    assert all(f"| {part} | " in page for part in PARTS) and "images per second" in page
    assert str(tmp_path / "profile" / "summary.md") in said[0]
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert "forward" not in vars(trainer.model.decoder) and "targets" not in vars(trainer.model.target)
