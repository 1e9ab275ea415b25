"""The commands `teacher` and `codebook`, and token diversity."""

import pytest
import torch
from helpers import RESNET, VIT
from rich.console import Console
from safetensors.torch import load_file

from hf_mim import MIMConfig, MIMModel
from hf_mim.cli import main
from hf_mim.modeling.target_discrete import nearest_code
from hf_mim.training.metrics import token_diversity
from hf_mim.training.teacher import report_usage


def test_token_diversity_against_a_loop():
    torch.manual_seed(0)
    tokens = torch.randn(3, 7, 5) + 1
    raw, centred, residual = [], [], []
    for image in tokens.double():
        for values, found in ((image, raw), (image - image.mean(0), centred)):
            cosines = [
                torch.dot(values[i], values[j]) / (values[i].norm() * values[j].norm())
                for i in range(7)
                for j in range(7)
                if i != j
            ]
            found.append(1 - sum(cosines) / len(cosines))
        residual.append((image - image.mean(0)).norm() / image.norm())
    diversity = token_diversity(tokens)
    for name, found in (("raw", raw), ("centred", centred), ("residual", residual)):
        assert diversity[name] == pytest.approx(torch.stack(found).mean().item(), rel=1e-9)


def test_token_diversity_at_its_ends():
    assert token_diversity(torch.ones(2, 6, 4))["raw"] == pytest.approx(0, abs=1e-12)
    assert token_diversity(torch.eye(6)[None])["raw"] == pytest.approx(1, abs=1e-12)
    pairs = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[None]
    assert token_diversity(pairs)["raw"] == pytest.approx(2.0)  # tokens / (tokens - 1)


def test_teacher_shows_every_layer(tmp_path, capsys):
    MIMModel(MIMConfig(image_size=32, encoder="convnet", encoder_config=RESNET)).save_pretrained(tmp_path / "resnet")
    assert main(["teacher", str(tmp_path / "resnet"), "data.max_eval_images=0"]) == 0
    shown = capsys.readouterr().out
    for words in ("stem", "stage4", "8x8", "1x1", "images/s", "20"):
        assert words in shown
    assert main(["teacher", str(tmp_path / "absent")]) == 2
    assert "as a teacher" in capsys.readouterr().err


def test_codebook_is_written_and_fits_the_target(tmp_path, capsys):
    options = {"image_size": 28, "num_channels": 1, "encoder_config": {**VIT, "patch_size": 4}}
    MIMModel(MIMConfig(**options)).save_pretrained(tmp_path / "vit")
    out = tmp_path / "codes.safetensors"
    assert main(["codebook", str(tmp_path / "vit"), str(out), "--codes", "16", "--images", "64"]) == 0
    assert load_file(out)["codes"].shape == (16, 16) and "perplexity" in capsys.readouterr().out
    assert main(["codebook", str(tmp_path / "vit"), str(out), "--codes", "5000", "--images", "64"]) == 2
    assert "too few for 5000 codes" in capsys.readouterr().err


def test_usage_counts_dead_codes(tmp_path, capsys):
    codes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0], [7.0, 7.0]])
    features = torch.cat([torch.zeros(10, 2), torch.ones(10, 2)])
    assert nearest_code(features, codes).tolist() == [0] * 10 + [1] * 10
    usage = report_usage(codes, features, tmp_path / "x", Console())
    assert usage == {"perplexity": pytest.approx(2.0), "dead": 2} and "warning" in capsys.readouterr().out
