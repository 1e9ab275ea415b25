"""The model card: everything that is known, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from transformers import ResNetConfig

from hf_mim import cli
from hf_mim.hub.card import license_of, make_card
from hf_mim.hub.files import PICTURES, read_recipe, weight_files
from hf_mim.hub.push import stage, write_card
from hf_mim.modeling.modeling_upernet import MIMUperNet, MIMUperNetConfig
from hf_mim.training.common.errors import FolderError
from hf_mim.training.common.sharing import shareable
from hf_mim.training.trainer.pushing import published_files


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


PROBE = {
    "model": "/home/somebody/run",
    "command": "hf-mim probe /home/somebody/run",
    "protocol": {"poolers": "Each pooler is trained.", "low_shot": "Few labels.", "interval": "Intervals: 95 percent."},
    "data": {"dataset": "me/photos", "train_images": 900, "test_images": 300, "test": "split test"},
    "seeds": [0, 1],
    "poolers": {
        "mean": {"accuracy": 70.5, "low": 69.0, "high": 72.0, "layer": 4, "parameters": 0},
        "my <deep> one": {"accuracy": 71.04, "low": 70.0, "high": float("nan"), "layer": 3, "parameters": 1234},
        "broken": {"accuracy": None},
    },
    "knn": {"mean": {"accuracy": 61.0, "low": 60.0, "high": 62.0}},
    "untrained": {"poolers": {"mean": {"accuracy": 40.0, "low": 39.0, "high": 41.0}}},
    "seconds": 3.0,
}


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def full(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "probe.json").write_text(json.dumps(PROBE))
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
        "1,000 training images, 200 test images, split test",
        "k-NN: 20.",
        "| trained classifier behind `mean` | 70.5 (69.0-72.0) | 40.0 (39.0-41.0) | layer 4, 0 parameters |",
        "| trained classifier behind `my <deep> one` | 71.0 |  | layer 3, 1,234 parameters |",
        "| k-NN, mean of the patches | 61.0 (60.0-62.0) |  |  |",
        "(`me/photos`, 900 training images, 300 test images, split test, seeds 0, 1)",
        "- Each pooler is trained.",
        "- Intervals: 95 percent.",
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
    assert "broken" not in text and "class token |" not in text and "loss.png" not in text and "Few labels" not in text
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
    value["command"] = "hf-mim probe /home/me/run"
    found = shareable(value)
    assert "command" not in found
    assert "hub_token" not in found and found["use_cls_token"] is True
    assert found["a"] == "photos" and found["b"] == ["y.parquet", "photos", "me/photos"] and found["e"] == "x"
    assert found["text"] == "split a/b of it"
    (full / "recipe.yaml").write_text(RECIPE.replace("me/photos", str(tmp_path / "photos")))
    assert read_recipe(full)["data"]["dataset"] == "photos"
    assert "`photos`, a local data set" in make_card(full, "me/tiny").text


HOSTILE = "a` | <img src=//evil.example/x.png>\n\n# H ![p](//evil.example/p.png) [l](evil.example) "
HOSTILE += "https://evil.example www.evil.example me@evil.example \\[x](evil.example)"


def test_no_text_from_a_file_makes_markdown(full):
    """As the Hub renders it: by CommonMark with tables and bare links."""
    metrics = {key: HOSTILE if isinstance(value, str) else value for key, value in METRICS.items()}
    metrics |= {"versions": {HOSTILE: HOSTILE}, "seed": HOSTILE, "device_name": HOSTILE}
    metrics["evaluation"] = {**METRICS["evaluation"], "test": HOSTILE, "protocol": {"knn": HOSTILE}}
    probe = {**PROBE, "protocol": {"poolers": HOSTILE}, "seeds": [HOSTILE]}
    probe |= {"data": {"dataset": HOSTILE, "test": HOSTILE}, "poolers": {HOSTILE: PROBE["poolers"]["mean"]}}
    recipe = {"model": {"init_from": HOSTILE}, "data": {"dataset": HOSTILE}, "finetune": {"task": HOSTILE}}
    (full / "metrics.json").write_text(json.dumps(metrics))
    (full / "probe.json").write_text(json.dumps(probe))
    paper = HOSTILE.replace("\n", " ")
    (full / "recipe.yaml").write_text(f"# A run\n#\n# Paper: {paper}\n" + json.dumps(recipe))
    text = make_card(full, "me/tiny").text
    assert text.count("evil.example") > 50
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = [inner for token in parser.parse(text) for inner in (token, *(token.children or []))]
    pictures = [token.attrs["src"] for token in tokens if token.type == "image"]
    assert set(pictures) <= set(PICTURES) and pictures
    assert not [token for token in tokens if token.type in ("link_open", "html_block", "html_inline")]
    assert "H" not in [token.content for token in tokens if token.type == "inline"]
    # What the Hub makes links of by itself, outside of code.
    plain = " ".join(token.content for token in tokens if token.type == "text" and "evil" in token.content)
    source = re.sub(r"`[^`\n]*`", "", text)
    assert "evil.example" in plain and not re.search(r"https?://|www\.|\w@\w", source)


def test_a_repository_name_cannot_hold_code(full):
    with pytest.raises(ValueError):
        make_card(full, 'me/x")\nimport os #')


def test_the_weights_that_are_sent_are_counted(full):
    before = re.search(r"([\d.]+) M in all", make_card(full, "me/tiny").text)[1]
    shutil.copy(full / "model.safetensors", full / "model-00001-of-00001.safetensors")  # of an earlier run
    assert f"{before} M in all" in make_card(full, "me/tiny").text


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "README.md", "metrics.json", "recipe.yaml", "reconstructions.png"]
)
def test_links_out_of_the_folder_are_not_followed(name, full, tmp_path):
    (full / "README.md").write_text("# mine\n")
    (full / name).rename(tmp_path / "private")
    (full / name).symlink_to(tmp_path / "private")
    (tmp_path / "staged").mkdir()
    with pytest.raises(FolderError, match="symbolic link out of") as caught:
        weight_files(full)
        stage(full, "me/x", None, tmp_path / "staged")
    assert caught.value.folder == str(full)
    if name in ("model.safetensors", "config.json"):
        with pytest.raises(FolderError, match="symbolic link out of"):
            published_files(full)
    (full / name).unlink()
    (full / "kept").mkdir()
    (tmp_path / "private").rename(full / "kept" / "it")
    (full / name).symlink_to(full / "kept" / "it")  # inside it is the folder's own
    assert name == "model.safetensors" or name in stage(full, "me/x", None, tmp_path / "staged")


def test_a_commit_during_training_holds_no_paths(full):
    config = json.loads((full / "config.json").read_text())
    config |= {"target": "teacher_feature", "target_config": {"teacher": "/home/somebody/teachers/dino", "dims": [8]}}
    (full / "config.json").write_text(json.dumps(config))
    (full / "README.md").write_text("# mine\n")
    files = published_files(full)
    assert json.loads(files["config.json"])["target_config"]["teacher"] == "dino"
    assert set(files) == {"config.json", "model.safetensors"} | ({"preprocessor_config.json"} & set(files))


def test_the_command_writes_a_card(full, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    out = tmp_path / "card"
    assert cli.main(["card", str(full), "me/tiny", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"README.md", "reconstructions.png", "attention.png"}
    assert capsys.readouterr().out.strip() == str(out / "README.md")
    with pytest.raises(ValueError, match="no config.json"):
        write_card(tmp_path, "me/tiny", out)
    (out / "README.md").write_text("edited")
    assert cli.main(["card", str(full), "me/tiny", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err and (out / "README.md").read_text() == "edited"
    assert cli.main(["card", str(full), "me/tiny", "--out", str(out), "--force"]) == 0
    assert (out / "README.md").read_text() != "edited"


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_the_cards_of_released_models(path):
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.eval_results
    text = path.read_text()
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|Users)/", text)
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert picture in PICTURES and (path.parent / picture).is_file()


def test_the_teacher_of_a_wrapped_target_is_named():
    from hf_mim.hub.card import teachers_of

    assert teachers_of({"teacher": "me/dino"}) == ["me/dino"] == teachers_of({"features": {"teacher": "me/dino"}})
    assert teachers_of({"teachers": ["me/dino", {"teacher": "me/clip", "weight": 2}]}) == ["me/dino", "me/clip"]
    assert teachers_of({}) == []


@pytest.mark.parametrize(
    "said", ["license: apache-2.0", "license: other\nlicense_name: faircode", "tags: [x]", None, "a: ["]
)
def test_the_licence_of_a_teacher_is_that_of_its_own_card(said, folder, tmp_path):
    teacher = tmp_path / "teachers" / "dino"
    teacher.mkdir(parents=True)
    if said is not None:
        (teacher / "README.md").write_text(f"---\n{said}\n---\n# A model\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"target": "teacher_feature", "target_config": {"teacher": str(teacher), "dims": [8]}}
    (folder / "config.json").write_text(json.dumps(config))
    text = make_card(folder, "me/tiny").text
    licence = {"license: apache-2.0": "apache-2.0", "license: other\nlicense_name: faircode": "faircode"}.get(said)
    words = f"| teacher | dino, whose own card says: licence {licence} |" if licence else "| teacher | dino |"
    assert words in text and str(tmp_path) not in text


def test_a_teacher_on_the_hub_that_cannot_be_asked(folder):
    assert license_of("me/unheard-of-teacher") is None and license_of("not a/valid/id") is None


def test_the_card_of_a_fine_tuned_model(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MIMForImageClassification"], "id2label": {"0": "cat", "1": "dog"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text("model:\n  init_from: /home/me/run\ndata: {}\nfinetune:\n  layer_decay: 0.7\n")
    test = {"images": 300, "from": "split test", "accuracy": 68.0, "f1_macro": 63.92, "top5_accuracy": 99.3}
    (folder / "metrics.json").write_text(json.dumps({"test": test, "task": "classification", "seed": 42}))
    card = make_card(folder, "me/tiny")
    for words in (
        "AutoModelForImageClassification.from_pretrained",
        "gives `logits`",
        "with a classifier of 2 classes.",
        "| accuracy | 68.0 |\n| top-5 accuracy | 99.3 |\n| macro F1 | 63.9 |",
        "(300 images, split test)",
        "run by `hf-mim finetune run recipe.yaml`",
    ):
        assert words in card.text, words
    assert card.data.pipeline_tag == "image-classification"
    found = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert found["accuracy in percent"] == ("accuracy", 68.0) and found["macro F1 in percent"] == ("f1", 63.92)
    assert "last_hidden_state" not in card.text and "No accuracy" not in card.text


def test_the_card_of_a_segmentation_model(tmp_path):
    torch.manual_seed(0)
    backbone = tiny_config(out_features=["stem", "stage1", "stage2"])
    config = MIMUperNetConfig(backbone_config=backbone, hidden_size=8, use_auxiliary_head=False, num_labels=3)
    MIMUperNet(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 24, "width": 32}}))
    metrics = {"task": "segmentation", "mean_iou": 41.2, "pixel_accuracy": 80.0, "seed": 1}
    metrics |= {"intervals": {"mean_iou": [40.0, 42.4]}, "evaluation": {"test_images": 20, "test": "split test"}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "recipe.yaml").write_text("data:\n  dataset: me/scenes\nfinetune:\n  task: segmentation\n")
    card = make_card(tmp_path, "me/scenes-model")
    for words in (
        "AutoModelForSemanticSegmentation.from_pretrained",
        "images of 24x32 pixels and 3 channels, with UperNet for the segmentation of 3 classes.",
        "| mean IoU | 41.2 (40.0-42.4) |\n| pixel accuracy | 80.0 |",
        "(20 test images, split test)",
        "run by `hf-mim finetune CHECKPOINT recipe.yaml`",
        "| encoder |",
    ):
        assert words in card.text, words
    assert (
        "| masking |" not in card.text and "0.00 M" not in card.text and card.data.pipeline_tag == "image-segmentation"
    )
    assert [(r.task_type, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("image-segmentation", "mean_iou", 41.2),
        ("image-segmentation", "accuracy", 80.0),
    ]
    staged = tmp_path / "staged"
    staged.mkdir()
    files = stage(tmp_path, "me/scenes-model", None, staged)
    saved = json.loads(files["config.json"].read_text())
    assert saved["model_type"] == "upernet" and saved["architectures"] == ["MIMUperNet"]
    assert {"modeling_upernet.py", "modeling_mim.py", "poolers.py"} <= set(files)
    saved["backbone_config"] = ResNetConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="an UperNet over 'resnet'"):
        make_card(tmp_path, "me/scenes-model")
