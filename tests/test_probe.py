"""Probing: heads against plain loops, cached against uncached, what the command writes, and what it refuses."""

import json
import math

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from helpers import NATIVE_VIT, RESNET, tiny_config
from transformers import ViTConfig, ViTModel

from hf_mim import MIMForPreTraining, MIMModel, cli
from hf_mim.modeling.options import pair
from hf_mim.training.commands.probe import choose_settings, probe
from hf_mim.training.commands.probe_setup import ProbeArguments, choose_poolers
from hf_mim.training.data.splits import hold_out
from hf_mim.training.evaluation import heads as heads_module
from hf_mim.training.evaluation import probe_scores, readouts
from hf_mim.training.evaluation.bootstrap import accuracy_interval
from hf_mim.training.evaluation.features import PoolerChoice
from hf_mim.training.evaluation.heads import Group, Schedule, learning_rate_factor, make_optimizer, train_heads


SCHEDULE = Schedule(epochs=4, patience=9, batch_size=16, optimizer="adamw", weight_decay=0.0)


class Tokens:
    """A source of given tokens (views, images, prefix + patches, dim)."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return self.tokens.shape[1]

    def fetch(self, view, positions):
        return {"tokens/2": self.tokens[view % len(self.tokens), positions]}


def tiny_model(**changes) -> MIMModel:
    torch.manual_seed(0)
    return MIMModel(tiny_config(**changes), add_pooling_layer=False).eval().requires_grad_(False)


def tokens_and_labels(count=90, views=1, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    tokens = torch.randn(views, count, 17, 16, generator=generator)
    return tokens + 0.4 * F.one_hot(labels, 16)[None, :, None], labels


def train(tokens, labels, names, rates, model=None, schedule=SCHEDULE, seed=0):
    model = model or tiny_model()
    of = {Group(PoolerChoice(name, name, {}), 2, model, False): rates for name in names}
    return train_heads(Tokens(tokens), labels, int(labels.max()) + 1, of, schedule, 0.2, seed)


# ---- heads ---------------------------------------------------------------------------------------------------------
def test_a_head_is_trained_as_by_a_plain_loop_in_float64():
    tokens, labels = tokens_and_labels(views=2)
    (one,) = train(tokens, labels, ["mean"], [0.01])
    train_at, held = hold_out(labels, 0.2, seed=0)
    weight, bias = torch.zeros(3, 16, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    torch.manual_seed(0)
    torch.nn.Linear(16, 3)  # what the head draws before its own normal numbers
    weight.copy_(torch.nn.init.normal_(torch.empty(3, 16), std=0.01))
    first = [torch.zeros_like(p) for p in (weight, bias)]
    second = [torch.zeros_like(p) for p in (weight, bias)]
    generator, mean, var, best, at = torch.Generator().manual_seed(0), torch.zeros(16), torch.ones(16), None, 0
    vectors = tokens[:, :, 1:].double().mean(dim=2)
    size = len(train_at) // 8
    steps = len(train_at) // size
    for epoch in range(4):
        order = train_at[torch.randperm(len(train_at), generator=generator)]
        for step in range(steps):
            chosen = order[step * size : (step + 1) * size]
            x = vectors[epoch % 2, chosen]
            mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
            error = (torch.softmax(x @ weight.T + bias, dim=1) - F.one_hot(labels[chosen], 3)) / size
            warmup, total, now = max(1, round(0.1 * 4 * steps)), 4 * steps, at
            falling = 0.5 * (1 + math.cos(math.pi * (now - warmup) / (total - warmup)))
            rate = 0.01 * ((now + 1) / warmup if now < warmup else falling)
            at += 1
            for i, (p, gradient) in enumerate(((weight, error.T @ x), (bias, error.sum(0)))):
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                p -= rate * first[i] / (1 - 0.9**at) / ((second[i] / (1 - 0.999**at)).sqrt() + 1e-8)
        logits = (vectors[0, held] - mean) / (var + 1e-6).sqrt() @ weight.T + bias
        found = (logits.argmax(1) == labels[held]).double().mean().item(), -F.cross_entropy(logits, labels[held]).item()
        if best is None or found > best[0]:
            best = found, weight.clone(), epoch + 1
    # float32 against float64, Adam's steps being of the size of the rate however small a gradient is.
    torch.testing.assert_close(one.head.classifier.weight.double(), best[1], rtol=1e-3, atol=1e-4)
    assert one.accuracy == pytest.approx(100 * best[0][0]) and one.epoch == best[2]
    assert one.loss == pytest.approx(-best[0][1], abs=1e-4)


def test_heads_trained_together_are_those_trained_alone():
    tokens, labels = tokens_and_labels()
    together = train(tokens, labels, ["mean", "max"], [0.003, 0.01])
    assert [one.setting for one in together] == [(n, 2, r) for n in ("mean", "max") for r in (0.003, 0.01)]
    for name in ("mean", "max"):
        alone = train(tokens, labels, [name], [0.003])[0]
        same = next(one for one in together if one.setting == alone.setting)
        # Their first weights are drawn one after the other, so only the first head's are the same.
        assert abs(same.accuracy - alone.accuracy) < 15
        if name == "mean":
            for key, value in alone.state.items():
                torch.testing.assert_close(same.state[key], value, rtol=0, atol=0)


def test_a_pooler_learns_where_to_look():
    torch.manual_seed(0)
    labels = torch.randint(3, (240,))
    tokens = torch.randn(1, 240, 17, 16)
    place = torch.randint(1, 17, (240,))  # one patch says the class, and a mark says which
    tokens[0, torch.arange(240), place] = 3.0 * F.one_hot(labels, 16).float() + 4.0 * (torch.arange(16) == 9)
    schedule = Schedule(30, 30, 32, "adamw", 0.0)
    found = {one.name: one for one in train(tokens, labels, ["mean", "abmilp"], [0.03], schedule=schedule)}
    weights = found["abmilp"].head.pooler(tokens[0], 1, (4, 4))[1]
    assert weights[torch.arange(240), place - 1].mean() > 0.5
    assert found["abmilp"].accuracy > 90 and found["abmilp"].parameters == 17 and found["mean"].parameters == 0


def test_heads_that_stop_improving_stop(monkeypatch):
    tokens, _ = tokens_and_labels()
    noise = torch.randint(3, (90,), generator=torch.Generator().manual_seed(5))
    epochs, steps = [], []
    step = heads_module.train_step
    monkeypatch.setattr(heads_module, "train_step", lambda *a: (steps.append(len(a[2])), step(*a)))
    validate = heads_module.validate
    monkeypatch.setattr(heads_module, "validate", lambda *a: (epochs.append(a[4]), validate(*a)))
    schedule, told = Schedule(200, 3, 16, "adamw", 0.0), []
    model = tiny_model()
    rates = {Group(PoolerChoice(name, name, {}), 2, model, False): [0.01] for name in ("mean", "cls")}
    trained = train_heads(Tokens(tokens), noise, 3, rates, schedule, 0.2, 0, told.append)
    assert epochs[-1] == max(one.epoch for one in trained) + 3 < 200 and sum(told) == pytest.approx(1)
    assert steps[0] == 2 and all(one.head.classifier.weight.equal(one.state["classifier.weight"]) for one in trained)


def test_learning_rates_rise_and_fall():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.5, abs=0.02) and 0 < factors[99] < 1e-3
    assert learning_rate_factor(0, 1) == 1


def test_lars_scales_matrices_and_leaves_biases_at_the_raw_rate():
    tokens, labels = tokens_and_labels()
    (one,) = train(tokens, labels, ["mean"], [0.1], schedule=Schedule(1, 1, 16, "adamw", 0.0))
    head = one.head.requires_grad_(True)
    schedule = Schedule(1, 1, 512, "lars", 0.0)
    optimizer = make_optimizer([one], schedule, 512)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    gradients = {name: torch.randn_like(p) for name, p in head.named_parameters()}
    for name, p in head.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    w, g = before["classifier.weight"], gradients["classifier.weight"]
    expected = w - 0.2 * (0.001 * w.norm() / g.norm()) * g  # 0.1 for a batch of 256, and this one is of 512
    torch.testing.assert_close(head.classifier.weight.detach(), expected, rtol=1e-4, atol=1e-7)
    expected = before["classifier.bias"] - 0.2 * gradients["classifier.bias"]
    torch.testing.assert_close(head.classifier.bias.detach(), expected)


def test_held_out_images_are_some_of_every_class():
    labels = torch.tensor([0] * 40 + [1] * 3 + [2])
    kept, held = hold_out(labels, 0.1, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(44))
    assert torch.bincount(labels[held], minlength=3).tolist() == [4, 1, 0]
    again, other = (hold_out(labels, 0.1, seed=seed)[1].tolist() for seed in (0, 1))
    assert again == held.tolist() != other
    with pytest.raises(ValueError, match="no class has two images"):
        hold_out(np.arange(5), 0.1, seed=0)


def test_settings_are_chosen_by_the_first_seed_and_repeated_by_the_others():
    tokens, labels = tokens_and_labels()
    trained = train(tokens, labels, ["mean"], [0.001, 0.01, 0.1]) + train(tokens, labels, ["mean"], [0.01], seed=1)
    for one, accuracy in zip(trained, [60, 70, 65, 40]):
        one.accuracy = accuracy
    (members,) = choose_settings(trained).values()
    assert [one.learning_rate for one in members] == [0.01, 0.01] and [one.seed for one in members] == [0, 1]


# ---- scores --------------------------------------------------------------------------------------------------------
def test_intervals_are_those_of_a_binomial_and_grow_with_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    right = torch.from_numpy(rng.random(2000) < 0.8)
    found = accuracy_interval(right)
    half = 196 * math.sqrt(0.8 * 0.2 / 2000)
    assert found["accuracy"] == pytest.approx(100 * right.double().mean().item())
    assert found["high"] - found["accuracy"] == pytest.approx(half, rel=0.1)
    assert found["accuracy"] - found["low"] == pytest.approx(half, rel=0.1)
    seeds = torch.from_numpy(rng.random((3, 2000)) < np.array([[0.7], [0.8], [0.9]]))
    wide = accuracy_interval(seeds)
    assert wide["high"] - wide["low"] > 3 * 2 * half / 2


def test_few_labels_are_drawn_from_every_class_or_not_at_all():
    labels = torch.tensor([0] * 30 + [1] * 6)
    for shots in (1, 5):
        chosen = probe_scores.draw(labels, shots, seed=0)
        assert torch.bincount(labels[chosen]).tolist() == [shots, shots] and len(chosen.unique()) == 2 * shots
    assert torch.bincount(labels[probe_scores.draw(labels, 0.1, seed=0)]).tolist() == [3, 1]
    assert probe_scores.draw(labels, 10, seed=0) is None  # a class has six
    assert probe_scores.draw(labels, 0.01, seed=0) is None  # of six images none
    assert probe_scores.draw(torch.tensor([0, 1]), 1, seed=0) is None  # that would be all of them


# ---- the command ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes, 24 images of each to learn from and 12 to test on: squares in noise, in different places."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for label, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                image[4 * label : 4 * label + 6, 2:14] += 100
                PIL.Image.fromarray(image).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    MIMForPreTraining(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def quick_scores(monkeypatch):
    """Fewer fits of the linear probe, which test_metrics.py tests."""
    monkeypatch.setattr(readouts, "PENALTIES", (0.1, 10.0))
    monkeypatch.setattr(probe_scores, "SHOTS", (1, 5))


def run(source, photos, folder, *options) -> dict:
    base = [f"data.dataset={photos}", f"probe.output_dir={folder}", f"probe.cache={folder.parent / 'cache'}"]
    probe(str(source), [*base, "probe.epochs=3", *options])
    return json.loads((folder / "probe.json").read_text())


@pytest.mark.usefixtures("quick_scores")
def test_the_command_writes_everything_and_reuses_what_it_encoded(photos, checkpoint, tmp_path, capsys):
    first = run(checkpoint, photos, tmp_path / "one", "probe.seeds=[0, 1]", "probe.layers=[-1, 1]")
    out = capsys.readouterr().out
    assert f"output folder: {tmp_path / 'one'}" in out and out.rstrip().endswith(str(tmp_path / "one"))
    assert set(first["poolers"]) == {"cls", "mean", "abmilp", "efficient"} and first["seeds"] == [0, 1]
    for column in (first, first["untrained"]):
        for entry in (*column["poolers"].values(), *column["knn"].values(), *column["linear"].values()):
            assert 0 <= entry["low"] <= entry["accuracy"] <= entry["high"] <= 100
        assert set(column["low_shot"]["mean"]) == {"1", "5", "10%"}
        assert len(column["settings"]) == 4 * 2 * 3 + 4  # the first seed tries everything
    assert first["poolers"]["abmilp"]["layer"] in (1, 2) and len(first["poolers"]["abmilp"]["seeds"]) == 2
    assert first["data"]["train_images"] == 72 and set(first["raw_pixels"]) == {"knn", "linear"}
    assert first["command"].startswith("hf-mim probe") and "arXiv" not in first["model"]
    for name, least in (("probe.png", 500), ("attention.png", 400)):
        picture = PIL.Image.open(tmp_path / "one" / name)
        assert min(picture.size) > least - 200 and len(picture.convert("L").getcolors()) > 20
    files = sorted((tmp_path / "cache").glob("*.rows"))
    assert len(files) == 2 * 2 * 2  # two encoders, two splits, two layers

    written = {path: path.stat().st_mtime_ns for path in files}
    options = ("probe.seeds=[0, 1]", "probe.layers=[-1, 1]", "probe.untrained=false")
    again = run(checkpoint, photos, tmp_path / "two", *options)
    assert "all of them are in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files} == written
    assert again["poolers"] == first["poolers"] and again["knn"] == first["knn"]
    assert again["settings"] == first["settings"] and "untrained" not in again


@pytest.mark.usefixtures("quick_scores")
def test_cached_and_uncached_agree(photos, checkpoint, tmp_path):
    options = ["probe.seeds=[0]", "probe.views=2", "probe.untrained=false", "probe.poolers=[mean, abmilp, gem]"]
    options += ["probe.learning_rates=[0.003]"]  # one: six validation images may choose another by a hair
    cached = run(checkpoint, photos, tmp_path / "cached", *options)
    uncached = run(checkpoint, photos, tmp_path / "uncached", *options, "probe.uncached=true")
    assert not list((tmp_path / "cache").glob("*uncached*")) and uncached["arguments"]["uncached"]
    for name, entry in cached["poolers"].items():
        # Tokens of eight bits against those of 24: of 36 test images at most two are classified differently.
        assert entry["accuracy"] == pytest.approx(uncached["poolers"][name]["accuracy"], abs=2 * 100 / 36 + 1e-6)
    for one, other in zip(cached["settings"], uncached["settings"]):
        assert one["learning_rate"] == other["learning_rate"]
        assert one["validation_accuracy"] == pytest.approx(other["validation_accuracy"], abs=100 / 6 + 1e-6)


@pytest.mark.usefixtures("quick_scores")
def test_models_of_transformers_without_a_class_token_and_pooled_vectors(photos, tmp_path, capsys):
    native = {name: value for name, value in NATIVE_VIT.items() if name != "model_type"}
    ViTModel(ViTConfig(image_size=16, **native)).save_pretrained(tmp_path / "vit")
    options = ["probe.seeds=[0]", "probe.untrained=false"]
    found = run(tmp_path / "vit", photos, tmp_path / "one", *options, "probe.poolers=[cls_attention, simpool]")
    assert set(found["poolers"]) == {"cls_attention", "simpool"} and set(found["knn"]) == {"mean", "cls"}
    config = tiny_config(encoder="convnet", encoder_config=RESNET, image_size=32, decoder="conv", decoder_config={})
    MIMModel(config).save_pretrained(tmp_path / "resnet")
    found = run(
        tmp_path / "resnet",
        photos,
        tmp_path / "two",
        *options,
        "probe.poolers=[max, central]",
        "probe.pooler_config.central.size=1",
    )
    assert set(found["poolers"]) == {"max", "central"} and set(found["knn"]) == {"mean"}
    assert "vectors of poolers without parameters" in capsys.readouterr().out
    sizes = {path.stat().st_size for path in (tmp_path / "cache").glob("resnet-train*.rows")}
    assert sizes == {72 * 20 * 4}  # float32 vectors, no tokens


@pytest.mark.usefixtures("quick_scores")
def test_a_disk_that_is_too_small(photos, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_mim.training.commands.probe.free_bytes", lambda folder: 40_000)
    found = run(checkpoint, photos, tmp_path / "one", "probe.untrained=false", "probe.seeds=[0]")
    assert set(found["poolers"]) == {"cls", "mean"} and "untrained" not in found
    out = " ".join(capsys.readouterr().out.split())
    assert "the tokens need 0.1 MB" in out and "only pooled vectors are kept" in out
    with pytest.raises(ValueError, match="the tokens need .* MB in .*fewer probe.layers or probe.views"):
        run(checkpoint, photos, tmp_path / "two", "probe.poolers=[mean, abmilp]")


@pytest.mark.usefixtures("quick_scores")
def test_ctrl_c_keeps_what_was_encoded(photos, checkpoint, tmp_path, capsys, monkeypatch):
    from hf_mim.training.evaluation import features

    monkeypatch.setattr(features, "BATCH", 16)
    encode, calls = features.Features.__call__, []

    def interrupted(self, pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, pixel_values)

    monkeypatch.setattr(features.Features, "__call__", interrupted)
    options = ("probe.seeds=[0]", "probe.untrained=false", "probe.poolers=[abmilp]")
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, photos, tmp_path / "one", *options)
    assert "the features so far stay in" in capsys.readouterr().out and not (tmp_path / "one" / "probe.json").exists()
    records = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*train*.json")]
    before = sum(record["done"] for record in records)
    assert 0 < before < 72
    calls[:] = [0] * 10
    run(checkpoint, photos, tmp_path / "two", *options)
    # One image of each split to see the shapes, the rest of the training images, all test images and the picture's.
    assert sum(calls[10:]) == 1 + 1 + (72 - before) + 36


def test_the_flag_uncached_is_the_setting(monkeypatch):
    called = []
    monkeypatch.setattr("hf_mim.training.commands.probe.probe", lambda *arguments: called.append(arguments))
    assert cli.main(["probe", "model", "probe.views=2", "--uncached"]) == cli.main(["probe", "model"]) == 0
    assert called == [("model", ["probe.views=2", "probe.uncached=true"]), ("model", [])]


# ---- bad input -----------------------------------------------------------------------------------------------------
def parquet(path, labels, **features):
    images = [PIL.Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(len(labels))]
    columns = {"image": datasets.Image(), "label": features.get("label", datasets.Value("int64"))}
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels}, features=datasets.Features(columns))
    dataset.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("labels", "feature", "options", "words"),
    [
        ([0.5 * i for i in range(30)], datasets.Value("float32"), [], "'label' holds float32 values such as"),
        ([0.5 * i for i in range(30)], datasets.Value("float32"), ["data.label_column=label"], "'label' holds float32"),
        ([0] * 30, None, [], "all 30 labelled images are of one class, '0'"),
        ([0, 1] * 15, datasets.ClassLabel(num_classes=99), [], "26 training images are fewer than the 99 classes"),
        ([-1, None] * 15, None, [], "here: no labels"),
        ([0, 1] * 5, None, [], "10 labelled images are too few to hold any out"),
        ([0, 1] * 15, None, ["probe.poolers=[abmlip]"], "did you mean 'abmilp'"),
        ([0, 1] * 15, None, ["probe.pooler_config.abmilp.dept=2"], "did you mean 'depth'"),
        ([0, 1] * 15, None, ["probe.poolers=[efficient]"], "num_queries 32 times d_out 1 does not divide"),
        ([0, 1] * 15, None, ["probe.layers=[9]"], "there is no layer 9"),
        ([0, 1] * 15, None, ["probe.layers=[]"], "probe.layers must hold one value or more"),
        ([0, 1] * 15, None, ["probe.optimizer=sgd"], "unknown probe.optimizer 'sgd'. Choices: adamw, lars"),
        ([0, 1] * 15, None, ["probe.views=0"], "probe.views must be at least 1"),
        ([0, 1] * 15, None, ["probe.learning_rates=[0.1, -1]"], "must be above 0"),
        ([0, 1] * 15, None, ["probe.epoch=3"], "did you mean 'epochs'"),
        ([0, 1] * 15, None, ["training.max_steps=3"], "unknown section"),
        ([0, 1] * 15, None, ["data.streaming=true"], "set data.streaming=false"),
        ([0, 1] * 15, None, ["probe.pooler_config.mean.apply_final_norm=false"], "set probe.apply_final_norm"),
        ([0, 1] * 15, None, ["probe.pooler_config.mean=3"], "probe.pooler_config.mean must be options"),
        ([0, 1] * 15, None, ["probe.pooler_config.my={pooler: [mean]}"], "my.pooler must be the name of a pooler"),
    ],
)
def test_bad_input_is_one_line(checkpoint, tmp_path, monkeypatch, capsys, labels, feature, options, words):
    monkeypatch.chdir(tmp_path)
    path = parquet(tmp_path / "images.parquet", labels, **({"label": feature} if feature else {}))
    capsys.readouterr()
    assert cli.main(["probe", str(checkpoint), f"data.dataset={path}", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    assert not list(tmp_path.glob("outputs/probe-*"))


def test_images_without_labels(checkpoint, tmp_path):
    for i in range(30):
        PIL.Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="of image files, put those of each class into a folder"):
        probe(str(checkpoint), [f"data.dataset={tmp_path}"])


def test_an_encoder_without_a_class_token_has_no_cls_pooler():
    model = tiny_model(encoder_config={"use_cls_token": False})
    with pytest.raises(ValueError, match="'cls' needs an encoder with a class token"):
        choose_poolers(ProbeArguments(poolers=["cls"]), model)
    assert [choice.name for choice in choose_poolers(ProbeArguments(), model)] == ["mean", "abmilp", "efficient"]


def test_poolers_under_names_of_ones_own_and_queries_that_fit_the_width():
    config = {"deep": {"pooler": "abmilp", "depth": 2}}
    choices = choose_poolers(ProbeArguments(pooler_config=config), tiny_model())
    assert [(choice.name, choice.kind) for choice in choices][-1] == ("deep", "abmilp")
    assert {choice.name: choice.options for choice in choices}["efficient"] == {"num_queries": 16}
    with pytest.raises(ValueError, match="options of 'deep', which is not among probe.poolers"):
        choose_poolers(ProbeArguments(poolers=["mean"], pooler_config=config), tiny_model())


def test_the_grid_of_a_group_is_that_of_the_image():
    group = Group(PoolerChoice("mean", "mean", {}), 2, tiny_model(image_size=(16, 24)), False)
    assert group.grid == (4, 6) and pair((16, 24)) == (16, 24)
