"""The command `pretrain`, whole: what it writes, what it refuses, and that it can be repeated and continued."""

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import VIT, tiny_config
from rich.console import Console
from transformers import AutoImageProcessor, AutoModel, set_seed

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.training.checkpoint import load_config, load_model
from hf_mim.training.commands import pretrain as commands
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.commands.reconstruct import reconstruct_file


ROOT = Path(__file__).parent.parent
TINY = [
    "model.image_size=16",
    *(f"model.encoder_config.{name}={value}" for name, value in VIT.items()),
    "model.encoder_config.intermediate_size=32",
    "model.decoder_config={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    "data.max_train_images=64",
    "data.max_eval_images=64",
    "training.num_train_epochs=2",
    "training.logging_steps=1",
    "training.bf16=false",
]
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "metrics.json"}
FILES |= {"reconstructions.png", "loss.png"}


def run(folder, *overrides, recipe="quick", base=TINY) -> str:
    """Runs into `folder` and returns what was printed."""
    out = io.StringIO()
    overrides = [*base, *overrides, f"training.output_dir={folder}"]
    assert pretrain(recipe, overrides, Console(file=out, width=250)) == Path(folder)
    return out.getvalue()


def weights(folder) -> dict[str, torch.Tensor]:
    return MIMForPreTraining.from_pretrained(folder).state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, run(folder)


def test_a_run_leaves_everything_in_its_folder(finished):
    folder, printed = finished
    assert {path.name for path in folder.iterdir()} >= FILES
    assert (folder / "checkpoint-2" / "optimizer.pt").is_file() and not (folder / "training_args.bin").exists()
    assert json.loads((folder / "checkpoint-2" / "preprocessor_config.json").read_text())
    for name in ("reconstructions.png", "loss.png"):
        assert min(PIL.Image.open(folder / name).size) > 300
    lines = printed.strip().splitlines()
    assert lines.index(f"output folder: {folder}") < 14 and f"output folder: {folder}" in lines[-4:]
    assert f"hf-mim pretrain {folder} model.init_from={folder}" in printed
    assert "k-NN, mean of the patches" in printed and "raw pixels" in printed


def test_metrics_say_what_was_measured_on_what(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    for column in ("trained", "untrained"):
        assert set(metrics[column]) == {"knn_mean", "linear_mean", "knn_cls", "linear_cls"}
        assert all(0 <= score <= 100 for score in metrics[column].values())
    assert set(metrics["raw_pixels"]) == {"knn", "linear"}
    assert metrics["trained"] != metrics["untrained"]
    assert metrics["num_train_images"] == 64 and metrics["evaluation"]["test_images"] == 64
    assert metrics["steps"] == 2 and metrics["seconds"] > 0 and metrics["images_per_second"] > 0
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["threads"] == torch.get_num_threads()


def test_the_checkpoint_loads_and_sees_what_was_trained_on(finished):
    model = AutoModel.from_pretrained(finished[0])
    assert isinstance(model, MIMModel)
    processor = AutoImageProcessor.from_pretrained(finished[0])
    image = PIL.Image.fromarray(np.arange(784).reshape(28, 28).astype(np.uint8))  # of the training images' size
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 16, 16)
    middle = np.array(image.resize((18, 18), PIL.Image.Resampling.BICUBIC))[1:17, 1:17]
    expected = (torch.from_numpy(middle).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixels[0, 0], expected, rtol=0, atol=1.01 / 127.5)
    assert model(pixels).pooler_output.shape == (1, 16)


def test_untrained_means_the_weights_that_training_started_from(tmp_path, monkeypatch):
    states = []

    def spy(model, *args, **kwargs):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"knn_mean": 0.0, "linear_mean": 0.0}

    started = commands.train

    def train(given):
        states.append({name: value.clone() for name, value in given.model.mim.state_dict().items()})
        return started(given)

    monkeypatch.setattr(commands.frozen, "evaluate_encoder", spy)
    monkeypatch.setattr(commands, "train", train)
    run(tmp_path / "run")
    initial, trained, untrained = states
    assert equal(initial, untrained) and not equal(initial, trained)


def test_a_saved_recipe_gives_the_same_weights_again(finished, tmp_path):
    folder, _ = finished
    header = (folder / "recipe.yaml").read_text().splitlines()[:2]
    assert header[1] == f"# hf-mim pretrain {folder / 'recipe.yaml'}"
    run(tmp_path / "again", recipe=str(folder / "recipe.yaml"), base=[])
    assert equal(weights(folder), weights(tmp_path / "again"))
    run(tmp_path / "other", "training.seed=7", recipe=str(folder), base=[])
    assert not equal(weights(folder), weights(tmp_path / "other"))


def test_crops_on_the_device_train_the_same_weights(tmp_path):
    words = ["data.crop_scale=[0.3, 1.0]", "training.watch_every=0", "data.max_eval_images=0"]
    for name in ("loader", "device"):
        run(tmp_path / name, *words, f"data.crop_on_device={str(name == 'device').lower()}")
    assert equal(weights(tmp_path / "loader"), weights(tmp_path / "device"))
    whole = tmp_path / "whole"
    run(whole, *words[1:])
    assert not equal(weights(whole), weights(tmp_path / "device"))


def test_init_from_of_a_runs_own_recipe_continues_with_all_weights(finished, tmp_path):
    folder, _ = finished
    options = [f"model.init_from={folder}", "model.masking_config.ratio=0.5", "data.max_eval_images=0"]
    options += ["training.num_train_epochs=1", "training.learning_rate=0.0"]
    run(tmp_path / "more", *options, base=[], recipe=str(folder))
    assert equal(weights(folder), weights(tmp_path / "more"))  # at a learning rate of zero
    config, before = load_config(str(tmp_path / "more")), load_config(str(folder))
    assert config.masking_config == {**before.masking_config, "ratio": 0.5}
    assert config.encoder_config == before.encoder_config and config.image_size == 16


def test_init_from_with_another_recipe_keeps_its_method(finished, tmp_path):
    folder, _ = finished
    options = [f"model.init_from={folder}", "model.image_size=16", "data.max_train_images=64"]
    options += ["data.max_eval_images=0", "training.num_train_epochs=1", "training.learning_rate=0.0"]
    printed = run(tmp_path / "more", *options, base=[], recipe="maskfeat_small")
    config, before = load_config(str(tmp_path / "more")), load_config(str(folder))
    assert (config.target, config.decoder) == ("hog", "linear") and config.masking_config == {"ratio": 0.6}
    assert config.encoder_config == {**before.encoder_config, "mask_style": "token"}
    ours, theirs = weights(tmp_path / "more"), weights(folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("mim."))
    assert f"start: {folder}, a checkpoint of this project, encoder 'vit', with a new decoder" in printed


def test_a_changed_part_of_a_checkpoint_starts_with_its_own_options(finished):
    config = load_config(str(finished[0]), {"decoder": "cross_attention", "target_config": {"loss": "l1"}})
    assert config.decoder_config == {}
    assert config.target_config == {"normalize": False, "hog_weight": 8.0, "loss": "l1"}


def test_what_is_no_checkpoint_is_said(finished, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="holds 'bert', and only a checkpoint of model type 'mim'"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint at nobody/nothing"):
        load_model("nobody/nothing")
    with pytest.raises(ValueError, match="weights and config do not fit"):
        load_model(str(finished[0]), {"encoder_config": {"hidden_size": 24}})


@pytest.mark.parametrize("trace", ["config.json", "recipe.yaml", "checkpoint-10"])
def test_a_folder_with_another_run_is_refused_untouched(tmp_path, trace):
    (tmp_path / trace).mkdir() if "checkpoint" in trace else (tmp_path / trace).write_text("mine")
    with pytest.raises(ValueError, match="holds another run"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [trace]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.dataset=./nowhere", "no file or folder"),
        ("model.encoder=vti", "did you mean 'vit'"),
        ("model.target=pixle", "did you mean 'pixel'"),
        ("model.masking=randm", "did you mean 'random'"),
        ("model.decoder=linaer", "did you mean 'linear'"),
        ("model.pooler=maen", "did you mean 'mean'"),
        ("model.encoder_config.hiden_size=3", "did you mean 'hidden_size'"),
        ("model.image_size=18", "not divisible"),
        ("model.masking_config.ratio=1.5", "ratio"),
        ("model.masking_config.ratio=0.99", "visible"),
        ("model.image_mean=[0.5, 0.5]", "image_mean has 2 values"),
        ("training.optim=adamm", "did you mean"),
        ("data.crop_scale=[2, 3]", "crop_scale"),
        ("training.per_device_train_batch_size=100", "drop_last"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, override, words):
    more = ["training.dataloader_drop_last=true"] if words == "drop_last" else []
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "run", *more, override)
    assert ("do not fill one batch" if more else words) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_are_not_evaluated(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    printed = run(tmp_path / "run", f"data.dataset={tmp_path / 'images'}")
    assert "Not evaluated: no labels" in printed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "trained" not in metrics and metrics["num_train_images"] == 20
    assert (tmp_path / "run" / "reconstructions.png").is_file()


def test_an_interrupt_saves_what_there_is(tmp_path, monkeypatch):
    step = commands.MIMTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(commands.MIMTrainer, "training_step", interrupted)
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        overrides = [*TINY, "training.warmup_steps=0", f"training.output_dir={tmp_path / 'run'}"]
        pretrain("quick", overrides, Console(file=out, width=200))
    assert "stopped at step 1 of 2" in out.getvalue()
    assert {path.name for path in (tmp_path / "run").iterdir()} >= FILES - {"metrics.json"}
    set_seed(42)
    initial = commands.make_model(commands.recipes.resolve("quick", TINY)["model"])[0].state_dict()
    saved = weights(tmp_path / "run")
    assert saved.keys() == initial.keys() and not equal(saved, initial)


def test_a_picture_is_made_of_an_image_of_any_size_and_mode(finished, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 31, 4), dtype=np.uint8)
    PIL.Image.fromarray(pixels, "RGBA").save(tmp_path / "mine.png")
    for name in ("a.png", "b.png"):
        reconstruct_file(str(finished[0]), tmp_path / "mine.png", tmp_path / "new" / name)
    a, b = ((tmp_path / "new" / name).read_bytes() for name in ("a.png", "b.png"))
    assert a == b
    assert PIL.Image.open(tmp_path / "new" / "a.png").size[0] > 4 * 112
    with pytest.raises(ValueError, match="there is no image"):
        reconstruct_file(str(finished[0]), tmp_path / "no.png", tmp_path / "c.png")
    with pytest.raises(ValueError, match="must end in"):
        reconstruct_file(str(finished[0]), tmp_path / "mine.png", tmp_path / "c.doc")


def test_a_checkpoint_with_normalised_patches_says_how_it_is_shown():
    model = MIMForPreTraining(tiny_config(target_config={"normalize": True}))
    assert model.reconstruct(torch.randn(1, 3, 16, 16)).note
