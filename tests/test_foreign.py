"""A checkpoint is data: whatever its config names, no file is opened, nothing is fetched and no code runs."""

import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel, cli
from hf_mim.conversion import convert, export
from hf_mim.modeling.foreign import LOADING, check_config, refuse_loading
from hf_mim.modeling.teachers import load_teacher
from hf_mim.training.checkpoint import load_encoder, load_model
from hf_mim.training.commands.teacher import fit_codebook
from hf_mim.training.common.errors import FolderError


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A pickle that leaves a mark where it is read, and no network; gives the path of the pickle."""

    def connect(*arguments, **_):
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    yield tmp_path / "evil.pth"
    assert not (tmp_path / "ran").exists()


def save_timm(folder: Path, architecture: str = "resnet10t", **options) -> Path:
    import timm

    folder.mkdir()
    save_file(timm.create_model("resnet10t").state_dict(), folder / "model.safetensors")
    saved = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32], "num_classes": 0}
    fields = {"architecture": architecture, "num_classes": 0, "model_args": options, "pretrained_cfg": saved}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("option", sorted(LOADING))
def test_timm_is_given_nothing_to_load(option, trap, tmp_path):
    value = True if option == "pretrained" else {"file": str(trap)} if "cfg" in option else str(trap)
    source = save_timm(tmp_path / "source", **{option: value})
    for use in (lambda: convert(str(source), tmp_path / "out"), lambda: load_teacher(str(source))):
        with pytest.raises(ValueError, match=f"load files are refused.*{option}"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["hf-hub:somebody/evil", "local-dir:/somewhere", "somebody/evil"])
def test_timm_is_given_no_place_as_a_name(architecture, trap, tmp_path):
    source = save_timm(tmp_path / "source", architecture)
    for use in (lambda: convert(str(source), tmp_path / "out"), lambda: load_teacher(str(source))):
        with pytest.raises(ValueError, match="names a place to load from"):
            use()


def test_a_harmless_config_of_timm_is_converted(trap, tmp_path):
    convert(str(save_timm(tmp_path / "source")), tmp_path / "out")
    assert load_encoder(str(tmp_path / "out")).config.encoder_config["model_name"] == "resnet10t"


def save_vit(folder: Path) -> Path:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


HOSTILE = {
    "attn_implementation": "somebody/kernel",
    "_attn_implementation": "somebody/kernel",
    "_attn_implementation_internal": "somebody/kernel:function",
    "experts_implementation": {"text": "somebody/kernel"},
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "somebody/kernel:Norm"},
}


@pytest.mark.parametrize("key", HOSTILE)
def test_kernels_that_a_config_names_are_refused(key, trap, tmp_path):
    native, ours = save_vit(tmp_path / "native"), tmp_path / "ours"
    MIMForPreTraining(tiny_config()).save_pretrained(ours)
    wrapped = tmp_path / "wrapped"
    MIMModel.from_encoder(str(native)).save_pretrained(wrapped)
    for folder in (native, ours):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, key: HOSTILE[key]}))
    fields = json.loads((wrapped / "config.json").read_text())
    fields["encoder_config"][key] = HOSTILE[key]
    (wrapped / "config.json").write_text(json.dumps(fields))
    uses = [lambda f=f: load_encoder(str(f)) for f in (native, ours, wrapped)]
    uses += [lambda f=f: load_teacher(str(f)) for f in (native, ours, wrapped)]
    uses += [lambda: convert(str(native), tmp_path / "out"), lambda: load_model(str(ours))]
    uses += [lambda: MIMModel.from_pretrained(ours), lambda: MIMConfig.from_pretrained(wrapped)]
    for use in uses:
        with pytest.raises(ValueError, match="which a config must not"):
            use()


def test_checks_reach_nested_configs():
    check_config(
        {
            "vision_config": {"attn_implementation": "sdpa", "hidden_size": 8},
            "backbone_kwargs": {"a": 1},
            "id2label": {0: "x/y"},
        }
    )
    for fields in ({"a": {"b": {"attn_implementation": "x/y"}}}, {"a": {"backbone_kwargs": {"checkpoint_path": "x"}}}):
        with pytest.raises(ValueError):
            check_config(fields)
    refuse_loading({"drop_rate": 0.1}, "resnet18.a1_in1k")


CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTImageProcessor, ViTModel
Path({mark!r}).touch()
class Evil(ViTConfig):
    model_type = "evil"
class EvilModel(ViTModel):
    config_class = Evil
class EvilProcessor(ViTImageProcessor):
    pass
"""


def test_code_that_travels_with_a_model_runs_only_when_allowed(trap, tmp_path, monkeypatch):
    """Nothing waits for an answer either."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a library asked"))
    source = save_vit(tmp_path / "source")
    (source / "evil.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    fields = json.loads((source / "config.json").read_text())
    state = ViTModel.from_pretrained(source, add_pooling_layer=False).state_dict()
    save_file(state, source / "model.safetensors")  # by the names of its class
    fields |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.EvilModel"}}
    (source / "config.json").write_text(json.dumps(fields))
    uses = (lambda: load_encoder(str(source)), lambda: convert(str(source), tmp_path / "out"))
    for use in (*uses, lambda: load_teacher(str(source))):
        with pytest.raises(ValueError) as caught:
            use()
        assert str(source) in str(caught.value) and "set HF_MIM_TRUST_REMOTE_CODE=1" in str(caught.value)
    assert not (tmp_path / "mark").exists()
    # A processor of its own beside a model that is known.
    known = save_vit(tmp_path / "known")
    (known / "evil.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    processor = json.loads((known / "preprocessor_config.json").read_text())
    processor |= {"image_processor_type": "EvilProcessor", "auto_map": {"AutoImageProcessor": "evil.EvilProcessor"}}
    (known / "preprocessor_config.json").write_text(json.dumps(processor))
    load_encoder(str(known))
    convert(str(known), tmp_path / "out")
    assert not (tmp_path / "mark").exists()
    monkeypatch.setenv("HF_MIM_TRUST_REMOTE_CODE", "1")
    load_teacher(str(known))
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    assert load_encoder(str(source))(torch.zeros(1, 3, 16, 16)).last_hidden_state.shape == (1, 5, 16)
    assert (tmp_path / "mark").exists()


# ---- what is there already -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    MIMForPreTraining(tiny_config()).save_pretrained(folder)
    return folder


def test_convert_and_export_leave_a_folder_with_files_alone(checkpoint, tmp_path):
    native, mine = save_vit(tmp_path / "native"), tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("mine")
    for run in (
        lambda **more: convert(str(native), mine, **more),
        lambda **more: export(str(checkpoint), mine, "transformers", **more),
        lambda **more: export(str(checkpoint), mine, "timm", **more),
    ):
        with pytest.raises(FolderError, match="is not empty .it holds config.json."):
            run()
        assert [path.name for path in mine.iterdir()] == ["config.json"]
        assert (mine / "config.json").read_text() == "mine"
        run(force=True)
        assert json.loads((mine / "config.json").read_text())
        shutil.rmtree(mine)
        mine.mkdir()  # empty is free
        run()
        shutil.rmtree(mine)
        mine.write_text("a file")
        with pytest.raises(FolderError, match="is not a folder"):
            run(force=True)
        mine.unlink()
        mine.mkdir()
        (mine / "config.json").write_text("mine")


def test_reconstruct_replaces_no_photograph(checkpoint, tmp_path, capsys):
    image, other = tmp_path / "photo.png", tmp_path / "other.png"
    Image.effect_noise((20, 20), 60).convert("RGB").save(image)
    Image.effect_noise((20, 20), 60).convert("RGB").save(other)
    before, content = image.read_bytes(), other.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(image)
    for out in (image, link):
        for force in ([], ["--force"]):
            assert cli.main(["reconstruct", str(checkpoint), str(image), "--out", str(out), *force]) == 2
            assert "is the image itself" in capsys.readouterr().err and image.read_bytes() == before
    assert cli.main(["reconstruct", str(checkpoint), str(image), "--out", str(other)]) == 2
    assert "exists already" in capsys.readouterr().err and other.read_bytes() == content
    assert cli.main(["reconstruct", str(checkpoint), str(image), "--out", str(other), "--force"]) == 0
    assert other.read_bytes() != content and image.read_bytes() == before


def test_codebook_replaces_nothing(checkpoint, tmp_path):
    out = tmp_path / "codes.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(FolderError, match="exists already"):
        fit_codebook(str(checkpoint), out)
    assert out.read_bytes() == b"mine"
