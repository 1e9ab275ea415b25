"""Several teachers at once: standardised features, heads, statistics that are saved, and nothing hidden."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import RESNET, VIT, perturb, save_grey_vits, tiny_config
from rich.console import Console
from transformers import RadioConfig, RadioModel, ViTConfig, ViTModel

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.hub.card import make_card, teacher_row
from hf_mim.modeling import teachers
from hf_mim.modeling.standardisation import Moments, Standardiser, hadamard, phi_s_matrix
from hf_mim.training.commands.pretrain import pretrain


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Two teachers of different kinds and widths: a ViT of transformers and a ConvNet of this project."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    perturb(ViTModel(ViTConfig(**VIT, intermediate_size=32, image_size=32))).save_pretrained(folder / "vit")
    model = MIMModel(MIMConfig(image_size=64, encoder="convnet", encoder_config=RESNET))
    perturb(model, 0.05).eval().save_pretrained(folder / "resnet")
    return [str(folder / "vit"), str(folder / "resnet")]


def student(sources: list, target: str = "teacher_features", masking: str = "random", **options) -> MIMForPreTraining:
    torch.manual_seed(1)
    fields = {"target": target, "decoder": "mlp", "masking": masking}
    encoder = {"encoder_config": {"mask_style": "token"}}
    return MIMForPreTraining(
        tiny_config(image_size=32, **fields, **encoder, target_config={"teachers": sources, **options})
    )


def fitted(sources: list, **options) -> MIMForPreTraining:
    model = student(sources, **options)
    model.target.fit(torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5)).split(4))
    return model


# --- PHI-S -------------------------------------------------------------------------------------------------------


def test_hadamard_matrices_are_orthogonal_and_of_ones():
    for order in (1, 2, 4, 12, 20, 28, 36, 40, 112, 192, 320, 384, 768):  # both of Paley's, Sylvester's, products
        matrix = hadamard(order)
        assert matrix.abs().eq(1).all() and torch.equal(matrix @ matrix.T, order * torch.eye(order).double()), order
    assert all(hadamard(order) is None for order in (3, 6, 10, 18, 30, 52))


def test_phi_s_against_its_formulas():
    """(1 / phi) H U^T (x - mean), by numpy's SVD and scipy's Hadamard matrix, up to the signs of the components."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 16)) @ rng.normal(size=(16, 16)) + 3 * rng.normal(size=16)
    moments = Moments(16)
    for batch in np.array_split(features, 7):
        moments.add(torch.from_numpy(batch))
    part = Standardiser(16, "phi_s").double()
    part.fit(moments, "a layer")
    centred = features - features.mean(0)
    _, values, rows = np.linalg.svd(centred, full_matrices=False)
    rows *= np.sign(rows[np.arange(16), np.abs(rows).argmax(1)])[:, None]
    phi = np.sqrt((values**2 / 500).mean())
    expected = centred @ rows.T @ (scipy.linalg.hadamard(16) / 4).T / phi
    result = part(torch.from_numpy(features).float()).double().numpy()
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(result.var(0), 1, rtol=1e-4)  # every channel varies alike
    distances = [np.linalg.norm(values[:50, None] - values[None, :50], axis=2) for values in (features, result)]
    np.testing.assert_allclose(distances[1] * phi, distances[0], rtol=1e-4, atol=1e-4)  # and no distance is distorted


@pytest.mark.parametrize("dim", [12, 20, 28])
def test_phi_s_makes_channels_alike_for_widths_that_are_no_powers_of_two(dim):
    features = torch.randn(4000, dim).double() @ torch.randn(dim, dim).double()
    covariance = torch.cov(features.T, correction=0)
    matrix = phi_s_matrix(covariance)
    torch.testing.assert_close((matrix.T @ covariance @ matrix).diagonal(), torch.ones(dim).double())
    scaled = matrix @ matrix.T
    torch.testing.assert_close(scaled, scaled[0, 0] * torch.eye(dim).double(), atol=1e-9, rtol=0)


def test_moments_and_standard_against_numpy():
    features = torch.randn(90, 5) * torch.tensor([1.0, 10, 0.1, 3, 0]) + 1e4
    moments, part = Moments(5), Standardiser(5, "standard")
    for batch in features.split(11):
        moments.add(batch)
    mean, covariance = moments.result()
    np.testing.assert_allclose(mean.numpy(), features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(features.double().numpy().T, ddof=0), rtol=1e-9, atol=1e-9)
    part.fit(moments, "a layer")
    double = features.double().numpy()
    expected = (double - double.mean(0)) / np.where(double.std(0) > 0, double.std(0), 1)
    np.testing.assert_allclose(part(features).numpy(), expected, rtol=0, atol=0.02)  # float32 at 1e4
    with pytest.raises(ValueError, match="a layer gives features that are all the same"):
        constant = Moments(5)
        constant.add(torch.ones(9, 5))
        Standardiser(5, "phi_s" if hadamard(5) is not None else "standard").fit(constant, "a layer")


# --- the target --------------------------------------------------------------------------------------------------


def test_values_loss_and_weights_by_hand(sources):
    entries = [{"teacher": sources[0], "weight": 3}, {"teacher": sources[1], "loss": "l1"}]
    model = fitted(entries, norm="standard", global_weight=0.5)
    target, pixels = model.target, torch.randn(2, 3, 32, 32)
    values = target.targets(pixels, (8, 8))
    singles = []
    for source in sources:
        alone = fitted([source], norm="standard", global_weight=0.5).target
        singles.append(alone.targets(pixels, (8, 8)))
    for name in ("patches", "global"):
        assert torch.equal(values[name], torch.cat([single[name] for single in singles], -1))
    torch.testing.assert_close(values["global"][:, :16], values["patches"][..., :16].mean(1))
    mask = torch.rand(2, 64) < 0.5
    predicted = {name: torch.randn_like(value) for name, value in values.items()}
    loss = target.loss(predicted, values, mask, (8, 8))

    def cosine(name, part):
        return 1 - torch.nn.functional.cosine_similarity(predicted[name][..., part], values[name][..., part], -1)

    first, second = slice(0, 16), slice(16, None)
    error = predicted["patches"] - values["patches"]
    vit = error[mask][:, first].square().mean() + 0.5 * cosine("global", first).mean()
    resnet = error[mask][:, second].abs().mean() + 0.5 * cosine("global", second).mean()
    torch.testing.assert_close(loss, (3 * vit + resnet) / 4)
    metrics = target.train().log_metrics() or {}
    assert metrics == {"teacher_1_loss": pytest.approx(vit.item()), "teacher_2_loss": pytest.approx(resnet.item())}
    assert target.log_metrics() == {}


@pytest.mark.parametrize("inference", [False, True])
def test_two_entries_of_one_teacher_run_it_once_for_a_batch(sources, inference):
    """All have said which layers they need when they were made. In inference mode, which does not count changes of
    images, each runs it."""
    vit = sources[0]
    entries = [vit, {"teacher": vit, "layers": [0], "loss": "l1"}, {"teacher": vit, "layers": [-1], "norm": "none"}]
    teachers.LOADED.clear()
    target, alone = student(entries, norm="layer").target, [student([e], norm="layer").target for e in entries]
    runs: list[torch.Tensor] = []
    hook = target.teachers[0].model().encoder.register_forward_pre_hook(lambda module, given: runs.append(given[0]))
    for seed in range(3):
        with torch.inference_mode(inference):
            pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            values = target.targets(pixels, (8, 8))["patches"]
            singles = [single.targets(pixels, (8, 8))["patches"] for single in alone]
        assert len(runs) == (6 if inference else 1)
        assert torch.equal(values, torch.cat(singles, dim=-1))
        runs.clear()
        if not inference:
            assert torch.equal(target.targets(pixels, (8, 8))["patches"], values) and not runs
            pixels.mul_(2)  # other images in the same memory
            assert not torch.equal(target.targets(pixels, (8, 8))["patches"], values) and len(runs) == 1
            runs.clear()
    hook.remove()


def test_each_teacher_has_a_head_of_its_own(sources):
    model = fitted(sources, global_weight=1.0).train()
    assert len(model.decoder.heads) == len(model.global_head.heads) == 2
    loss = model.target.loss
    model.target.loss = lambda predictions, *rest: predictions["patches"][..., :16].sum()
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    model.target.loss = loss
    first, second = (
        [p.grad is not None and p.grad.abs().sum() > 0 for p in h.parameters()] for h in model.decoder.heads
    )
    assert all(first) and not any(second)


def test_statistics_are_saved_and_come_back_bit_for_bit(sources, tmp_path):
    model = fitted(sources)
    assert model.target.images_to_fit() == 0
    pixels, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 64) < 0.5
    before = model(pixels, mask)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["target_config"]["feature_dims"] == [[16], [20]]
    teachers.LOADED.clear()
    again = MIMForPreTraining.from_pretrained(tmp_path)
    assert not teachers.LOADED  # built without the teachers
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    after = again(pixels, mask)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert MIMModel.from_pretrained(tmp_path)(pixels).last_hidden_state.shape == (2, 65, 16)
    assert teacher_row(again.config) == "vit; resnet"


def test_without_statistics_it_is_said(sources, tmp_path):
    model = student(sources)
    assert model.target.images_to_fit() == 1024
    with pytest.raises(ValueError, match=r"call model\.target\.fit"):
        model(torch.randn(2, 3, 32, 32))
    plain = fitted(sources, norm="layer")
    assert plain.target.images_to_fit() == 0
    plain.save_pretrained(tmp_path)  # statistics that a checkpoint lacks are unknown, not empty memory
    config = MIMConfig.from_pretrained(tmp_path)
    config.target_config["norm"] = "phi_s"
    assert MIMForPreTraining.from_pretrained(tmp_path, config=config).target.images_to_fit() == 1024


def test_what_cannot_be_is_refused(sources, tmp_path):
    vit, resnet = sources
    for options, message in (
        ({"sources": []}, "needs target_config.teachers"),
        ({"sources": [vit, {"weight": 1}]}, r"teachers\[1\] has no name"),
        ({"sources": [vit, vit]}, "is there twice"),
        ({"sources": [vit, {"teacher": vit, "weight": 2}]}, "is there twice"),
        (
            {"sources": [vit, {"teacher": resnet, "weight": 2}], "weights": [1.0, 1.0]},
            "by the teachers' entries and by",
        ),
        ({"sources": [vit, resnet], "weights": [1.0]}, "1 weights are given for 2 teachers"),
        ({"sources": [vit, resnet], "weights": [1.0, -1.0]}, "at least 0, got -1"),
        ({"sources": [vit], "weights": [0.0]}, "nothing to learn"),
        ({"sources": [{"teacher": vit, "layer": [1]}]}, "did you mean 'layers'"),
        ({"sources": [vit], "norm": "phis"}, "did you mean 'phi_s'"),
        ({"sources": [vit, {"teacher": resnet, "match": "stage"}]}, "has a grid of 1x1, the student one of 8x8"),
        ({"sources": [str(tmp_path)]}, "as a teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            student(**options)


def test_a_remote_code_teacher_is_refused_with_the_reason(tmp_path):
    config = {"model_type": "theia", "auto_map": {"AutoConfig": "theia.Config", "AutoModel": "theia.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="brings Python code"):
        student([str(tmp_path)])


def test_radio_as_a_teacher(tmp_path):
    """transformers' own RADIO, which normalises pixels itself; its tokens against a call of its own."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "max_img_size": 64}
    network = RadioModel(RadioConfig(**size, image_size=32)).eval()
    perturb(network).save_pretrained(tmp_path)
    model = student([str(tmp_path)], norm="none")
    pixels = torch.randn(2, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in model.config.statistics())
    features = network(pixels * std + mean).features
    values = model.target.targets(pixels, (8, 8))["patches"]
    torch.testing.assert_close(values, features, rtol=1e-4, atol=1e-4)


def test_a_grey_teacher_of_a_student_of_colours(tmp_path):
    """The weights of PIL's `convert("L")`, on pixels in [0, 1]."""
    torch.manual_seed(0)
    perturb(MIMModel(tiny_config(image_size=32, num_channels=1))).save_pretrained(tmp_path)
    model = student([str(tmp_path)], norm="none")
    pixels = torch.randn(2, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in model.config.statistics())
    grey = ((pixels * std + mean) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    expected = MIMModel.from_pretrained(tmp_path)((grey - 0.5) / 0.5).last_hidden_state[:, 1:]
    torch.testing.assert_close(model.target.targets(pixels, (8, 8))["patches"], expected, rtol=1e-4, atol=1e-4)
    assert model.target.teachers[0].describe_match((32, 32), (8, 8)) == "input 32x32, grey"


# --- nothing is hidden -------------------------------------------------------------------------------------------


def test_whole_images_are_encoded_and_every_token_is_learned(sources):
    model = fitted(sources, masking="none").eval()
    assert model.mim.encoder.mask_token is None  # no parameter without a gradient
    pixels = torch.randn(2, 3, 32, 32)
    outputs = model(pixels)
    assert not outputs.bool_masked_pos.any()
    tokens = model.mim(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(
        outputs.logits, torch.cat([h.head(h.layers(tokens), (8, 8)) for h in model.decoder.heads], -1)
    )
    error = (outputs.logits - model.target.targets(pixels, (8, 8))["patches"]).square()
    torch.testing.assert_close(outputs.loss, (error[..., :16].mean() + error[..., 16:].mean()) / 2)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    shown = model.reconstruct(pixels, with_target=True)
    assert torch.equal(shown.combined, shown.prediction) and "Nothing was hidden" in shown.note
    with pytest.raises(ValueError, match="masking 'none'"):
        model(pixels, torch.ones(2, 64, dtype=torch.bool))


def test_a_dropping_encoder_keeps_all_tokens_where_nothing_is_hidden(sources):
    config = tiny_config(image_size=32, masking="none", decoder="linear", encoder_config={"mask_style": "drop"})
    model = MIMForPreTraining(config)
    outputs = model(torch.randn(2, 3, 32, 32))
    assert outputs.logits.shape[1] == 64 and math.isfinite(outputs.loss.item())
    with pytest.raises(ValueError, match="masks_per_image must be 1"):
        MIMForPreTraining(tiny_config(image_size=32, masking="none", masks_per_image=2))
    with pytest.raises(ValueError, match="model.masking=none hides nothing"):
        MIMForPreTraining(tiny_config(image_size=32, masking_config={"ratio": 0}))


def test_a_convnet_learns_on_the_grid_of_its_last_map(sources):
    config = MIMConfig(
        image_size=64,
        encoder="convnet",
        encoder_config=RESNET,
        masking="none",
        decoder="mlp",
        target="teacher_features",
        target_config={"teachers": sources, "norm": "layer"},
    )
    model = MIMForPreTraining(config)
    assert model.mask_grid(64, 64) == (2, 2) and model.mim.encoder.mask_grid(64, 64) == (4, 4)
    assert model(torch.randn(2, 3, 64, 64)).logits.shape == (2, 4, 16 + 20)


# --- a run -------------------------------------------------------------------------------------------------------


RUN = [
    "model.image_size=16",
    "model.encoder_config={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 4}",
    "model.masking=none",
    "model.decoder=mlp",
    "model.target=teacher_features",
    "data.max_train_images=64",
    "data.max_eval_images=0",
    "training.num_train_epochs=2",
    "training.save_strategy=epoch",
    "training.save_total_limit=5",
    "training.logging_steps=1",
    "training.bf16=false",
    "training.warmup_steps=0",
]


@pytest.fixture
def grey_sources(tmp_path) -> list[str]:
    return save_grey_vits(tmp_path)


def test_a_run_estimates_saves_and_resumes_and_the_card_names_all_teachers(grey_sources, tmp_path):
    out = io.StringIO()
    first, second = grey_sources
    teachers_of_run = (
        f"model.target_config={{teachers: [{first}, {{teacher: {second}, match: interpolate, input_size: 32}}]}}"
    )
    words = [*RUN, teachers_of_run, "model.target_config.statistics_images=48", "model.target_config.global_weight=1.0"]
    folder = tmp_path / "run"
    pretrain("quick", [*words, f"training.output_dir={folder}"], Console(file=out, width=250))
    printed = out.getvalue()
    assert "estimated on up to 48 training images" in printed and "8x8 tokens interpolated" in printed
    whole = MIMForPreTraining.from_pretrained(folder).state_dict()
    statistics = [name for name in whole if "standardisers" in name]
    assert len(statistics) == 6 and all(whole[name].any() for name in statistics)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {row["teacher"] for row in metrics["teacher"]} == set(grey_sources)
    assert "vit12; vit16" in str(make_card(folder, "me/student"))
    log = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("watch_teacher_2_loss" in entry for entry in log)
    for name in ("checkpoint-2", "model.safetensors", "config.json"):  # as if it had been killed after the first epoch
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pretrain(str(folder), ["training.resume=true"], Console(file=io.StringIO()))
    again = MIMForPreTraining.from_pretrained(folder).state_dict()
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
