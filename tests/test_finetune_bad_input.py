"""What the command `finetune` refuses, in one line and before it writes anything."""

from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import RESNET, tiny_config
from test_finetune import TINY, images, run

from hf_mim import MIMForPreTraining
from hf_mim.training.commands.pretrain import pretrain


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A pretrained checkpoint."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    torch.manual_seed(0)
    MIMForPreTraining(tiny_config(num_channels=1)).save_pretrained(folder)
    return folder


def table(folder: Path, labels: list, feature=None, split="train") -> Path:
    """A parquet file of images with a column `label`."""
    rows = [PIL.Image.fromarray(np.full((16, 16), i % 256, np.uint8)) for i in range(len(labels))]
    features = {"image": datasets.Image(), **({"label": feature} if feature else {})}
    made = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=datasets.Features(features))
    folder.mkdir(exist_ok=True)
    made.to_parquet(folder / f"{split}.parquet")
    return folder


INT, FLOAT, TEXT = (datasets.Value(kind) for kind in ("int64", "float32", "string"))
NAMES = datasets.ClassLabel(names=[f"class {i}" for i in range(50)])
REFUSED = {
    "no labels": (lambda f: images(f, {"a": 30}), [], "one folder for each of at least two classes"),
    "floats": (lambda f: table(f, [0.5] * 30, FLOAT), [], "column 'label' holds float32 values.*whole number or text"),
    "floats, named": (lambda f: table(f, [0.5] * 30, FLOAT), ["data.label_column=label"], "float32 values"),
    "lists": (lambda f: table(f, [[1, 2]] * 30, datasets.List(INT)), [], "several values an image"),
    "all missing": (lambda f: table(f, ["", "-1", None] * 10, TEXT), [], "no training image has a label"),
    "one class": (lambda f: table(f, ["a"] * 30, TEXT), [], "all 30 labelled training images are of one class, 'a'"),
    "few images": (lambda f: table(f, [i % 7 for i in range(40)], NAMES), [], "40 training images for 50 classes"),
    "all different": (lambda f: table(f, list(range(30)), INT), [], "none can be held out: no class has two images"),
    "unseen class": (
        lambda f: table(table(f, ["a", "b"] * 9, TEXT), ["a", "c", "d"], TEXT, "test"),
        [],
        "class 'c' is in the split test but not in the training images, and 1 more",
    ),
    "unseen name": (
        lambda f: table(table(f, [0, 1] * 30, NAMES), [0, 2], NAMES, "test"),
        [],
        "class 'class 2' is in the split test but not",
    ),
    "class weights": (None, ["finetune.class_weights=[1, 2]"], "2 numbers for 10 classes: T-shirt/top"),
    "negative": (None, ["finetune.class_weights=[1,1,1,1,1,1,1,1,1,-1]"], "must be positive numbers or 0"),
    "weights' name": (None, ["finetune.class_weights=balance"], "did you mean 'balanced'"),
    "streaming": (None, ["data.streaming=true"], "set data.streaming=false"),
    "crops": (None, ["data.crop_on_device=true"], "set data.crop_on_device=false"),
    "lora layers": (None, ["finetune.lora=true", "finetune.lora_layers=[qvk]"], "did you mean 'qkv'"),
    "lora and freeze": (None, ["finetune.lora=true", "finetune.freeze=true"], "finetune.freeze=true forbids"),
    "key": (None, ["finetune.mixupp=1"], "did you mean 'mixup'"),
    "type": (None, ["finetune.mixup=much"], "finetune.mixup must be a number"),
    "range": (None, ["finetune.randaugment=11"], "from 0 to 10"),
    "task": (None, ["task=clasification"], "did you mean 'classification'"),
    "pooler": (None, ["model.pooler=mena"], "did you mean 'mean'"),
    "decay": (None, ["finetune.layer_decay=1.5"], r"in \(0, 1\]"),
    "shape": (
        None,
        ["model.encoder_config.hidden_size=32"],
        "weights and config do not fit: .* is .16,. in the file and .32,. by the config",
    ),
    "resume": (None, ["training.resume=true"], "holds no recipe.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(source, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, overrides, words = REFUSED[case]
    base = [word for word in TINY if not data or "max_" not in word]
    overrides = [*overrides, *([f"data.dataset={data(tmp_path / 'data')}"] if data else [])]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=words) as caught:
        run(source, None, *overrides, base=base)
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


def test_the_wrong_kind_of_encoder_is_refused(tmp_path):
    MIMForPreTraining(tiny_config(num_channels=1, encoder_config={"use_cls_token": False})).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match="pooler 'cls' needs an encoder with a class token"):
        run(tmp_path / "a", tmp_path / "out", "model.pooler=cls")
    resnet = {"encoder": "convnet", "encoder_config": RESNET, "image_size": 32}
    MIMForPreTraining(tiny_config(num_channels=1, **resnet)).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"linear layers, and the blocks of this encoder \(resnet\) have none"):
        run(tmp_path / "b", tmp_path / "out", "finetune.lora=true")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="no checkpoint at"):
        run(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_of_other_commands_are_refused(source):
    with pytest.raises(ValueError, match="mae is a pretraining recipe: run hf-mim pretrain mae\\..*finetune_small"):
        run(source, None, name="mae", base=[])
    with pytest.raises(ValueError, match="unknown recipe 'finetune_mea'"):
        run(source, None, name="finetune_mea", base=[])
    with pytest.raises(
        ValueError, match="finetune_small is a fine-tuning recipe: run hf-mim finetune MODEL finetune_small"
    ):
        pretrain("finetune_small")
    with pytest.raises(ValueError, match="hf-mim pretrain has no section 'finetune'"):
        pretrain("quick", ["finetune.lora=true"])
