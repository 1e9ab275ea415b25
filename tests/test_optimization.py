"""Rates and decays that follow the batch or the step, LAMB and Muon."""

import math

import pytest
import torch
from helpers import CONVNEXT, tiny_config
from test_trainer import make
from timm.optim import Lamb, Muon
from transformers import TrainerCallback

from hf_mim import MIMForPreTraining
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.optimization import divide_for_muon


def arguments(folder, **options) -> MIMTrainingArguments:
    return MIMTrainingArguments(output_dir=str(folder), bf16=False, per_device_train_batch_size=32, **options)


def test_the_rate_follows_the_batch_or_its_root(tmp_path):
    base = {"base_learning_rate": 1.5e-3, "base_batch_size": 2048}
    assert arguments(tmp_path, **base).learning_rate == pytest.approx(1.5e-3 / 64)
    assert arguments(tmp_path, **base, lr_scaling="sqrt").learning_rate == pytest.approx(1.5e-3 / 8)
    assert arguments(tmp_path).learning_rate == pytest.approx(1.5e-4 / 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scaling": "cubic"}, "lr_scaling"),
        ({"optimizer": "lion"}, "training.optimizer"),
        ({"weight_decay": 0.0, "weight_decay_end": 0.2}, "weight_decay above 0"),
        ({"lr_scales": {"mask_token": -1}}, "lr_scales.mask_token"),
        ({"base_batch_size": 0}, "base_batch_size"),
        ({"optimizer": "muon", "muon_scale": 0}, "muon_scale must be above 0"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_rates_by_the_name_of_a_parameter(tmp_path):
    """The token's own group follows the schedule at a tenth, and nothing else changes."""
    trainer = make(tmp_path, lr_scales={"mask_token": 0.1})
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    token = [p for name, p in trainer.model.named_parameters() if name.endswith("mask_token")]
    groups = trainer.optimizer.param_groups
    (own,) = [group for group in groups if group["params"] and group["params"][0] is token[0]]
    assert own["params"] == token and own["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    for _ in range(3):
        trainer.lr_scheduler.step()
        assert own["lr"] == pytest.approx(groups[0]["lr"] / 10) and own["lr"] > 0
    with pytest.raises(ValueError, match="no parameter of the model ends in that name"):
        make(tmp_path, lr_scales={"mask_tokens": 0.1}).create_optimizer()


def test_muon_turns_the_matrices_of_blocks_and_adamw_the_rest(tmp_path):
    """By hand: the first step of AdamW with Nesterov momentum 0.9 is 1.9 times the rate in every element; that of Muon
    has singular values near 0.2 sqrt(longer side), the RMS of AdamW's (2502.16982), as far as its five iterations bring
    them to 1."""
    trainer = make(tmp_path, optimizer="muon", weight_decay=0.0, learning_rate=1e-2, muon_scale=3.0)
    model, optimizer = trainer.model, trainer.create_optimizer()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    steps = {name: (before[name] - parameter.detach()) / 1e-2 for name, parameter in model.named_parameters()}
    turned = {name for name in steps if "layers." in name and steps[name].ndim > 1}
    assert {name.split(".")[0] for name in turned} == {"mim", "decoder"}
    for name, step in steps.items():
        if name in turned:
            values = torch.linalg.svdvals(step) / (3 * 0.2 * max(step.shape) ** 0.5)
            assert values.min() > 0.3 and values.max() < 1.3
        else:
            torch.testing.assert_close(step.abs(), torch.full_like(step, 1.9), rtol=1e-3, atol=1e-3)


def test_muon_leaves_vectors_and_depthwise_kernels_of_convnets(tmp_path):
    model = MIMForPreTraining(tiny_config(image_size=64, encoder="convnet", encoder_config=CONVNEXT, masking_config={}))
    optimizer = Muon(model.parameters(), lr=1.0)
    divide_for_muon(optimizer, model, 3.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    *rest, turned = optimizer.param_groups
    assert turned["params"] and turned["lr"] == 3 and all(group["lr"] == 1 for group in rest)
    assert all(min(parameter.shape[:2]) > 1 for parameter in turned["params"])
    left = [names[parameter] for group in rest for parameter in group["params"] if parameter.ndim > 1]
    assert any("depthwise" in name or "dwconv" in name for name in left)


@pytest.mark.parametrize("flattening", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_muon_needs_whole_matrices(flattening, tmp_path):
    trainer = make(tmp_path, optimizer="muon")
    setattr(trainer, flattening, True)
    with pytest.raises(ValueError, match="needs whole matrices"):
        trainer.create_optimizer()


def test_muon_learns_saves_and_goes_on(tmp_path):
    options = {"optimizer": "muon", "num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": 2}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    (first, _) = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    again = make(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(first))
    for (name, value), other in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(value, other), name


class Recorder(TrainerCallback):
    def __init__(self):
        self.decays = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.decays.append([group["weight_decay"] for group in optimizer.param_groups])


def test_lamb_and_the_rising_decay_of_spark(tmp_path):
    recorder = Recorder()
    options = {"optimizer": "lamb", "weight_decay": 0.04, "weight_decay_end": 0.2, "num_train_epochs": 2}
    trainer = make(tmp_path, **options)
    trainer.add_callback(recorder)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, Lamb)
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters()))
    steps = trainer.state.max_steps
    expected = [0.2 - 0.08 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert [decay for decay, _ in recorder.decays] == pytest.approx(expected)
    assert expected[0] == pytest.approx(0.04) and all(spared == 0 for _, spared in recorder.decays)
