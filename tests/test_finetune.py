"""The command `finetune`, whole: what it writes, that it can be stopped and continued, and what it refuses."""

import copy
import io
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import NATIVE_VIT, RESNET, tiny_config
from peft import PeftModel
from rich.console import Console
from test_ddp import launch
from test_pretrain import equal
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTModel

from hf_mim import MIMForImageClassification, MIMForPreTraining
from hf_mim.hub.push import write_card
from hf_mim.training.commands import classification
from hf_mim.training.commands import finetune_run as commands
from hf_mim.training.commands.finetune import finetune
from hf_mim.training.evaluation.metrics import score_classes
from hf_mim.training.trainer.finetune_trainer import FinetuneTrainer
from hf_mim.training.trainer.saving import last_checkpoint


TINY = [
    "data.max_train_images=53",  # 5 are held out: 48 in 3 batches
    "data.max_eval_images=40",
    "training.num_train_epochs=2",
    "training.per_device_train_batch_size=16",
    "training.learning_rate=1e-2",
    "training.logging_steps=1",
    "training.bf16=false",
]
ALL = ["finetune.mixup=0.8", "finetune.cutmix=1", "finetune.randaugment=9", "finetune.random_erasing=0.5"]
ALL += ["finetune.ema=0.8", "finetune.class_weights=balanced", "finetune.drop_path=0.3"]
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "metrics.json"}
FILES |= {"confusion.png", "loss.png"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A pretrained checkpoint."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    torch.manual_seed(0)
    MIMForPreTraining(tiny_config(num_channels=1)).save_pretrained(folder)
    return folder


def run(source, folder, *overrides, name=None, base=TINY) -> str:
    """Runs into `folder` and returns what was printed."""
    out = io.StringIO()
    overrides = [*base, *overrides, *([f"training.output_dir={folder}"] if folder else [])]
    finetune(str(source), name, overrides, Console(file=out, width=250))
    return out.getvalue()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without pictures, which the fixture `finished` and its tests have, a run takes half the time."""
    monkeypatch.setattr(commands.charts, "draw_loss", lambda *_: None)
    monkeypatch.setattr(classification, "draw_confusion", lambda *_: None)


def images(folder: Path, classes: dict[str, int], base: dict | None = None) -> Path:
    """A folder of grey images, one folder for each class."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (16, 16), dtype=np.uint8) + np.uint8((base or {}).get(name, 0))
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def spy_trainers(monkeypatch) -> list[FinetuneTrainer]:
    made, init = [], FinetuneTrainer.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(FinetuneTrainer, "__init__", remember)
    return made


def logged_losses(folder: Path) -> list[float]:
    state = json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(folder) -> dict[str, torch.Tensor]:
    return MIMForImageClassification.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> tuple[Path, str, FinetuneTrainer]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        made = spy_trainers(patch)
        return folder, run(source, folder), made[0]


def test_a_run_leaves_everything_in_its_folder(finished, source):
    folder, printed, _ = finished
    assert {path.name for path in folder.iterdir()} >= FILES and not (folder / "training_args.bin").exists()
    for name in ("confusion.png", "loss.png"):
        assert min(PIL.Image.open(folder / name).size) > 300
    for words in (f"output folder: {folder}", "43 training images", "10 validation images (held out from train)"):
        assert words in printed
    assert "40 test images (split test)" in printed and "step 3 of 6, validation: loss" in printed
    assert f"# hf-mim finetune {source} {folder / 'recipe.yaml'}\n" in (folder / "recipe.yaml").read_text()


def test_metrics_say_what_was_measured_on_what(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert metrics["validation"]["from"] == "held out from train" and metrics["validation"]["images"] == 10
    assert metrics["test"]["from"] == "split test" and metrics["test"]["images"] == 40
    matrix = np.array(metrics["test"]["confusion"])
    assert matrix.shape == (10, 10) and matrix.sum() == 40
    assert metrics["test"]["accuracy"] == pytest.approx(100 * matrix.diagonal().sum() / 40)
    assert set(metrics["test"]) == {"from", "images", "accuracy", "top5_accuracy", "f1_macro", "loss", "confusion"}
    assert metrics["classes"][0] == "T-shirt/top" and metrics["steps"] == 6 and metrics["best_step"] in (3, 6)


def test_the_output_loads_as_a_classifier_with_the_same_logits(finished):
    folder, _, trainer = finished
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, MIMForImageClassification)
    assert model.config.id2label[9] == "Ankle boot" and model.config.label2id["Ankle boot"] == 9
    image = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert equal(model.state_dict(), trainer.model.state_dict())
    # A copy: weights that lie in memory as the file has them, at other addresses, may take another kernel.
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).eval()(pixels).logits, trainer.model.eval()(pixels).logits)
        torch.testing.assert_close(model.eval()(pixels).logits, trainer.model(pixels).logits, rtol=1e-6, atol=1e-7)


def test_the_metrics_are_those_of_the_saved_model(finished):
    folder, _, trainer = finished
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    test = trainer.eval_dataset
    batch = trainer.data_collator(test.__getitems__(list(range(len(test)))))
    with torch.no_grad():
        logits = model(batch["pixel_values"]).logits.numpy()
    found = score_classes(logits, batch["labels"].numpy())
    metrics = json.loads((folder / "metrics.json").read_text())["validation"]
    assert {name: metrics[name] for name in found} == pytest.approx(found, abs=1e-3)


def test_a_card_can_be_written(finished, tmp_path):
    text = write_card(finished[0], "me/classifier", tmp_path / "card", None).read_text()
    assert "image-classification" in text and "with a classifier of 10 classes" in text
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert f"{metrics['test']['accuracy']:.1f}" in text and "hf-mim finetune" in text
    assert (tmp_path / "card" / "confusion.png").is_file()


def test_the_best_checkpoint_is_kept(source, tmp_path, monkeypatch):
    accuracies, states = [30.0, 50.0, 40.0, 10.0], []

    def score(logits, labels):
        return {"accuracy": accuracies[min(len(states), 4) - 1] if states else 0.0, "f1_macro": 0.0}

    evaluate = FinetuneTrainer.evaluate

    def spy(self, *args, **kwargs):
        with self.averaged():
            states.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(classification, "score_classes", score)
    monkeypatch.setattr(FinetuneTrainer, "evaluate", spy)
    for options in ([], ["finetune.ema=0.5"]):
        states.clear()
        folder = tmp_path / f"run{len(options)}"
        run(source, folder, "training.num_train_epochs=4", *options)
        assert len(states) == 4 and equal(weights(folder), states[1])
        assert json.loads((folder / "metrics.json").read_text())["best_step"] == 6
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]


LORA = ["finetune.lora=true", "finetune.lora_dropout=0.2", "training.save_strategy=steps", "training.save_steps=2"]


@pytest.mark.parametrize("options", [ALL, [*ALL, *LORA, "training.gradient_accumulation_steps=2"]])
def test_a_resumed_run_is_the_run_without_a_break(source, tmp_path, monkeypatch, options):
    run(source, tmp_path / "whole", *options)
    step, stop = FinetuneTrainer.training_step, 3 if "finetune.lora=true" in options else 4  # in the middle of an epoch

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "broken", *options)
    assert last_checkpoint(tmp_path / "broken").name == f"checkpoint-{stop}"
    assert (tmp_path / "broken" / "model.safetensors").is_file() and not (tmp_path / "broken" / "metrics.json").exists()
    torch.manual_seed(7)  # as another process would
    printed = run(tmp_path / "broken", None, "training.resume=true", base=[])
    assert "resuming from" in printed and "other settings" not in printed
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "broken")]
    for key in ("validation", "test", "best_step", "final_loss"):
        assert results[0][key] == results[1][key]
    history = [
        json.loads((last_checkpoint(tmp_path / name) / "trainer_state.json").read_text())["log_history"]
        for name in ("whole", "broken")
    ]
    evaluated = [[(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry] for log in history]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 2


def test_a_saved_recipe_gives_the_same_weights_again(finished, source, tmp_path):
    run(source, tmp_path / "again", name=str(finished[0]), base=[])
    assert equal(weights(finished[0]), weights(tmp_path / "again"))


def test_bf16_is_float32_within_noise(finished, source, tmp_path):
    run(source, tmp_path / "run", "training.bf16=true")
    losses = [json.loads((folder / "metrics.json").read_text()) for folder in (finished[0], tmp_path / "run")]
    # Products of 8 bits: the loss of six steps differs in the third digit.
    assert losses[0]["final_loss"] == pytest.approx(losses[1]["final_loss"], rel=2e-2)
    assert losses[0]["test"]["loss"] == pytest.approx(losses[1]["test"]["loss"], rel=2e-2)
    assert losses[0]["final_loss"] != losses[1]["final_loss"] and losses[1]["precision"] == "bf16"


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(source, tmp_path):
    # Without drop path: what it drops follows from the random state of each process.
    # 58 images, of which one of each class is held out: 48 in whole batches of 16, as two processes fill up others.
    words = [*ALL[:-1], "finetune.drop_path=0", "data.max_train_images=58"]
    run(source, tmp_path / "one", *words)
    batch = "training.per_device_train_batch_size=8"
    command = ("-m", "hf_mim", "finetune", str(source))
    printed, _ = launch(tmp_path / "two", *TINY, *words, batch, command=command)
    assert printed.count("total batch 16") == 1 and printed.count("output folder") == 2  # only one process prints
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and np.sum(two["test"]["confusion"]) == 40 and one["best_step"] == two["best_step"]
    losses = [logged_losses(tmp_path / name) for name in ("one", "two")]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # Adam turns gradients that are zero but for the order of a sum into small steps, which a loss hardly shows.
    assert one["test"]["loss"] == pytest.approx(two["test"]["loss"], rel=1e-3)


# ---- what is trained -----------------------------------------------------------------------------------------------
def test_lora_trains_additions_pooler_and_head(source, tmp_path, monkeypatch):
    before, made = [], spy_trainers(monkeypatch)
    train = commands.FinetuneRun.train

    def spy(run, trainer, save):
        before.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        train(run, trainer, save)

    monkeypatch.setattr(commands.FinetuneRun, "train", spy)
    folder = tmp_path / "run"
    printed = run(source, folder, "finetune.lora=true", "model.pooler=abmilp")
    assert f"the adapter alone: {folder}/adapter" in printed
    model = made[0].model
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[0][name])}
    parts = ("lora_A", "lora_B", "pooler.modules_to_save.default.", "classifier.modules_to_save.default.")
    assert changed and all(any(part in name for part in parts) for name in changed)
    for part in parts:
        assert any(part in name for name in changed)
    # Every linear layer of both blocks has its addition, and nothing else.
    assert sum("lora_B" in name for name in changed) == 8

    pixels = torch.randn(3, 1, 16, 16)
    base = MIMForImageClassification.from_pretrained(source, num_labels=10, pooler="abmilp")
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    merged = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        own = model.eval()(pixels).logits
        torch.testing.assert_close(adapted(pixels).logits, own, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(merged(pixels).logits, own, rtol=1e-4, atol=1e-5)  # W + BA is rounded
        base = MIMForImageClassification.from_pretrained(source, num_labels=10, pooler="abmilp").eval()
        assert (merged.mim(pixels).last_hidden_state - base.mim(pixels).last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", ["vit", "convnet"])
def test_a_frozen_encoder_stays_as_it_is(tmp_path, encoder):
    changes = {"encoder": "convnet", "encoder_config": RESNET, "image_size": 32} if encoder == "convnet" else {}
    pretrained = MIMForPreTraining(tiny_config(num_channels=1, **changes))
    for name, buffer in pretrained.named_buffers():
        if "running_mean" in name:  # of a trained network
            buffer.normal_()
    pretrained.save_pretrained(tmp_path / "model")
    printed = run(tmp_path / "model", tmp_path / "run", "finetune.freeze=true", "finetune.drop_path=0")
    assert "fine-tuning: pooler and head" in printed
    before, after = pretrained.mim.encoder.state_dict(), weights(tmp_path / "run")
    shared = {name for name in before if f"mim.encoder.{name}" in after}
    assert len(shared) > 10 and all(torch.equal(before[name], after[f"mim.encoder.{name}"]) for name in shared)
    assert after["classifier.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("options", [[], ["finetune.from_scratch=true"]])
def test_a_model_of_transformers_is_wrapped(tmp_path, options):
    torch.manual_seed(0)
    native = {name: value for name, value in NATIVE_VIT.items() if name != "model_type"}
    network = ViTModel(ViTConfig(image_size=16, **native))
    network.save_pretrained(tmp_path / "vit")
    printed = run(tmp_path / "vit", tmp_path / "run", "training.max_steps=1", "training.learning_rate=0", *options)
    assert "this encoder has no drop path: finetune.drop_path is left out" in printed
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network.eval()(pixels).last_hidden_state
        same = torch.allclose(model.mim(pixels).last_hidden_state, expected, atol=1e-5)
    assert same is not bool(options)


def test_the_pooler_of_a_checkpoint_is_kept_and_its_head_for_the_same_classes(source, tmp_path):
    run(source, tmp_path / "first", "model.pooler=abmilp")
    first = weights(tmp_path / "first")
    still = ["training.max_steps=1", "training.learning_rate=0"]
    run(tmp_path / "first", tmp_path / "second", *still)
    assert equal(first, weights(tmp_path / "second"))
    folder = images(tmp_path / "data", {"cats": 12, "dogs": 12})
    run(tmp_path / "first", tmp_path / "third", f"data.dataset={folder}", *still)
    third = weights(tmp_path / "third")
    assert third["classifier.weight"].shape == (2, 16)
    assert all(torch.equal(first[name], third[name]) for name in first if not name.startswith("classifier."))
    run(tmp_path / "first", tmp_path / "fourth", "model.pooler=mean", *still)
    assert not any("pooler" in name for name in weights(tmp_path / "fourth"))


def test_a_data_set_with_a_validation_split_holds_nothing_out(source, tmp_path):
    for split, count in (("train", 12), ("test", 4), ("val", 3)):
        images(tmp_path / "data" / split, {"cats": count, "dogs": count})
    run(source, tmp_path / "run", f"data.dataset={tmp_path / 'data'}")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["num_train_images"] == 24 and "top5_accuracy" not in metrics["test"]
    assert (metrics["validation"]["from"], metrics["validation"]["images"]) == ("split val", 6)
    assert (metrics["test"]["from"], metrics["test"]["images"]) == ("split test", 8)


def test_what_was_learned_generalises(source, tmp_path):
    """Bright against dark images: a few steps tell them apart."""
    folder = images(tmp_path / "data", {"bright": 40, "dark": 40}, base={"bright": 160, "dark": 20})
    run(source, tmp_path / "run", f"data.dataset={folder}", "training.num_train_epochs=5", "data.max_train_images=80")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["accuracy"] == 100


def test_a_new_head_starts_with_equal_predictions(source, tmp_path):
    run(source, tmp_path / "run", "training.max_steps=1", "training.learning_rate=0", "finetune.label_smoothing=0")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["final_loss"] == pytest.approx(
        math.log(10), rel=1e-3
    )
