"""The command `distill`: students of every kind learn from whole images; what cannot be a student is refused."""

import io
import json

import pytest
import torch
from helpers import RESNET, TIMM_VIT, perturb, save_grey_vits
from rich.console import Console
from transformers import AutoModel

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.cli import main
from hf_mim.modeling.encoders import ENCODERS
from hf_mim.training.commands import pretrain as commands
from hf_mim.training.commands.distill import choose_encoder, distill
from hf_mim.training.common.errors import RecipeError


SMALL = [
    "model.image_size=32",
    "data.max_train_images=32",
    "data.max_eval_images=0",
    "training.num_train_epochs=1",
    "training.per_device_train_batch_size=16",
    "training.watch_every=0",
    "training.bf16=false",
    "model.target_config.statistics_images=16",
]
VIT = "model.encoder_config={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8}"


@pytest.fixture
def sources(tmp_path) -> list[str]:
    return save_grey_vits(tmp_path)


def run(sources: list[str], student: str, folder, *words: str, **options) -> tuple[MIMForPreTraining, str]:
    out = io.StringIO()
    overrides = [*SMALL, *words, f"training.output_dir={folder}"]
    assert distill(sources, student, overrides, console=Console(file=out, width=250), **options) == folder
    return MIMForPreTraining.from_pretrained(folder), out.getvalue()


@pytest.mark.parametrize(
    ("student", "encoder", "words"),
    [
        ("vit", "vit", [VIT]),
        ("mobilenetv3_small_050", "convnet", []),
        ("vit_tiny_patch16_224", "timm", [f"model.encoder_config={json.dumps(TIMM_VIT)}", "model.encoder=timm"]),
        ("resnet", "convnet", [f"model.encoder_config={json.dumps(RESNET)}"]),
    ],
)
def test_students_of_every_kind(student, encoder, words, sources, tmp_path, monkeypatch):
    start, train = {}, commands.train

    def remembered(run):
        start.update({name: value.clone() for name, value in run.model.state_dict().items()})
        return train(run)

    monkeypatch.setattr(commands, "train", remembered)
    model, printed = run(sources, student, tmp_path / "run", *words)
    assert f"student: {student}" in printed and model.config.encoder == encoder
    assert model.config.masking == "none" and model.config.target == "teacher_features"
    assert model.config.target_config["feature_dims"] == [[12], [16]] and len(model.decoder.heads) == 2
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert any(name.startswith("mim.encoder") for name in changed)
    pixels = torch.randn(2, 1, 32, 32)
    again = AutoModel.from_pretrained(tmp_path / "run")
    assert torch.equal(again(pixels).last_hidden_state, model.eval().mim(pixels).last_hidden_state)


def test_with_masks_and_with_weights(sources, tmp_path):
    words = [VIT, "model.masking=random", "model.masking_config.ratio=0.5", "model.target_config.weights=[2, 1]"]
    model, _ = run(sources, "vit", tmp_path / "run", *words)
    assert model.config.masking_config == {"ratio": 0.5} and model.target.weights == [2.0, 1.0]
    assert model.mim.encoder.mask_token is not None


def test_what_is_no_student_or_no_distillation_is_refused(sources, tmp_path):
    for student, message in (
        ("resnt18", "did you mean 'resnet18'"),
        ("bert", "bert cannot be a student here: .*takes no images"),
        ("levit", "levit cannot be a student here: .*levit_128s of timm"),
        ("vit_tiny_patch16_224", "image size 40x40 is not divisible by the last map's cell 16x16"),
    ):
        size = 40 if student.startswith("vit_") else 32
        with pytest.raises(ValueError, match=message):
            distill(sources, student, [*SMALL, f"model.image_size={size}", f"training.output_dir={tmp_path / 'no'}"])
    with pytest.raises(RecipeError, match="model.target_config must be options or null, not 3"):
        distill(sources, "vit", ["model.target_config=3"])
    (tmp_path / "text.yaml").write_text("model: text")
    with pytest.raises(RecipeError, match="section 'model' in text.yaml must hold keys and values"):
        distill(sources, "vit", recipe=str(tmp_path / "text.yaml"))
    with pytest.raises(ValueError, match="named before the student"):
        distill(sources, "vit", [*SMALL, "model.target_config.teachers=[a]"])
    with pytest.raises(ValueError, match="recipe mae has no target teacher_features"):
        distill(sources, "vit", SMALL, recipe="mae")
    with pytest.raises(ValueError, match="as a teacher"):
        distill([str(tmp_path / "absent"), sources[0]], "vit", [*SMALL, f"training.output_dir={tmp_path / 'no'}"])
    assert not (tmp_path / "no").exists()


def test_the_command_line(sources, tmp_path, capsys):
    assert main(["distill", "vit"]) == 2 and "hf-mim distill TEACHER STUDENT" in capsys.readouterr().err
    assert main(["distill", "a", "b", "model.masking_confg=1"]) == 2
    assert "did you mean 'masking_config'" in capsys.readouterr().err
    folder = tmp_path / "run"
    assert main(["distill", *sources, "vit", *SMALL, VIT, f"training.output_dir={folder}"]) == 0
    assert (folder / "metrics.json").is_file()


# --- encoder timm ------------------------------------------------------------------------------------------------


def test_the_tokens_are_timms_and_weights_come_back(tmp_path):
    torch.manual_seed(0)
    config = MIMConfig(image_size=32, encoder="timm", encoder_config=TIMM_VIT)
    model = perturb(MIMModel(config)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    features = model.encoder.network.model.forward_features(pixels)  # timm's own pass, with its class token
    torch.testing.assert_close(model(pixels).last_hidden_state, features[:, 1:], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = MIMModel.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 5] = True
    filled = pixels.clone()
    filled[:, :, 8:16, 8:16] = pixels.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(model(pixels, hidden).last_hidden_state, model(filled).last_hidden_state)


def test_what_encoder_timm_refuses():
    for options, message in (
        ({"model_name": "vit_tny_patch16_224"}, "did you mean"),
        ({"model_name": "vit_tiny_patch16_224", "checkpoint_path": "x"}, "load files are refused"),
        ({"model_name": "vit_tiny_patch16_224", "pixel_fill": "none"}, "pixel_fill"),
        ({**TIMM_VIT, "embed_dm": 3}, "cannot be made"),
        ({**TIMM_VIT, "act_layer": "foo"}, "cannot be made.* KeyError 'foo'"),
        ({**TIMM_VIT, "num_heads": 0}, "cannot be made.* ZeroDivisionError"),
        ({**TIMM_VIT, "num_classes": 5}, "'num_classes'.* cannot be options"),
        ({**TIMM_VIT, "in_chans": 1}, "'in_chans'.* cannot be options"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            MIMConfig(image_size=32, encoder="timm", encoder_config=options)
        assert "\n" not in str(caught.value)


def test_what_a_convnet_of_timm_refuses():
    for options, message in (
        ({"model_name": 3}, "unknown timm model 3"),
        ({"act_layer": "foo"}, "cannot be made with the options .* KeyError 'foo'"),
        ({"out_indices": [9]}, "cannot be made with the options .* IndexError"),
        ({"output_stride": 5}, "cannot be made with the options .* AssertionError"),
        ({"block": "x"}, "cannot be made with the options .* AttributeError"),
    ):
        with pytest.raises(ValueError, match=message):
            MIMConfig(encoder="convnet", encoder_config={"model_type": "timm", "model_name": "resnet18", **options})


@pytest.mark.parametrize("encoder", ["timm", "convnet"])
def test_a_full_memory_is_no_fault_of_the_options(encoder, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("timm.create_model", fail)
    options = {"model_name": "resnet18"} | ({"model_type": "timm"} if encoder == "convnet" else {})
    with pytest.raises(torch.OutOfMemoryError):
        MIMConfig(image_size=32, encoder=encoder, encoder_config=options)


def test_a_convnet_is_cut_where_it_can_be():
    fields = {"image_size": 64, "num_channels": 3}
    assert choose_encoder("resnet18", fields)[0] == "convnet" and set(ENCODERS) >= {"convnet", "timm"}
    assert choose_encoder("swin_tiny_patch4_window7_224", {"image_size": 224})[0] == "timm"  # its maps end in channels


# --- ConvNets of transformers, as encoder native ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "mobilenet_v1", "depth_multiplier": 0.25},
        {"model_type": "mobilenet_v2", "depth_multiplier": 0.35},
    ],
)
def test_a_convnet_whose_config_says_no_width(options, tmp_path):
    torch.manual_seed(0)
    grid = (2, 3)
    config = MIMConfig(image_size=[64, 96], encoder="native", encoder_config=options)
    model = MIMModel(config).eval()
    pixels = torch.randn(2, 3, 64, 96)
    expected = model.encoder.network(pixels).last_hidden_state
    tokens = model(pixels).last_hidden_state
    assert expected.shape == (2, model.encoder.hidden_size, *grid) and model.encoder.token_grid(64, 96) == grid
    assert torch.equal(tokens, expected.flatten(2).transpose(1, 2))
    model.save_pretrained(tmp_path)
    assert torch.equal(MIMModel.from_pretrained(tmp_path)(pixels).last_hidden_state, tokens)
    pretraining = MIMForPreTraining(MIMConfig(**{**fields_of(config), "masking": "none", "decoder": "mlp"}))
    assert pretraining(pixels).logits.shape[:2] == (2, grid[0] * grid[1])
    with pytest.raises(ValueError, match="cannot hide|could be hidden"):
        MIMForPreTraining(MIMConfig(**{**fields_of(config), "decoder": "mlp"}))


def fields_of(config: MIMConfig) -> dict:
    return {name: getattr(config, name) for name in ("image_size", "encoder", "encoder_config")}
