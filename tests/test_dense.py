"""The dense probe: labels of patches, linear and k-NN reading, and `probe` with `task=dense`."""

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import RESNET, tiny_config, write_pairs
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.cli import main
from hf_mim.training.commands.dense import asks_for_dense, constant, probe_dense
from hf_mim.training.data.masked import MaskedSplits
from hf_mim.training.data.masks import IGNORE
from hf_mim.training.evaluation.dense import (
    NEITHER,
    DenseProbeData,
    collect,
    fit_readouts,
    patch_labels,
    read_tokens,
)
from hf_mim.training.evaluation.features import Features
from hf_mim.training.evaluation.iou import pixel_counts
from hf_mim.training.evaluation.metrics import score_masks
from hf_mim.training.evaluation.readouts import TEMPERATURE


QUIET = Console(quiet=True)


# ---- patches -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(12, 20), (13, 17), (3, 5)])
def test_a_patch_has_the_class_of_most_labelled_pixels(size):
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(size) < 0.5, IGNORE, rng.integers(4, size=size))
    ids[: -(-size[0] // 3), : -(-size[1] // 5)] = IGNORE
    found = patch_labels(ids, (3, 5), 4).reshape(3, 5)
    for row in range(3):
        for col in range(5):
            votes = [0] * 4
            for y in range(size[0]):
                for x in range(size[1]):
                    inside = y * 3 // size[0] == row and x * 5 // size[1] == col
                    if inside and ids[y, x] != IGNORE:
                        votes[ids[y, x]] += 1
            assert found[row, col] == (votes.index(max(votes)) if any(votes) else NEITHER)
    assert found[0, 0] == NEITHER


def made_scenery(count=6, size=(8, 12), patches=10_000, **config):
    """Images whose left or right half is bright, which is class 1; the first row of patches has no class."""
    ids = np.zeros((2, *size), dtype=np.int64)
    ids[0, :, 6:], ids[1, :, :6] = 1, 1
    ids[:, :4] = IGNORE
    config = tiny_config(num_channels=1, **config)
    images = [(np.where(ids[i % 2] == 1, 200, 10 * i).astype(np.uint8)[None], ids[i % 2]) for i in range(count)]
    splits = MaskedSplits(images, images, images[:4], ["dark", "bright"], np.array([0.5, 0.5]), "made")
    return DenseProbeData(splits, config, size, (size[0] // 4, size[1] // 4), patches)


def test_labelled_patches_are_collected_with_their_tokens():
    torch.manual_seed(0)
    scenes = made_scenery()
    model = MIMModel(scenes.config, add_pooling_layer=False).eval()
    features = Features(model, [2], None)
    tokens, labels, images = collect(scenes, features, 2, lambda count: None)
    assert tokens.shape == (6 * 3, 16) and labels.tolist() == [0, 1, 1, 1, 1, 0] * 3 or len(labels) == 18
    assert images.tolist() == [i for i in range(6) for _ in range(3)]
    (pixel_values, masks), *_ = scenes.batches(scenes.train)
    with torch.no_grad():
        wanted = model(pixel_values).last_hidden_state[:, 1:].unflatten(1, (2, 3))[:, 1]
    assert torch.allclose(tokens, wanted.flatten(0, 1), atol=1e-6)
    few = made_scenery(patches=12)
    assert few.quota == 2 and len(collect(few, features, 2, lambda count: None)[1]) == 12


def test_raw_patches_are_their_pixels():
    pixel_values = torch.randn(2, 1, 8, 12)
    found = read_tokens(pixel_values, None, 0, (2, 3))
    assert torch.equal(found[1, 4], pixel_values[1, 0, 4:8, 4:8].flatten())
    assert read_tokens(torch.randn(1, 3, 9, 13), None, 0, (2, 3)).shape == (1, 6, 4 * 4 * 3)
    coarse = read_tokens(torch.arange(32.0 * 48).view(1, 1, 32, 48), None, 0, (2, 3))
    assert coarse.shape == (1, 6, 8 * 8) and coarse[0, 0, 0] == (0 + 1 + 48 + 49) / 4


# ---- reading them out ----------------------------------------------------------------------------------------------
def made_patches(count=600, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    tokens = np.eye(3, 8)[labels] * 2 + rng.normal(size=(count, 8)) * np.linspace(0.5, 2, 8) + 3
    return torch.from_numpy(tokens).float(), torch.from_numpy(labels), torch.arange(count) // 10


def test_the_readouts_of_patches_are_those_of_sklearn():
    tokens, labels, images = made_patches(seed=2)
    test, _, _ = made_patches(seed=1)
    readouts = fit_readouts(tokens, labels, images, 3)
    mean, std = tokens.mean(0), tokens.std(0, correction=0)
    fit = LogisticRegression(C=readouts["linear"].penalty, max_iter=2000, tol=1e-8)
    expected = fit.fit((tokens - mean) / std, labels).decision_function((test - mean) / std)
    logits = readouts["linear"](test)
    logits = (logits - logits.mean(1, keepdim=True)).numpy()
    assert np.abs(logits - expected + expected.mean(1, keepdims=True)).max() < 0.05
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.99
    vote = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    assert np.abs(readouts["knn"](test).numpy() - vote.fit(tokens, labels).predict_proba(test)).max() < 1e-4


def test_the_penalty_is_chosen_on_other_images():
    penalties = []
    for seed in range(5):  # what 40 patches say is itself random
        tokens, labels, images = made_patches(200, seed)
        noise = torch.randn(200, 300, generator=torch.Generator().manual_seed(seed))
        penalties.append(fit_readouts(torch.cat([tokens, noise], 1), labels, images, 3)["linear"].penalty)
    assert np.median(penalties) < 1  # with more noise than patches the strong ones are better
    whole = fit_readouts(tokens, labels, torch.zeros(200), 3)["linear"]
    assert whole.penalty == 1.0  # one image: none can be held out


def test_scores_of_a_constant():
    rng = np.random.default_rng(0)
    masks = rng.choice(3, p=[0.2, 0.7, 0.1], size=(4, 9, 9))
    counts = np.stack([pixel_counts(rng.integers(3, size=m.shape), m, 3) for m in masks])
    wanted = score_masks(np.stack([pixel_counts(np.ones_like(m), m, 3) for m in masks]))
    assert constant(counts, np.array([0.2, 0.7, 0.1])) == wanted


# ---- the command ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(1)  # not that of the untrained twin
    folder = tmp_path_factory.mktemp("model")
    MIMForPreTraining(tiny_config(image_size=28, num_channels=1)).save_pretrained(folder)
    return str(folder)


def test_probing_scenes_writes_table_numbers_and_picture(model, tmp_path, capsys):
    words = [f"probe.output_dir={tmp_path / 'out'}", "data.max_train_images=12", "data.max_eval_images=4"]
    assert main(["probe", model, "task=dense", *words]) == 0
    printed = capsys.readouterr().out
    assert "12 training and 4 test images at 56x56, 11 classes; patches 14x14" in " ".join(printed.split())
    found = json.loads((tmp_path / "out/dense.json").read_text())
    for column in ("trained", "untrained", "raw_pixels"):
        for reader in ("linear", "knn"):
            for of in ("pixels", "patches"):
                low, high = found[column][reader][of]["intervals"]["mean_iou"]
                assert 0 <= low <= high <= 100
    assert found["trained"]["linear"]["pixels"] != found["untrained"]["linear"]["pixels"]
    low, high = found["trained_minus_untrained"]["knn"]["pixels"]["pixel_accuracy"]
    difference = (found[c]["knn"]["pixels"]["pixel_accuracy"] for c in ("trained", "untrained"))
    assert low - 1 <= next(difference) - next(difference) <= high + 1
    with PIL.Image.open(tmp_path / "out/dense.png") as picture:
        assert picture.width > 5 * 128
    assert main(["probe", model, "task=dense", *words]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_convnet_on_photographs_of_several_sizes(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(image_size=64, encoder="convnet", encoder_config=RESNET, decoder="linear", decoder_config={})
    MIMForPreTraining(config).save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "data/images", tmp_path / "data/masks", 6)
    words = [f"data.dataset={tmp_path / 'data'}", "probe.image_size=[64, 96]", "probe.untrained=false"]
    folder = probe_dense(str(tmp_path / "model"), [*words, f"probe.output_dir={tmp_path / 'out'}"], QUIET)
    found = json.loads((folder / "dense.json").read_text())
    assert found["grid"] == [2, 3] and "untrained" not in found and found["test"] == "held out from train"


def test_an_encoder_that_sees_the_classes_reads_them(tmp_path):
    """Masks follow from the brightness of blocks of 8 pixels: raw pixels of 4 are enough, and so is an embedding."""
    torch.manual_seed(0)
    MIMForPreTraining(tiny_config(image_size=32, num_channels=1)).save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "images", tmp_path / "masks", 30, size=(32, 32), channels=1)
    words = [f"data.dataset={tmp_path}", "probe.layer=0", f"probe.output_dir={tmp_path}-out"]
    found = json.loads((probe_dense(str(tmp_path / "model"), words, QUIET) / "dense.json").read_text())
    for column in ("trained", "raw_pixels"):
        assert found[column]["linear"]["patches"]["mean_iou"] > 95
        assert found[column]["linear"]["pixels"]["mean_iou"] > 80


@pytest.mark.parametrize(
    "words, message",
    [
        (["task=dens"], "unknown probe.task 'dens': did you mean 'dense'?"),
        (["task=dense", "probe.poolers=[mean]"], "Unknown key probe.poolers"),
        (["task=dense", "probe.layer=5"], "there is no layer 5"),
        (["task=dense", "probe.image_size=30"], "30x30 is not divisible by the patch 4x4"),
        (["task=dense", "probe.patches=1"], "probe.patches must be at least 10"),
        (["task=dense", "probe.classes=4"], "but there are 4 classes: 0 to 3"),
        (["task=dense", "data.dataset=/nowhere/at/all"], "there is no file or folder /nowhere/at/all"),
        (["task=dense", "data.dataset=nowhere/"], "there is no file or folder nowhere/"),
    ],
)
def test_bad_input_is_one_line(words, message, model, tmp_path, capsys):
    few = ["data.max_train_images=8", "data.max_eval_images=4"]
    assert main(["probe", model, *few, *words, f"probe.output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(re.escape(message), error), error
    assert not (tmp_path / "out").exists()


def test_other_command_lines_are_not_dense():
    assert not asks_for_dense(["probe.poolers=[mean]", "data.dataset=task=dense"])
    assert asks_for_dense(["data.dataset=x", "probe.task=dense"])
