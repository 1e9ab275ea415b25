"""The model card: everything that is known, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_mim import cli
from hf_mim.card import PICTURES, make_card, read_recipe, shareable
from hf_mim.hub import write_card


ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = Path(__file__).parent / "fixtures" / "checkpoint_v1"
RECIPE = """# The resolved recipe of this run. To run it again:
# hf-mim pretrain /home/somebody/outputs/recipe.yaml
#
# Paper: arXiv:2111.06377 (He et al., Masked Autoencoders, CVPR 2022)
model:
  image_size: 16
  init_from: facebook/vit-mae-base
data:
  dataset: me/photos
training:
  num_train_epochs: 3
  hub_token: hf_secret
"""
METRICS = {
    "trained": {"knn_mean": 61.25, "linear_mean": 70.0, "knn_cls": float("nan")},
    "untrained": {"knn_mean": 40.0, "linear_mean": 50.5},
    "raw_pixels": {"knn": 65.0, "linear": 60.0},
    "evaluation": {"train_images": 1000, "test_images": 200, "test": "split test", "protocol": {"knn": "k-NN: 20."}},
    "final_loss": 0.5,
    "steps": 1234,
    "seconds": 90.0,
    "num_train_images": 5000,
    "seed": 7,
    "device": "cuda",
    "precision": "bf16",
    "versions": {"torch": "2.15.0"},
}


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def full(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "probe.json").write_text(json.dumps({"mean": 70.5, "gem": 71.0, "note": "text", "unheard": 1.0}))
    for name in ("reconstructions.png", "attention.png"):
        Image.new("L", (4, 4)).save(folder / name)
    return folder


def test_a_full_card(full):
    card = make_card(full, "me/tiny", license="mit")
    data, text = card.data, card.text
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-feature-extraction", "mit")
    assert data.base_model == "facebook/vit-mae-base" and data.datasets == ["me/photos"]
    assert {"masked-image-modeling", "vit"} <= set(data.tags)
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert sorted(results.values()) == [61.25, 70.0] and all("percent" in name for name in results)
    assert {result.dataset_type for result in data.eval_results} == {"me/photos"}
    for words in (
        "| k-NN, mean of the patches | 61.2 | 40.0 | 65.0 |",
        "1,000 images to learn from, 200 to test on, split test",
        "k-NN: 20.",
        "| gem | 71.0 |",
        "3 epochs, 1,234 steps, 1.5 minutes",
        "pretrained without labels by predicting what was hidden from it, on 5,000 images of `me/photos`.",
        "| seed | 7 |",
        "| hardware | cuda, bf16 |",
        "torch 2.15.0",
        "(reconstructions.png)",
        "(attention.png)",
        "no better than raw pixels (61.2 against 65.0)",
        "arXiv:2111.06377 (He et al., Masked Autoencoders, CVPR 2022)",
        'AutoModel.from_pretrained("me/tiny", trust_remote_code=True)',
    ):
        assert words in text, words
    assert "unheard" not in text and "class token |" not in text and "loss.png" not in text
    assert "hf_secret" not in str(card) and "/home" not in str(card)
    assert str(ModelCard(str(card)).data.to_dict()) == str(data.to_dict())  # the metadata is YAML that reads back


def test_what_is_not_known_is_absent(folder):
    card = make_card(folder, "me/tiny")
    metadata = card.data.to_dict()
    assert set(metadata) == {"library_name", "pipeline_tag", "tags"}
    for word in (
        "## Results",
        "| seed",
        "| data |",
        "| budget",
        "| hardware",
        "None",
        "nan",
        "{{",
        "license",
        "![",
        "()",
    ):
        assert word not in card.text, word
    assert "No accuracy was measured in this run." in card.text and "trained without labels" not in card.text


def test_the_shipped_data_are_called_a_subset(full):
    (full / "recipe.yaml").write_text("data:\n  horizontal_flip: true\n")
    card = make_card(full, "me/tiny")
    assert card.data.datasets is None and card.data.base_model is None
    assert "not comparable with published figures for Fashion-MNIST" in card.text


def test_what_leaves_this_machine_holds_no_paths_and_no_tokens(full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "photos").mkdir(parents=True)
    value = {"a": "/home/me/photos", "b": ["~/x/y.parquet", "my/photos", "me/photos"], "hub_token": "hf_secret"}
    value |= {"use_cls_token": True, "text": "split a/b of it", "d": "C:\\Users\\me", "e": "../up/x"}
    found = shareable(value)
    assert "hub_token" not in found and found["use_cls_token"] is True
    assert found["a"] == "photos" and found["b"] == ["y.parquet", "photos", "me/photos"] and found["e"] == "x"
    assert found["text"] == "split a/b of it"
    (full / "recipe.yaml").write_text(RECIPE.replace("me/photos", str(tmp_path / "photos")))
    assert read_recipe(full)["data"]["dataset"] == "photos"
    assert "`photos`, a local data set" in make_card(full, "me/tiny").text


def test_a_name_cannot_break_out_of_its_table(full):
    metrics = {**METRICS, "device": "cpu | <script>\n\n# Injected"}
    (full / "metrics.json").write_text(json.dumps(metrics))
    text = make_card(full, "me/tiny").text
    assert "<script>" not in text and "\n# Injected" not in text


def test_the_command_writes_a_card(full, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    out = tmp_path / "card"
    assert cli.main(["card", str(full), "me/tiny", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"README.md", "reconstructions.png", "attention.png"}
    assert capsys.readouterr().out.strip() == str(out / "README.md")
    with pytest.raises(ValueError, match="no config.json"):
        write_card(tmp_path, "me/tiny", out)


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_the_cards_of_released_models(path):
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.eval_results
    text = path.read_text()
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|Users)/", text)
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert picture in PICTURES and (path.parent / picture).is_file()


def test_the_teacher_of_a_wrapped_target_is_named():
    from hf_mim.card import teacher_of

    assert teacher_of({"teacher": "me/dino"}) == "me/dino" == teacher_of({"features": {"teacher": "me/dino"}})
    assert teacher_of({}) is None
