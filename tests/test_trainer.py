"""Training: learning rates, weight decay, accumulation, epochs, and a stock Trainer."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from helpers import tiny_config
from rich.console import Console

from hf_mim import MIMForPreTraining
from hf_mim.training.common.console import RunConsole
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.trainer import arguments as training_arguments
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.trainer import MIMTrainer


def model(seed=0, **changes) -> MIMForPreTraining:
    torch.manual_seed(seed)
    return MIMForPreTraining(tiny_config(**changes))


def dataset(count=16, seed=0) -> MIMDataset:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    columns = {"image": [PIL.Image.fromarray(image) for image in images]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image()}))
    return MIMDataset(table, tiny_config(), DataArguments(crop_scale=[0.5, 1.0]), seed=seed)


def arguments(folder, **options) -> MIMTrainingArguments:
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "save_strategy": "no", "bf16": False} | options
    return MIMTrainingArguments(output_dir=str(folder), **options)


def make(folder, network=None, data=None, console=None, **options) -> MIMTrainer:
    network = network or model()
    return MIMTrainer(
        model=network,
        args=arguments(folder, **options),
        train_dataset=data or dataset(),
        data_collator=MIMCollator(network.config, network.mask_grid(16, 16)),
        console=console and RunConsole(console),
    )


def test_uint8_is_normalised_on_the_device(tmp_path):
    trainer, features = make(tmp_path), dataset().__getitems__(range(4))
    config = trainer.model.config
    wanted = MIMCollator(config)(features)["pixel_values"]
    raw = MIMCollator(config, normalized=False)(features)
    assert raw["pixel_values"].dtype == torch.uint8
    prepared = trainer._prepare_inputs(raw)["pixel_values"]
    assert torch.equal(prepared, wanted)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (config.image_mean, config.image_std)
    )
    torch.testing.assert_close(prepared.double(), (raw["pixel_values"] / 255.0 - mean) / std, rtol=0, atol=1e-6)
    again = trainer._prepare_inputs(MIMCollator(config, normalized=False)(dataset(seed=1).__getitems__(range(4))))
    assert again["pixel_values"].data_ptr() == prepared.data_ptr()  # the same memory, step by step
    assert torch.equal(trainer._prepare_inputs({"pixel_values": wanted})["pixel_values"], wanted)


def test_the_learning_rate_follows_the_total_batch(tmp_path):
    options = {"base_learning_rate": 1.5e-4, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 4}
    assert arguments(tmp_path, **options).learning_rate == pytest.approx(1.5e-4 * 128 / 256)
    assert arguments(tmp_path, learning_rate=3e-3, **options).learning_rate == 3e-3
    assert arguments(tmp_path, learning_rate=0.0, **options).learning_rate == 0


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_activation_checkpointing_work_and_none_warns(tmp_path, name, recwarn):
    def checkpointed(**options) -> bool:
        trainer = make(tmp_path, model(), max_steps=1, **options)
        trainer.train()
        return any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())

    assert checkpointed(**{name: True}) and not checkpointed(**{name: False}) and not checkpointed()
    assert not [warning for warning in recwarn if name in str(warning.message)]


def test_bf16_is_on_where_the_machine_has_it(tmp_path, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(training_arguments, "has_bf16", lambda has=has: has)
        assert MIMTrainingArguments(output_dir=str(tmp_path)).bf16 is has
    assert arguments(tmp_path, bf16=True).bf16 is True
    with pytest.raises(ValueError, match="true, false or auto"):
        arguments(tmp_path, bf16="always")


def test_cosine_has_warm_up_and_ends_at_0_or_the_floor(tmp_path):
    options = {"max_steps": 100, "learning_rate": 1.0, "warmup_steps": 0.1}
    assert schedule(make(tmp_path, **options), 100)[-1] == 0
    floor = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.01}}
    trainer = make(tmp_path, **options, **floor)
    rates = schedule(trainer, 100)
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == 1 and rates[-1] == pytest.approx(0.01)
    middle = 0.01 + 0.99 * (1 + np.cos(np.pi * 45 / 90)) / 2
    assert rates[55] == pytest.approx(middle)
    other = make(tmp_path, **options, lr_scheduler_type="linear")
    assert schedule(other, 100)[-1] == 0


def test_the_rate_drops_to_a_tenth_where_asked(tmp_path):
    rates = schedule(make(tmp_path, max_steps=100, learning_rate=1.0, warmup_steps=0.1, lr_drops=[0.5, 0.9]), 100)
    assert rates[5] == pytest.approx(0.5) and rates[49] == 1
    assert rates[50] == pytest.approx(0.1) and rates[89] == pytest.approx(0.1) and rates[90] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        arguments(tmp_path, lr_drops=[700])


def schedule(trainer, steps) -> list[float]:
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return rates


def test_weight_decay_spares_biases_norms_tokens_and_positions(tmp_path):
    network = model(encoder_config={"position_embedding": "learned", "num_register_tokens": 2, "qk_norm": True})
    trainer = make(tmp_path, network)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in network.named_parameters()}
    decayed, spared = ([names[p] for p in group["params"]] for group in trainer.optimizer.param_groups)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.05
    assert trainer.optimizer.param_groups[1]["weight_decay"] == 0
    assert decayed and all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert len(decayed) + len(spared) == len(names)
    for part in ("bias", "norm", "prefix", "position", "mask_token"):
        assert any(part in name for name in spared), part


def test_gradient_accumulation_is_the_larger_batch(tmp_path):
    weights = []
    for batch, steps in ((8, 1), (2, 4)):
        network = model()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        # Without Adam, which would turn rounding errors of tiny gradients into steps of full size.
        make(tmp_path, network, optim="sgd", learning_rate=0.5, **options).train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert (weights[0] - torch.cat([p.detach().flatten() for p in model().parameters()])).abs().max() > 1e-3
    torch.testing.assert_close(*weights, atol=2e-5, rtol=0)


def test_every_epoch_has_its_own_masks_and_crops(tmp_path):
    data, seen = dataset(), []
    trainer = make(tmp_path, data=data, num_train_epochs=3, per_device_train_batch_size=16)
    collate = trainer.data_collator

    def spy(features):
        batch = collate(features)
        seen.append((data.epoch, batch["bool_masked_pos"].sum(0), batch["pixel_values"].sum()))
        return batch

    trainer.data_collator = spy
    trainer.train()
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]
    assert not torch.equal(seen[0][1], seen[1][1]) and seen[0][2] != seen[1][2]


def test_a_run_can_be_repeated_exactly(tmp_path):
    losses = [make(tmp_path, logging_steps=1, num_train_epochs=2).train().training_loss for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_speed_and_time_left(tmp_path, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    trainer = make(tmp_path, console=console, num_train_epochs=4, logging_steps=1)
    trainer.train()
    assert trainer.progress.images_per_second > 0 and trainer.progress.bar is None
    for words in ("loss", "images/s", "left", "8"):
        assert words in out.getvalue()
    assert "train_runtime" not in out.getvalue()


def test_progress_gives_the_terminal_back_after_an_error(tmp_path):
    trainer = make(tmp_path, console=Console(file=io.StringIO(), force_terminal=True))
    trainer.data_collator = lambda features: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.progress.bar is None


@pytest.mark.parametrize("ours", [True, False])
def test_model_and_collator_train_under_a_stock_trainer(tmp_path, ours):
    torch.manual_seed(0)
    network = model()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    pixels = [{"pixel_values": torch.randn(3, 16, 16), "name": "removed by Trainer"} for _ in range(32)]
    trainer = transformers.Trainer(
        model=network,
        args=transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=4, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True,
            logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        ),
        train_dataset=dataset(32) if ours else pixels,
        eval_dataset=dataset(8).without_augmentation() if ours else pixels,
        data_collator=MIMCollator(network.config, network.mask_grid(16, 16)),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 16 and np.mean(losses[-4:]) < np.mean(losses[:4])
    still = [name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])]
    assert not still
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(tmp_path / "saved"))
    loaded = MIMForPreTraining.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
