"""The commands `teacher` and `codebook`, and token diversity."""

import io
import json
import math

import pytest
import torch
from helpers import RESNET, VIT
from rich.console import Console
from safetensors.torch import load_file, save_file

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.cli import main
from hf_mim.modeling.target_discrete import nearest_code
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.commands.teacher import report_usage
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.feature_statistics import token_diversity


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
    assert "there is no such folder" in capsys.readouterr().err


def test_codebook_is_written_and_fits_the_target(tmp_path, capsys):
    options = {"image_size": 28, "num_channels": 1, "encoder_config": {**VIT, "patch_size": 4}}
    MIMModel(MIMConfig(**options)).save_pretrained(tmp_path / "vit")
    out = tmp_path / "codes.safetensors"
    assert main(["codebook", str(tmp_path / "vit"), str(out), "--codes", "16", "--images", "64"]) == 0
    assert load_file(out)["codes"].shape == (16, 16) and "perplexity" in capsys.readouterr().out
    assert main(["codebook", str(tmp_path / "vit"), str(out), "--codes", "5000", "--images", "64", "--force"]) == 2
    assert "too few for 5000 codes" in capsys.readouterr().err


def test_codes_against_scikit_learn():
    from sklearn.cluster import KMeans

    features = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    kmeans = KMeans(9, n_init=1, random_state=0).fit(features.numpy())
    found = nearest_code(features, torch.from_numpy(kmeans.cluster_centers_))
    assert found.tolist() == kmeans.predict(features.numpy()).tolist() == kmeans.labels_.tolist()


def test_usage_counts_dead_codes(tmp_path, capsys):
    codes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0], [7.0, 7.0]])
    features = torch.cat([torch.zeros(10, 2), torch.ones(10, 2)])
    assert nearest_code(features, codes).tolist() == [0] * 10 + [1] * 10
    usage = report_usage(codes, features, tmp_path / "x", Console())
    assert usage == {"perplexity": pytest.approx(2.0), "dead": 2} and "warning" in capsys.readouterr().out


# --- during a run ------------------------------------------------------------------------------------------------


def small_run(folder, target: str, options: str) -> tuple[str, dict, list[dict]]:
    """A run of four steps of 16 images: what it printed, its metrics.json and its log."""
    out = io.StringIO()
    words = [f"training.output_dir={folder}", f"model.target={target}", f"model.target_config={options}"]
    words += ["model.encoder_config.num_hidden_layers=1", "model.encoder_config.hidden_size=16"]
    words += ["data.max_train_images=64", "data.max_eval_images=0", "training.per_device_train_batch_size=16"]
    words += ["training.max_steps=4", "training.watch_every=4", "training.save_strategy=steps", "training.save_steps=4"]
    pretrain("maskfeat_small", words, Console(file=out, width=400))
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return out.getvalue(), json.loads((folder / "metrics.json").read_text()), state["log_history"]


def test_a_run_says_how_diverse_its_teacher_is(tmp_path):
    config = MIMConfig(image_size=28, num_channels=1, encoder_config={**VIT, "patch_size": 4})
    MIMModel(config).save_pretrained(tmp_path / "vit")
    options = f"{{teacher: {tmp_path / 'vit'}, layers: [-2, -1], match: interpolate}}"
    said, written, log = small_run(tmp_path / "run", "teacher_feature", options)
    model = MIMForPreTraining.from_pretrained(tmp_path / "run")
    splits = load_splits(DataArguments(max_train_images=64, max_eval_images=0), model.config, seed=42)  # the run's
    (images,) = frozen.pixel_loader(splits.train.without_augmentation(), model.config, 64)
    teacher = MIMModel.from_pretrained(tmp_path / "vit")
    stages = teacher.encoder(images, output_hidden_states=True).hidden_states[-2:]
    for row, tokens in zip(written["teacher"], stages, strict=True):
        assert row["grid"] == [7, 7] and row["layer"] in ("stage1", "stage2")
        wanted = token_diversity(teacher.encoder.final_norm(tokens)[:, 1:])
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
        assert f"{row['layer']}: token diversity {row['raw']:.3f}" in said
        (first,) = [entry for entry in log if f"teacher_diversity_{row['layer']}" in entry]
        assert first["step"] == 0 and first[f"teacher_diversity_centred_{row['layer']}"] == row["centred"]


def test_a_run_warns_of_codes_that_are_never_used(tmp_path):
    codes = torch.cat([torch.rand(8, 36), 100 + torch.rand(8, 36)])
    save_file({"codes": codes}, tmp_path / "codes.safetensors")
    options = f"{{codebook: {tmp_path / 'codes.safetensors'}, features: {{name: hog}}}}"
    said, _, log = small_run(tmp_path / "run", "discrete_token", options)
    (look,) = [entry for entry in log if "watch_dead_codes" in entry]
    assert 8 <= look["watch_dead_codes"] < 16 and 1 <= look["watch_code_perplexity"] <= 8
    assert f"warning: {look['watch_dead_codes']} of 16 codes are never used" in said and "hf-mim codebook" in said


def test_figures_count_the_codes_of_training_only(tmp_path):
    save_file({"codes": torch.tensor([[0.0] * 3, [1.0] * 3, [9.0] * 3])}, tmp_path / "codes.safetensors")
    options = {"codebook": str(tmp_path / "codes.safetensors"), "features": {"name": "pixel", "normalize": False}}
    config = MIMConfig(image_size=8, encoder_config={**VIT, "patch_size": 1}, target="discrete_token")
    config.target_config = options
    target, images = MIMForPreTraining(config).target, torch.zeros(1, 3, 8, 8)
    images[:, :, :2] = 1  # 16 of 64 pixels
    target.eval().targets(images, (8, 8))
    assert target.log_metrics() == {}
    target.train().targets(images, (8, 8))
    wanted = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert target.log_metrics() == {"code_perplexity": pytest.approx(wanted), "dead_codes": 1}
    assert target.log_metrics() == {}  # they count from the last call
