"""Damaged checkpoints through every command that takes one: one line that says the true cause, no traceback, nothing
written, soon."""

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import DECODER_OPTIONS, NATIVE_VIT, VIT, perturb, tiny_config, write_pairs
from safetensors.torch import load_file, save_file
from test_broken_files import VALUES, places
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from hf_mim import MIMForPreTraining, cli
from hf_mim.command_table import SECTIONS
from hf_mim.modeling.options import OptionError
from hf_mim.training.common.errors import UserError


SECONDS = 10  # for any refusal
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEPER = {**VIT, "num_hidden_layers": 4}
TRAINING = ["training.max_steps=1", "training.per_device_train_batch_size=4", "training.bf16=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with small data and whole checkpoints: `mim`, and `native` of transformers."""
    folder, rng = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for name in "ab":
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    write_pairs(folder / "scenes" / "images", folder / "scenes" / "masks", 8, size=(16, 24))
    text = f"model: {{}}\ndata: {{dataset: {folder / 'photos'}}}\ntraining: {{watch_every: 0}}\n"
    (folder / "recipe.yaml").write_text(text)
    torch.manual_seed(0)
    perturb(MIMForPreTraining(tiny_config(encoder_config=DEEPER)), 0.02).save_pretrained(folder / "mim")
    fields = {**NATIVE_VIT, "image_size": 16}
    ViTModel(ViTConfig(**fields), add_pooling_layer=False).save_pretrained(folder / "native")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "native")
    return folder


def words_of(name: str, place: Path, checkpoint: str, out: Path) -> list[str]:
    """The command line of one of the `COMMANDS`."""
    photos, scenes = f"data.dataset={place / 'photos'}", f"data.dataset={place / 'scenes'}"
    recipe, image = str(place / "recipe.yaml"), str(place / "photos" / "a" / "0.png")
    trained = [*TRAINING, f"training.output_dir={out}"]
    student = ["model.image_size=16", f"model.encoder_config={VIT}", "model.target=teacher_feature"]
    student.append(f"model.decoder_config={ {k: DECODER_OPTIONS[k] for k in VIT if k in DECODER_OPTIONS} }")
    words: dict[str, list[str]] = {
        "pretrain": ["pretrain", recipe, f"model.init_from={checkpoint}", *trained],
        "pretrain by it": ["pretrain", recipe, *student, f"model.target_config.teacher={checkpoint}", *trained],
        "distill": ["distill", checkpoint, "resnet18", photos, "model.image_size=32", *trained],
        "finetune": ["finetune", checkpoint, photos, *trained],
        "segmentation": ["finetune", checkpoint, "task=segmentation", scenes, "finetune.head_size=8", *trained],
        "probe": ["probe", checkpoint, photos, f"probe.output_dir={out}"],
        "dense": ["probe", checkpoint, "task=dense", scenes, f"probe.output_dir={out}"],
        "embed": ["embed", checkpoint, str(out), photos],
        "analyze": ["analyze", checkpoint, photos, f"analyze.output_dir={out}"],
        "reconstruct": ["reconstruct", checkpoint, photos, "--out", f"{out}.png"],
        "reconstruct image": ["reconstruct", checkpoint, image, "--out", f"{out}.png"],
        "teacher": ["teacher", checkpoint, photos],
        "codebook": ["codebook", checkpoint, f"{out}.safetensors", photos, "--codes", "2", "--images", "8"],
        "doctor": ["doctor", checkpoint, photos],
        "push": ["push", checkpoint, "me/model"],
        "card": ["card", checkpoint, "me/model", "--out", str(out)],
        "to transformers": ["export", checkpoint, str(out), "--to", "transformers"],
        "to timm": ["export", checkpoint, str(out), "--to", "timm"],
        "convert": ["convert", checkpoint, str(out)],
        "convert file": ["convert", f"{checkpoint}/{WEIGHTS}", str(out)],
    }
    return words[name]


ENCODER = (
    "pretrain by it",
    "distill",
    "finetune",
    "segmentation",
    "probe",
    "dense",
    "analyze",
    "teacher",
    "codebook",
    "doctor",
    "embed",
    "pretrain",
)
COMMANDS = {  # that take a checkpoint of each kind
    "mim": (*ENCODER, "reconstruct", "reconstruct image", "push", "card", "to transformers", "to timm"),
    "native": (*ENCODER, "convert"),
}


def test_every_command_that_takes_a_checkpoint_is_here(place):
    tested = {words_of(name, place, "x", place / "out")[0] for names in COMMANDS.values() for name in names}
    assert tested == set(SECTIONS) - {"recipes", "options", "new", "search"} - {"demo"}  # which asks for gradio first


# ---- damage --------------------------------------------------------------------------------------------------------
def cut(share: float, name: str = WEIGHTS) -> Callable[[Path], None]:
    def damage(folder: Path):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def field(name: str, value) -> Callable[[Path], None]:
    def damage(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))

    return damage


def tensors(change: Callable[[dict, str], None]) -> Callable[[Path], None]:
    """Changes the weights, where it is told the name of one in the encoder's second block."""

    def damage(folder: Path):
        state = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
        names = [
            name for name in state if re.search(r"encoder\.layers?\.1\.(mlp\.fc1|intermediate\.dense)\.weight", name)
        ]
        change(state, names[0])
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return damage


def narrower(state: dict, name: str):
    state[name] = state[name][:, :-1].contiguous()


def renamed(state: dict, name: str):
    for other in list(state):
        state[f"x.{other}"] = state.pop(other)


def to_shards(weight_map) -> Callable[[Path], None]:
    def damage(folder: Path):
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def to_pickle(folder: Path):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def to_folder(folder: Path):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {  # what is done, and what is said
    "empty": (cut(0), rf"{WEIGHTS} is damaged"),
    "header cut": (cut(0.01), rf"{WEIGHTS} is damaged"),
    "cut": (cut(0.9), rf"{WEIGHTS} is damaged"),
    "noise": (written(WEIGHTS, random.Random(0).randbytes(3000)), rf"{WEIGHTS} is damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), rf"no.* {WEIGHTS}"),
    "weights a folder": (to_folder, rf"no.* {WEIGHTS}"),
    "another shape": (tensors(narrower), r"layers\.1\.mlp\.fc1\.weight is \(\d+, 15\) in the file and \(\d+, 16\) by"),
    "a tensor missing": (tensors(lambda state, name: state.pop(name)), r"no weights \S*layers\.1\.mlp\.fc1\.weight"),
    "other names": (tensors(renamed), r"no weights \S+ and \d+ more"),
    "a shard missing": (to_shards({"a": "a.safetensors", "b": "b.safetensors"}), r"names 'b.safetensors', which is no"),
    "a shard elsewhere": (to_shards({"a": "../native/model.safetensors"}), r"names '../native/\S+', which is no"),
    "no table of shards": (to_shards([1]), rf"{INDEX} is damaged"),
    "config cut": (cut(0.5, "config.json"), r"config.json' is not a valid JSON"),
    "config a list": (written("config.json", b"[1]"), r"config.json holds no config"),
    "config noise": (written("config.json", random.Random(0).randbytes(300)), r"config.json' is not a valid JSON"),
    "config nested": (written("config.json", b'{"a":' * 200_000), r"config.json is nested too deeply"),
    "a type that is a list": (field("model_type", ["x"]), r"config.json holds no config"),
    "an unknown type": (field("model_type", "nonsense"), r"'?nonsense'?|Python code of its own"),
    "a size that is a dict": (field("image_size", {"a": 1}), r"'?image_size'? with value {'a': 1}"),
    "a number that is text": (field("num_channels", "x"), r"'num_channels' expected int, got str"),
}
OURS = {
    "options that are text": (field("encoder_config", "x"), r"'encoder_config' with value 'x'"),
    "options that are a list": (field("encoder_config", [1]), r"'encoder_config' with value \[1\]"),
    "wider than its files": (field("encoder_config", {**DEEPER, "hidden_size": 2**18}), r"asks for [\d,]+ weights"),
    "a pickle": (to_pickle, r"is a pickle, which is n|no weights"),
}
THEIRS = {
    "processor cut": (cut(0.5, "preprocessor_config.json"), r"preprocessor_config.json is damaged"),
    "wider than its files": (field("hidden_size", 2**18), r"asks for [\d,]+ weights"),
    "layers without end": (field("num_hidden_layers", 10**9), r"num_hidden_layers=1000000000"),
}
CASES = [(kind, name) for kind, own in (("mim", OURS), ("native", THEIRS)) for name in (*DAMAGE, *own)]


@pytest.fixture
def refusal(place, tmp_path, monkeypatch, capsys):
    """A function from a command and a checkpoint to its exit code and the line that it prints; of `doctor`, what it
    finds."""
    errors, describe = [], cli.describe
    monkeypatch.setattr(cli, "describe", lambda error: errors.append(error) or describe(error))
    monkeypatch.setenv("COLUMNS", "1000")

    def run(command: str, checkpoint: Path) -> tuple[int, str]:
        started, out = time.monotonic(), tmp_path / "out"
        code = cli.main(words_of(command, place, str(checkpoint), out))
        printed = capsys.readouterr()
        assert time.monotonic() - started < SECONDS, command
        if code == 0:
            return code, ""
        assert not list(tmp_path.glob("out*")), command
        if code == 1 and command == "doctor":
            return code, next(line for line in printed.out.splitlines() if "fault" in line)
        assert code == 2 and isinstance(errors.pop(), UserError | OptionError), command
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, (command, printed.err)
        assert len(printed.err) < 1000 and "Traceback" not in printed.err, command
        return code, printed.err

    return run


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_damaged_checkpoint_is_one_line_in_every_command(kind, name, place, tmp_path, refusal):
    damage, message = {**DAMAGE, **(OURS if kind == "mim" else THEIRS)}[name]
    folder = shutil.copytree(place / kind, tmp_path / "damaged")
    damage(folder)
    for command in COMMANDS[kind]:
        code, line = refusal(command, folder)
        assert code == (1 if command == "doctor" else 2) and re.search(message, line), (command, line)
        assert str(folder) in line, (command, line)


QUICK = {  # commands that are quick where a value does no harm
    "mim": ("reconstruct image", "teacher", "card", "to transformers", "doctor"),
    "native": ("teacher", "convert", "codebook"),
}


@pytest.mark.parametrize("kind", QUICK)
def test_any_value_in_any_field_is_one_line_at_most_in_every_command(kind, place, tmp_path, refusal):
    """A sample that follows from the seed."""
    numbers, fields = random.Random(0), json.loads((place / kind / "config.json").read_text())
    for i, path in enumerate(places(fields)):
        config, inner = json.loads(json.dumps(fields)), None
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = numbers.choice(VALUES)
        folder = shutil.copytree(place / kind, tmp_path / f"damaged-{i}")
        (folder / "config.json").write_text(json.dumps(config))
        refusal(numbers.choice(QUICK[kind]), folder)
        for made in tmp_path.glob("out*"):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
