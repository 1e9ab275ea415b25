"""Checkpoints of every format version load and give what they gave; those of a newer version are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from hf_mim import MIMBackbone, MIMConfig, cli
from hf_mim.modeling.configuration_base import FORMAT_VERSION


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_checkpoint_of_every_version_gives_what_it_gave(version):
    folder = FIXTURES / f"checkpoint_v{version}"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    expected = load_file(folder / "expected.safetensors")
    config = AutoConfig.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["format_version"] == version
    assert config.format_version == FORMAT_VERSION
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == config.image_mean and processor.size["height"] == config.image_size
    pixel_values = expected["pixel_values"]
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folder)(pixel_values).last_hidden_state
        out = AutoModelForPreTraining.from_pretrained(folder)(pixel_values, expected["bool_masked_pos"])
        classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=2)
        again = classifier.mim(pixel_values).last_hidden_state
        MIMBackbone.from_pretrained(folder)(pixel_values)
    # Not bit for bit: other processors and versions of torch add up in another order.
    for name, found in {"last_hidden_state": tokens, "logits": out.logits, "loss": out.loss}.items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(tokens, again)


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        ({"target": "hog"}, "target_config", {"window": True, "angle_from": "horizontal"}),
        ({"target": "moving_average"}, "target_config", {"global_head": "mlp", "reduction": "mean"}),
        ({"decoder": "conv"}, "decoder_config", {"embed": True, "hidden": "token", "layer_norm_eps": 1e-6}),
    ],
)
def test_what_has_another_default_since_version_1_stays_what_it_was(fields, options, expected, tmp_path):
    old = AutoConfig.from_pretrained(FIXTURES / "checkpoint_v1").to_dict() | fields
    old |= {"format_version": 1, "target_config": {}, "decoder_config": {}}
    loaded = MIMConfig.from_dict(old)
    assert getattr(loaded, options) == expected and loaded.format_version == FORMAT_VERSION
    loaded.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), options) == expected
    assert getattr(MIMConfig.from_dict(old | {"format_version": FORMAT_VERSION}), options) == {}


def test_wrapped_targets_of_version_1_stay_what_they_were():
    features = {"name": "hog", "cell_size": 2}
    old = {"format_version": 1, "target": "token_morphing", "target_config": {"features": features, "num_draws": 1}}
    upgraded = MIMConfig.from_dict(old).target_config
    assert upgraded["features"] == {**features, "window": True, "angle_from": "horizontal"}


def newer(folder: Path) -> Path:
    """A checkpoint of the next version, with an encoder that only that one knows."""
    shutil.copytree(FIXTURES / "checkpoint_v1", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"format_version": FORMAT_VERSION + 1, "encoder": "mamba", "image_size": {"height": 16}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_newer_checkpoint_is_refused_with_what_to_do(tmp_path):
    folder = newer(tmp_path / "newer")
    for auto in (AutoConfig, AutoModel, AutoModelForPreTraining):
        with pytest.raises(
            ValueError, match=f"newer hf_mim.*format version is {FORMAT_VERSION + 1}.*pip install -U hf_mim"
        ):
            auto.from_pretrained(folder)


def test_the_command_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert cli.main(["reconstruct", str(newer(tmp_path / "newer")), str(Path(__file__))]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: cannot load ")
        and "this checkpoint was made by a newer hf_mim" in said
        and said.count("\n") == 1
    )
