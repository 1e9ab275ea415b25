"""MIMConfig: what it accepts, refuses, keeps; and entries of one's own in each dict of parts."""

import inspect
import json

import numpy as np
import pytest
import torch
from helpers import CONVNEXT, NATIVE_VIT, RESNET, SWIN, tiny_config
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.decoders import DECODERS, Decoder
from hf_mim.modeling.encoder_base import Encoder, EncoderOutput, grid_size
from hf_mim.modeling.encoders import ENCODERS
from hf_mim.modeling.masking import MASK_GENERATORS, count_hidden
from hf_mim.modeling.options import is_of, options_of, pair
from hf_mim.modeling.poolers import POOLERS, Pooler
from hf_mim.modeling.target_base import Target
from hf_mim.modeling.targets import TARGETS


CONFIGS = {
    "default": {},
    "size": {"image_size": [32, 48], "encoder_config": {"size": "tiny", "patch_size": [8, 16]}},
    "tuple": {"image_size": (32, 48)},
    "channels": {"num_channels": 13, "image_mean": [0.1] * 13, "image_std": list(range(1, 14))},
    "parts": {
        "image_size": 64,
        "encoder": "convnet",
        "encoder_config": RESNET,
        "masking": "block",
        "masking_config": {"ratio": 0.3, "unit": [1, 2]},
        "decoder": "linear",
        "target_config": {"normalize": False, "loss": "l1"},
        "pooler": "gem",
        "pooler_config": {"p": 2, "apply_final_norm": False},
        "out_features": ["stage2", "stage4"],
    },
    "swin": {"image_size": 16, "encoder": "native", "encoder_config": SWIN, "out_indices": [1]},
    "labels": {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "problem_type": "single_label_classification"},
    "number_of_labels": {"num_labels": 7},
}


# --- what it is --------------------------------------------------------------------------------------------------


def test_defaults():
    config = MIMConfig()
    parts = ("encoder", "masking", "decoder", "target", "pooler")
    assert [getattr(config, part) for part in parts] == ["vit", "random", "transformer", "pixel", "mean"]
    assert [getattr(config, f"{part}_config") for part in parts] == [{}] * 5
    assert config.image_size == 224 and config.num_channels == 3
    assert config.image_mean == [0.485, 0.456, 0.406] and config.image_std == [0.229, 0.224, 0.225]
    assert config.stage_names == ["stem"] + [f"stage{i}" for i in range(1, 13)]
    assert MIMConfig(num_channels=5).image_mean == MIMConfig(num_channels=5).image_std == [0.5] * 5


@pytest.mark.parametrize("entries", [ENCODERS, POOLERS, DECODERS, TARGETS, MASK_GENERATORS])
def test_every_option_of_every_entry_has_a_default_of_its_type(entries):
    for name, entry in entries.items():
        for option, default in options_of(entry).items():
            annotation = inspect.signature(entry).parameters[option].annotation
            assert default is not inspect.Parameter.empty, (name, option)
            assert is_of(default, annotation), (name, option)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_json(name, tmp_path):
    config = MIMConfig(**CONFIGS[name])
    config.save_pretrained(tmp_path)
    for again in (MIMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is MIMConfig
        saved, loaded = (json.loads(json.dumps(c.to_dict())) for c in (config, again))
        assert {**loaded, "_name_or_path": ""} == saved
        assert pair(again.image_size) == pair(config.image_size)
        assert again.out_features == config.out_features and again.out_indices == config.out_indices
        assert again.id2label == config.id2label and again.num_labels == config.num_labels
    assert again == again.__class__.from_dict(again.to_dict())


def test_options_given_are_not_shared_with_the_caller():
    options = {"size": "tiny"}
    config = MIMConfig(encoder_config=options)
    config.encoder_config["size"] = "small"
    assert options == {"size": "tiny"}
    assert MIMConfig().encoder_config is not MIMConfig().encoder_config


def test_labels():
    config = tiny_config(id2label={0: "cat", 1: "dog", 2: "cow"})
    assert config.num_labels == 3 and config.id2label[1] == "dog"
    assert MIMForImageClassification(config)(torch.randn(1, 3, 16, 16)).logits.shape == (1, 3)
    assert tiny_config(num_labels=5).num_labels == 5


def test_from_dict_keeps_keys_of_later_versions(tmp_path):
    config = tiny_config(pooler="max")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["sixth_part"] = {"name": "new"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = MIMConfig.from_pretrained(tmp_path)
    assert again.sixth_part == {"name": "new"} and again.pooler == "max"
    assert again.to_dict()["sixth_part"] == {"name": "new"}
    with pytest.raises(ValueError, match="unknown key of MIMConfig 'sixth_part'"):
        MIMConfig(sixth_part={})


def test_fields_can_be_changed_on_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    again = MIMConfig.from_pretrained(tmp_path, target="hog", num_labels=9)
    assert again.target == "hog" and again.num_labels == 9
    config, unused = MIMConfig.from_pretrained(tmp_path, pooler="max", bogus=1, return_unused_kwargs=True)
    assert config.pooler == "max" and unused == {"bogus": 1}


# --- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"encodr": "vit"}, r"key of MIMConfig 'encodr': did you mean 'encoder'\? Choices: image_size, .*pooler"),
        ({"image_sise": 32}, "did you mean 'image_size'"),
        ({"encoder": "vitt"}, r"encoder 'vitt': did you mean 'vit'\? Choices: vit, convnet, hiera, native, timm"),
        ({"encoder_config": {"patchsize": 8}}, "option of encoder 'vit' 'patchsize': did you mean 'patch_size'"),
        ({"encoder_config": {"size": "tinny"}}, r"unknown size 'tinny': did you mean 'tiny'\? Choices: tiny, small, "),
        ({"encoder_config": {"mask_style": "keep"}}, "unknown mask_style 'keep'.* Choices: drop, token, add"),
        ({"encoder_config": {"hidden_size": "big"}}, r"'hidden_size' of encoder 'vit' must be int \| None, got 'big'"),
        ({"encoder_config": {"patch_size": [4, 4, 4]}}, r"a \(height, width\) pair of them, got \[4, 4, 4\]"),
        ({"pooler": "gme"}, r"unknown pooler 'gme': did you mean 'gem'\? Choices: cls, mean, max, gem"),
        ({"pooler": "zzz"}, r"unknown pooler 'zzz'\. Choices: cls, mean, max, gem"),
        ({"pooler": "gem", "pooler_config": {"q": 3}}, "unknown option of pooler 'gem' 'q'.*apply_final_norm, p, eps"),
        ({"pooler": "gem", "pooler_config": {"p": "3"}}, "option 'p' of pooler 'gem' must be float, got '3'"),
        ({"image_size": 30}, "image size 30x30 is not divisible by the patch 16x16; 32x32 would be"),
        ({"image_size": [32, 41]}, "image size 32x41 is not divisible by the patch 16x16; 32x48 would be"),
        ({"image_size": 5}, "image size 5x5 is not divisible by the patch 16x16; 16x16 would be"),
        ({"image_size": [32]}, r"got \[32\]"),
        ({"image_size": 0}, "positive int.*got 0"),
        ({"image_size": [16, -16]}, r"positive int.*got \[16, -16\]"),
        ({"num_channels": 0}, "num_channels must be at least 1, got 0"),
        ({"num_channels": 4, "image_mean": [0.5] * 3}, "image_mean has 3 values for num_channels=4"),
        ({"image_std": [0.5]}, "image_std has 1 values for num_channels=3"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std must be positive, got \[0.5, 0, 0.5\]"),
        ({"out_features": ["stage99"]}, "stage_names.*'stage12'.*got.*stage99"),
        ({"encoder": "convnet", "image_size": 80}, "80x80 is not divisible by the last stage's .*; 64x64 would"),
        ({"encoder": "convnet", "encoder_config": {"model_type": "renset"}}, "did you mean 'resnet'.*convnextv2, timm"),
        ({"encoder": "convnet", "encoder_config": {"depth": [1]}}, "resnet' 'depth': did you mean 'depths'"),
        ({"encoder": "native", "encoder_config": {"model_type": "vti"}}, "model type 'vti': did you mean 'vit'"),
        ({"encoder": "native", "encoder_config": {"hiden_size": 8}}, "'hiden_size': did you mean 'hidden_size'"),
        ({"encoder": "native", "encoder_config": {"model_type": "bert"}}, "'bert' takes no images; those that do: .*"),
        ({"encoder": "native", "encoder_config": NATIVE_VIT, "image_size": 30}, "30x30 is not divisible .*; 32x32"),
    ],
)  # fmt: skip
def test_it_names_the_value_and_the_choices(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        MIMConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"image_size": "32"}, {"num_channels": 3.0}, {"encoder_config": "tiny"}])
def test_fields_of_a_wrong_type_are_named(fields):
    (name,) = fields
    with pytest.raises(StrictDataclassError, match=f"Validation error for field '{name}'"):
        MIMConfig(**fields)


def test_timm_options_are_refused_as_values():
    options = {"model_type": "timm", "model_name": "resnet18", "bogus": 1}
    with pytest.raises(ValueError, match="timm's 'resnet18' cannot be made with the options {'bogus': 1}"):
        MIMConfig(encoder="convnet", encoder_config=options)


@pytest.mark.parametrize(
    "value, annotation, wanted",
    [
        (3, int, True),
        (True, int, False),
        (1, bool, False),
        (3, float, True),
        (3.5, int, False),
        (None, int | None, True),
        (None, int, False),
        ([1, 2], int | tuple[int, int], True),
        ("a", str | list[str], True),
        (["a"], str | list[str], True),
        (("a",), str, False),
        (object(), "a string", True),
        ({}, dict, True),
    ],
)
def test_types_of_options(value, annotation, wanted):
    assert is_of(value, annotation) is wanted


# --- parts that only pretraining needs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target": "pixle"}, "unknown target 'pixle': did you mean 'pixel'"),
        ({"target_config": {"normalise": True}}, "target 'pixel' 'normalise': did you mean 'normalize'.*loss"),
        ({"target_config": {"loss": "huber"}}, "unknown loss of target 'pixel' 'huber'.*mse, l1, smooth_l1"),
        ({"decoder": "gru", "decoder_config": {}}, "unknown decoder 'gru'.*Choices: linear, mlp, transformer, cross"),
        (
            {"masking": "blok"},
            r"unknown mask generator 'blok': did you mean 'block'\? Choices: random, block, inverse_",
        ),
        ({"masking_config": {"ration": 0.5}}, "'random' 'ration': did you mean 'ratio'.*Choices: ratio, unit"),
        ({"masking_config": {"ratio": 1.2}}, r"mask ratio must be in \(0, 1\), got 1.2"),
        ({"masking_config": {"ratio": "0.6"}}, "option 'ratio' of mask generator 'random' must be float, got '0.6'"),
        ({"masking": "inverse_block", "masking_config": {"block_size": 0}}, "block_size must be at least 1 .*got 0"),
    ],
)
def test_only_pretraining_checks_masking_decoder_and_target(fields, message, tmp_path):
    config = tiny_config(**fields)
    model = MIMModel(config).eval()
    with pytest.raises(ValueError, match=message):
        MIMForPreTraining(config)
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 16, 16)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


# --- entries of one's own ----------------------------------------------------------------------------------------


class EdgeTarget(Target):
    """Horizontal differences inside each patch, summed."""

    scope = "all"

    def __init__(self, config, encoder, *, gain: float = 1.0):
        super().__init__()
        self.gain, self.outputs = gain, {"patches": config.num_channels}

    @torch.no_grad()
    def targets(self, pixel_values, grid):
        edges = pixel_values.diff(dim=3, append=pixel_values[..., -1:]).abs() * self.gain
        return {"patches": nn.functional.adaptive_avg_pool2d(edges, grid).flatten(2).transpose(1, 2)}

    def loss(self, predictions, values, bool_masked_pos, grid, generator=None):
        return (predictions["patches"] - values["patches"])[bool_masked_pos].square().mean()


class LastPooler(Pooler):
    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        return tokens[:, -1], None


def checker_mask(batch, grid, rngs, *, ratio: float = 0.5, unit: int = 1):
    board = np.indices(grid).sum(0).reshape(-1) % 2 == 0
    assert board.sum() == count_hidden(grid, ratio, unit)
    return torch.from_numpy(np.stack([board] * batch))


class ZeroDecoder(Decoder):
    def __init__(self, config, encoder, out_dim, *, value: float = 0.0):
        super().__init__(config, encoder)
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, encoded, bool_masked_pos, grid, scope):
        return self.bias.expand(len(encoded.tokens), grid[0] * grid[1], -1)


class AverageEncoder(Encoder):
    def __init__(self, config, use_mask_token=False, *, cell: int = 4):
        super().__init__()
        self.cell, self.hidden_size = cell, config.num_channels
        self.stage_names, self.num_features = ["stem"], [config.num_channels]
        self.scale = nn.Parameter(torch.ones(()))

    def mask_grid(self, height, width):
        return grid_size((height, width), (self.cell, self.cell), "cell")

    def forward(self, pixel_values, bool_masked_pos=None, output_hidden_states=False, output_attentions=False):
        tokens = nn.functional.avg_pool2d(pixel_values, self.cell).flatten(2).transpose(1, 2)
        if bool_masked_pos is not None:
            tokens = tokens.masked_fill(bool_masked_pos[..., None], 0)
        return EncoderOutput(tokens=tokens * self.scale)


@pytest.mark.parametrize(
    "entries, name, entry, fields",
    [
        (TARGETS, "edge", EdgeTarget, {"target": "edge", "target_config": {"gain": 2}}),
        (POOLERS, "last", LastPooler, {"pooler": "last"}),
        (MASK_GENERATORS, "checker", checker_mask, {"masking": "checker"}),
        (DECODERS, "zero", ZeroDecoder, {"decoder": "zero", "decoder_config": {"value": 1}}),
        (ENCODERS, "average", AverageEncoder, {"encoder": "average", "encoder_config": {"cell": 4}}),
    ],
)
def test_an_entry_of_one_s_own(entries, name, entry, fields, monkeypatch, tmp_path):
    monkeypatch.setitem(entries, name, entry)
    torch.manual_seed(0)
    config, pixel_values = tiny_config(**fields), torch.randn(2, 3, 16, 16)
    model = MIMForPreTraining(config)
    out = model(pixel_values)
    out.loss.backward()
    assert out.loss.isfinite() and model.decoder.state_dict()
    assert MIMModel(config)(pixel_values).pooler_output.shape[0] == 2
    model.save_pretrained(tmp_path)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    mask = out.bool_masked_pos
    assert torch.equal(again(pixel_values, mask).loss, model.eval()(pixel_values, mask).loss)
    with pytest.raises(ValueError, match=f"Choices: .*{name}"):
        MIMForPreTraining(tiny_config(**{key: v if "config" in key else "?" for key, v in fields.items()}))
    # Where the entry does not exist, encoder and pooler are needed, the others are not.
    monkeypatch.delitem(entries, name)
    if entries is ENCODERS or entries is POOLERS:
        with pytest.raises(ValueError, match=f"(encoder|pooler) '{name}' comes from the plug-in {__name__}"):
            AutoModel.from_pretrained(tmp_path)
    else:
        bare = AutoModel.from_pretrained(tmp_path)
        wanted = model.mim(pixel_values).last_hidden_state
        assert torch.equal(bare(pixel_values).last_hidden_state, wanted)
        with pytest.raises(ValueError, match=f"(target|generator|decoder) '{name}' comes from the plug-in {__name__}"):
            AutoModelForPreTraining.from_pretrained(tmp_path)


def test_a_convnext_of_the_config_has_its_stages():
    config = MIMConfig(image_size=64, encoder="convnet", encoder_config=CONVNEXT)
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
