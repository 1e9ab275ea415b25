"""UperNet over an encoder, and `finetune` with `task=segmentation`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import CONVNEXT, DINOV2, NATIVE_VIT, RESNET, SWIN, png, tiny_config, write_pairs
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, UperNetForSemanticSegmentation

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.cli import main
from hf_mim.modeling.modeling_upernet import MIMUperNet
from hf_mim.training.commands.finetune import finetune, read_recipe
from hf_mim.training.commands.segmentation import check_grid, choose_stages, make_segmenter
from hf_mim.training.common.console import RunConsole
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.decoding import Decoder
from hf_mim.training.data.masked import load_masked_splits
from hf_mim.training.data.masks import IGNORE, BadMask
from hf_mim.training.data.pairs import Pairs
from hf_mim.training.data.scenes import Scenes
from hf_mim.training.evaluation.iou import MeanIoU, predict_mask
from hf_mim.training.plots.pictures import draw_masks
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments


QUIET = Console(quiet=True)


# ---- the model -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields, stages, factors",
    [
        ({"encoder_config": {"num_hidden_layers": 12}}, [4, 6, 8, 12], [1, 0.5, 0.25, 0.125]),
        ({"encoder_config": {"num_hidden_layers": 4, "patch_size": 16}}, [1, 2, 3, 4], [4, 2, 1, 0.5]),
        ({"encoder_config": {"num_hidden_layers": 3, "patch_size": 8}}, ["stem", 1, 2, 3], [2, 1, 0.5, 0.25]),
        ({"encoder": "native", "encoder_config": {**DINOV2, "num_hidden_layers": 6}}, [2, 3, 4, 6], None),
        ({"encoder": "native", "encoder_config": SWIN}, ["stem", 2], None),
        ({"image_size": 64, "encoder": "convnet", "encoder_config": CONVNEXT}, [1, 2, 3, 4], None),
    ],
)
def test_stages_and_strides(fields, stages, factors):
    encoder = MIMModel(tiny_config(**fields), add_pooling_layer=False)
    names, found = choose_stages(encoder, None)
    assert names == [name if isinstance(name, str) else f"stage{name}" for name in stages]
    if factors is not None:
        assert found == factors
    assert (found is None) == (len(set(encoder.encoder.num_features)) > 1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_one_step_of_non_square_grey_images_in_a_batch_of_one(name, bf16):
    torch.manual_seed(0)
    fields = {
        "vit": {"encoder_config": {"num_hidden_layers": 3}},
        "resnet": {"encoder": "convnet", "encoder_config": RESNET},
        "swin": {"encoder": "native", "encoder_config": SWIN},
    }[name]
    encoder = MIMModel(tiny_config(image_size=64, num_channels=1, **fields), add_pooling_layer=False)
    model = make_segmenter(encoder, FinetuneArguments(head_size=8), ["a", "b", "c"], batch=1)
    assert type(model) is MIMUperNet and model.config.pool_scales == [2, 3, 6]
    before = {key: value.clone() for key, value in model.backbone.mim.state_dict().items()}
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    model = model.bfloat16() if bf16 else model
    output = model(torch.randn(1, 1, 64, 96), labels=torch.randint(3, (1, 64, 96)))
    assert output.logits.shape == (1, 3, 64, 96) and output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_predictions_are_upsampled_before_the_best_is_chosen():
    scores_of = torch.randn(3, 4, 5).double()
    found = predict_mask(scores_of, (8, 10))
    for row in range(8):
        for col in range(10):
            y, x = ((row + 0.5) / 2 - 0.5), ((col + 0.5) / 2 - 0.5)
            y, x = min(max(y, 0), 3), min(max(x, 0), 4)
            i, j = int(y), int(x)
            k, m, a, b = min(i + 1, 3), min(j + 1, 4), y - i, x - j
            mixed = (1 - a) * (1 - b) * scores_of[:, i, j] + (1 - a) * b * scores_of[:, i, m]
            mixed += a * (1 - b) * scores_of[:, k, j] + a * b * scores_of[:, k, m]
            assert found[row, col] == mixed.argmax()


def test_a_batch_without_a_labelled_pixel_teaches_nothing():
    torch.manual_seed(0)
    encoder = MIMModel(tiny_config(encoder_config={"num_hidden_layers": 3}), add_pooling_layer=False)
    model = make_segmenter(encoder, FinetuneArguments(head_size=8), ["a", "b"], batch=2)
    pixel_values = torch.randn(2, 3, 16, 16)
    loss = model(pixel_values, labels=torch.full((2, 16, 16), IGNORE)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    labels = torch.full((2, 16, 16), IGNORE)
    labels[0, 3, 5] = 1
    output = model.eval()(pixel_values, labels=labels)
    wanted = -output.logits[0, :, 3, 5].log_softmax(0)[1]
    aux = torch.nn.functional.interpolate(
        model.auxiliary_head(model.backbone(pixel_values).feature_maps), size=(16, 16), mode="bilinear"
    )
    wanted = wanted - 0.4 * aux[0, :, 3, 5].log_softmax(0)[1]
    assert torch.allclose(output.loss, wanted, atol=1e-6)


# ---- whole runs ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained")
    MIMForPreTraining(
        tiny_config(image_size=28, num_channels=1, encoder_config={"num_hidden_layers": 4})
    ).save_pretrained(folder)
    return str(folder)


TINY = [
    *("finetune.head_size=8", "training.per_device_train_batch_size=4", "training.logging_steps=1"),
    *("training.use_cpu=true", "training.bf16=false", "data.max_train_images=8", "data.max_eval_images=3"),
]


@pytest.fixture(scope="module")
def run(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [*TINY, "training.num_train_epochs=2", "finetune.ema=0.5", f"training.output_dir={folder}"]
    assert finetune(pretrained, "segmentation_small", words, QUIET) == folder
    return folder


def test_the_task_alone_names_its_recipe():
    _, recipe, _ = read_recipe("x", None, ["task=segmentation"], RunConsole())
    assert recipe["finetune"]["task"] == "segmentation" and recipe["finetune"]["head_size"] == 32
    assert "task" not in read_recipe("x", None, [], RunConsole())[1]["finetune"]


def test_a_run_leaves_a_segmenter_its_scores_and_a_picture(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["task"] == "segmentation" and metrics["steps"] == 4 and metrics["evaluation"]["test_images"] == 3
    assert set(metrics["iou"]) == set(Scenes().classes) and metrics["pretrained"] is True
    low, high = metrics["intervals"]["mean_iou"]
    assert 0 <= low <= high <= 100
    with PIL.Image.open(run / "segmentation.png") as picture:
        assert picture.width > 3 * 128
    assert not (run / "training_args.bin").exists()
    best = json.loads((run / "checkpoint-4/trainer_state.json").read_text())
    assert best["best_metric"] == pytest.approx(metrics["best_validation_mean_iou"])


def test_the_saved_segmenter_gives_the_scores_of_the_run(run):
    metrics = json.loads((run / "metrics.json").read_text())
    model = AutoModelForSemanticSegmentation.from_pretrained(run).eval()
    assert isinstance(model, UperNetForSemanticSegmentation)
    assert model.config.id2label[1] == "T-shirt/top"
    weights = load_file(run / "model.safetensors")
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert all(torch.equal(weights[key], value) for key, value in own.items())
    processor, scenes = AutoImageProcessor.from_pretrained(run), Scenes("test", count=3)
    maps = []
    for i in range(3):
        inputs = processor(PIL.Image.fromarray(scenes[i][0][0]), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 1, 56, 56)
        with torch.no_grad():
            outputs = model(**inputs)
        maps += processor.post_process_semantic_segmentation(outputs, target_sizes=[(56, 56)])
    references = [scenes[i][1] for i in range(3)]
    found = MeanIoU().compute(predictions=[m.numpy() for m in maps], references=references, num_classes=11)
    assert found["mean_iou"] == pytest.approx(metrics["mean_iou"], abs=0.3)  # a pixel may fall either way
    assert found["pixel_accuracy"] == pytest.approx(metrics["pixel_accuracy"], abs=0.1)
    again = MIMUperNet.from_pretrained(run).eval()
    pixel_values = torch.randn(1, 1, 56, 60)
    with torch.no_grad():
        assert torch.allclose(again(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_ends_with_the_same_weights(pretrained, tmp_path):
    words = [*TINY, "training.num_train_epochs=2", "training.save_total_limit=3"]
    for name in ("whole", "parts"):
        finetune(pretrained, "segmentation_small", [*words, f"training.output_dir={tmp_path / name}"], QUIET)
    parts = tmp_path / "parts"
    for path in (parts / "checkpoint-4").iterdir():
        path.unlink()
    (parts / "checkpoint-4").rmdir()
    (parts / "model.safetensors").unlink()
    finetune(str(parts), None, ["training.resume=true"], QUIET)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_frozen_encoder_stays_as_it_is(pretrained, tmp_path):
    words = [*TINY, "training.max_steps=1", "finetune.freeze=true", f"training.output_dir={tmp_path / 'out'}"]
    weights = load_file(finetune(pretrained, "segmentation_small", words, QUIET) / "model.safetensors")
    before = MIMModel.from_pretrained(pretrained, add_pooling_layer=False).state_dict()
    assert all(torch.equal(weights[f"backbone.mim.{key}"], value) for key, value in before.items())


def test_an_encoder_without_drop_path_says_so():
    options = {**NATIVE_VIT, "num_hidden_layers": 4}
    encoder = MIMModel(tiny_config(encoder="native", encoder_config=options), add_pooling_layer=False)
    with pytest.raises(ValueError, match="no drop path: set finetune.drop_path=null"):
        make_segmenter(encoder, FinetuneArguments(drop_path=0.1), ["a", "b"], batch=2)


def test_a_convnet_on_colour_photographs_of_several_sizes(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(image_size=64, encoder="convnet", encoder_config=RESNET, decoder="linear", decoder_config={})
    MIMForPreTraining(config).save_pretrained(tmp_path / "model")
    for split, count in (("train", 6), ("test", 3)):
        write_pairs(tmp_path / split / "images", tmp_path / split / "masks", count)
    words = [*TINY, f"data.dataset={tmp_path}", "finetune.classes=[sky, ground, tree]", "model.image_size=[64, 96]"]
    words += ["training.max_steps=1", f"training.output_dir={tmp_path}-out", "finetune.pyramid=null"]
    folder = finetune(str(tmp_path / "model"), "segmentation_small", words, QUIET)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["iou"]) == ["sky", "ground", "tree"] and metrics["evaluation"]["test"] == "split test"
    processor = AutoImageProcessor.from_pretrained(folder)
    assert dict(processor.size) == {"height": 64, "width": 96}


LOAD = """
import importlib.abc, sys

class NoPlugin(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_mim":
            raise ImportError("hf_mim cannot be imported here")

sys.meta_path.insert(0, NoPlugin())
import torch
from transformers import AutoModelForSemanticSegmentation

folder = sys.argv[1]
pixel_values = torch.load(folder + "/inputs.pt", weights_only=True)
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
model.save_pretrained(folder + "/again")
again = AutoModelForSemanticSegmentation.from_pretrained(folder + "/again", trust_remote_code=True).eval()
torch.save([m(pixel_values).logits for m in (model, again)], folder + "/out.pt")
"""


@pytest.mark.slow
def test_remote_code_alone_gives_the_same_masks(run, tmp_path):
    pixel_values = torch.randn(2, 1, 56, 40)
    torch.save(pixel_values, run / "inputs.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(run)], check=True, cwd=tmp_path, capture_output=True)
    with torch.no_grad():
        wanted = MIMUperNet.from_pretrained(run).eval()(pixel_values).logits
    for logits in torch.load(run / "out.pt", weights_only=True):
        assert torch.allclose(logits, wanted, rtol=1e-4, atol=1e-6)


def test_the_picture_leaves_pixels_of_no_class_bare():
    image = np.full((3, 16, 24), 200, dtype=np.uint8)
    ids = np.full((16, 24), IGNORE)
    ids[:, :12] = 1
    picture = np.array(draw_masks([image], [ids], {"predicted": [np.zeros_like(ids)]}, ["back", "front"]))
    rows, cols = np.where((picture == 200).all(-1))
    assert len(rows) > 16 * 24 * 64 * 1.4  # the image, and the right half of its mask
    black = (picture == 80).all(-1).sum()  # 0.4 * 200 under the black of class 0, and a few pixels of the captions
    assert 16 * 24 * 64 <= black < 16 * 24 * 64 + 50


# ---- bad input -----------------------------------------------------------------------------------------------------
def bad_folder(name: str, folder: Path) -> None:
    write_pairs(folder / "images", folder / "masks", 4, size=(32, 32), channels=1)
    mask = folder / "masks/p2.png"
    if name == "no masks":
        for path in (folder / "masks").iterdir():
            path.unlink()
        (folder / "masks").rmdir()
    if name == "one missing":
        mask.unlink()
    if name == "other size":
        PIL.Image.fromarray(np.zeros((32, 16), dtype=np.uint8)).save(mask)
    if name == "ids beyond":
        PIL.Image.fromarray(np.full((32, 32), 7, dtype=np.uint8)).save(mask)
    if name == "ignored":
        for path in (folder / "masks").iterdir():
            PIL.Image.fromarray(np.full((32, 32), IGNORE, dtype=np.uint8)).save(path)
    if name == "one class":
        for path in (folder / "masks").iterdir():
            PIL.Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("no masks", [], "has no masks: it must hold images/ and masks/"),
        ("one missing", [], "1 of 4 images have no mask in .*; the first: p2.png"),
        ("other size", [], "the mask of p2.png is 32x16 pixels, the image 32x32"),
        ("ids beyond", ["finetune.classes=3"], "hold ids up to 7, but there are 3 classes: 0 to 2"),
        ("ids beyond", ["finetune.classes=[a, b]"], "but there are 2 classes: 0 to 1"),
        ("ignored", [], "masks hold only 255, which means that a pixel has no class"),
        ("one class", [], "hold one class only, id 0"),
        ("fine", ["data.mask_column=msk"], "unknown data.mask_column 'msk'"),
        ("fine", ["data.streaming=true"], "data.streaming"),
        ("fine", ["finetune.mixup=0.8"], "finetune.mixup is for task=classification"),
        ("fine", ["model.image_size=30"], "30x30 is not divisible by the patch 4x4; 32x32 would be"),
        ("fine", ["model.pooler=max"], "segmentation takes model.image_size only, not model.pooler"),
    ],
)
def test_bad_input_is_one_line(name, words, message, pretrained, tmp_path, capsys):
    bad_folder(name, tmp_path)
    words = [f"data.dataset={tmp_path}", f"training.output_dir={tmp_path}-out", *TINY, *words]
    assert main(["finetune", pretrained, "segmentation_small", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not Path(f"{tmp_path}-out").exists()


def test_data_without_masks_names_its_columns(pretrained, tmp_path):
    image = png(np.zeros((8, 8), dtype=np.uint8))
    table = {"photo": [{"bytes": image, "path": None}] * 4, "label": [0, 1, 0, 1]}
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column holds masks; the columns are photo, label"):
        load_masked_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=1))


def test_an_encoder_without_patch_tokens_is_refused():
    class Pooled(MIMModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state[:, :1]
            return output

    with pytest.raises(ValueError, match="no patch tokens: 0 for an image of 16x16"):
        check_grid(Pooled(tiny_config(), add_pooling_layer=False), (16, 16))


def test_a_mask_that_changes_size_later_is_named():
    rows = {"image": [png(np.zeros((8, 8), dtype=np.uint8))], "mask": [[[0, 1]]]}
    decode = Decoder(tiny_config(num_channels=1), DataArguments())
    pairs = Pairs(datasets.Dataset.from_dict(rows), "image", "mask", decode)
    with pytest.raises(BadMask, match="the mask of row 0 is 1x2 pixels, the image 8x8"):
        pairs[0]
    traced = BadMask('Traceback:\n  File "x"\nhf_mim.training.segmentation_data.BadMask: the mask of a is bad')
    assert str(traced) == "the mask of a is bad"
