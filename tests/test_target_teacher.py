"""Targets that come from another model: teachers, the moving average, codes."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import RESNET, VIT, perturb, random_masks, tiny_config
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel, ViTConfig, ViTImageProcessor, ViTModel

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.modeling import teachers
from hf_mim.modeling.encoder_base import tokens_to_map
from hf_mim.modeling.target_base import feature_colours
from hf_mim.modeling.target_teacher import normalise_features


@pytest.fixture
def vit_folder(tmp_path):
    """A ViT of transformers with its own normalisation."""
    torch.manual_seed(0)
    config = ViTConfig(**VIT, intermediate_size=32, image_size=32)
    perturb(ViTModel(config)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.fixture
def resnet_folder(tmp_path):
    torch.manual_seed(0)
    model = MIMModel(MIMConfig(image_size=64, encoder="convnet", encoder_config=RESNET))
    perturb(model, 0.05).eval().save_pretrained(tmp_path / "resnet")
    return str(tmp_path / "resnet")


def student(target: str = "teacher_feature", **options) -> MIMForPreTraining:
    return MIMForPreTraining(tiny_config(image_size=32, target=target, target_config=options))


def test_values_are_the_teachers_normalised_tokens(vit_folder):
    """By hand: undo the student's normalisation, apply the teacher's, run it, LayerNorm each token."""
    model = student(teacher=vit_folder)
    pixel_values = torch.randn(2, 3, 32, 32)
    own, theirs = (
        [torch.tensor(v)[:, None, None] for v in pair]
        for pair in ((model.config.image_mean, model.config.image_std), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    )
    pixels = (pixel_values * own[1] + own[0] - theirs[0]) / theirs[1]
    tokens = AutoModel.from_pretrained(vit_folder).eval()(pixels).last_hidden_state[:, 1:]
    wanted = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.target.targets(pixel_values, (8, 8))["patches"], wanted, rtol=1e-4, atol=1e-4)


def test_normalisations_against_numpy():
    features = torch.randn(2, 9, 5)
    double = features.double().numpy()
    for norm, axis in (("layer", 2), ("instance", 1)):
        wanted = (double - double.mean(axis, keepdims=True)) / np.sqrt(double.var(axis, keepdims=True) + 1e-5)
        np.testing.assert_allclose(normalise_features(features, norm).numpy(), wanted, rtol=0, atol=1e-5)
    assert normalise_features(features, "none") is features


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"match": "input"}, (256, 256)),  # stride 32 on 8 x 8 tokens
        ({"match": "stage", "layers": [2], "input_size": 64}, (64, 64)),  # stride 8
        ({"match": "interpolate", "input_size": [64, 96]}, (64, 96)),
    ],
)
def test_ways_to_match_the_grid(resnet_folder, options, size):
    model = student(teacher=resnet_folder, norm="none", **options)
    teacher = model.target.teacher.model()
    seen = []
    hook = teacher.encoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    pixel_values = torch.randn(2, 3, 32, 32)
    values = model.target.targets(pixel_values, (8, 8))["patches"]
    hook.remove()
    assert seen[-1] == size and values.shape == (2, 64, model.target.outputs["patches"])
    pixels = torch.nn.functional.interpolate(pixel_values, size=size, mode="bicubic", antialias=True)
    maps = teacher.encoder(pixels).feature_maps[options.get("layers", [-1])[0]]
    wanted = torch.nn.functional.interpolate(maps, size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(tokens_to_map(values, (8, 8)), wanted, rtol=1e-3, atol=1e-3)


def save_timm(folder, **model_args):
    pretrained_cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = TimmWrapperConfig(architecture="resnet10t", pretrained_cfg=pretrained_cfg, num_labels=2)
    TimmWrapperModel(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "model_args": model_args}))


def test_a_timm_teacher(tmp_path):
    save_timm(tmp_path)
    model = student(teacher=str(tmp_path), norm="none", match="interpolate", input_size=64)
    pixel_values = torch.randn(2, 3, 32, 32)
    values = model.target.targets(pixel_values, (8, 8))["patches"]
    pixels = torch.nn.functional.interpolate(pixel_values, size=(64, 64), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in model.config.statistics())
    network = TimmWrapperModel.from_pretrained(tmp_path).timm_model.eval()
    with torch.no_grad():
        features = network.forward_features(((pixels * std + mean) - 0.5) / 0.5)
    wanted = torch.nn.functional.interpolate(features, size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(tokens_to_map(values, (8, 8)), wanted, rtol=1e-3, atol=1e-3)


def test_a_teacher_opens_no_file_that_its_config_names_and_runs_no_code(tmp_path):
    save_timm(tmp_path / "timm", checkpoint_path=str(tmp_path / "weights.pth"))
    (tmp_path / "code").mkdir()
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config", "AutoModel": "strange.Model"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name, message in (("timm", "options of timm that load files are refused.*checkpoint_path"), ("code", "code")):
        with pytest.raises(ValueError, match=f"cannot use '{tmp_path / name}' as a teacher: .*{message}"):
            student(teacher=str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_dilation_keeps_the_grid_fine(tmp_path):
    options = {"model_type": "timm", "model_name": "resnet10t"}
    MIMModel(MIMConfig(image_size=64, encoder="convnet", encoder_config=options)).save_pretrained(tmp_path)
    model = MIMForPreTraining(
        tiny_config(
            image_size=64,
            encoder_config={"patch_size": 8},
            target="teacher_feature",
            target_config={"teacher": str(tmp_path), "match": "dilate"},
        )
    )
    assert model.target.targets(torch.randn(1, 3, 64, 64), (8, 8))["patches"].shape == (1, 64, 512)


def test_several_layers_side_by_side_or_averaged(vit_folder):
    pixel_values, mask = torch.randn(2, 3, 32, 32), random_masks(2, 64, 40)
    concat = student(teacher=vit_folder, layers=[1, 2], loss="mse").target
    mean = student(teacher=vit_folder, layers=["stage1", "stage2"], combine="mean").target
    values = concat.targets(pixel_values, (8, 8))["patches"]
    assert concat.outputs == {"patches": 32} and mean.outputs == {"patches": 16}
    torch.testing.assert_close(
        mean.targets(pixel_values, (8, 8))["patches"], (values[..., :16] + values[..., 16:]) / 2, rtol=1e-4, atol=1e-5
    )
    predicted = torch.randn(2, 40, 32)
    loss = concat.loss({"patches": predicted}, {"patches": values}, mask, (8, 8))
    error = (predicted - values[mask].view(2, 40, 32)).double().square()
    torch.testing.assert_close(loss.double(), (error[..., :16].mean() + error[..., 16:].mean()) / 2)


def test_global_and_cosine_terms_by_hand(vit_folder):
    target = student(teacher=vit_folder, loss="cosine", global_weight=0.5).target
    predicted, wanted, mask = torch.randn(2, 64, 16), torch.randn(2, 64, 16), random_masks(2, 64, 40)
    ends = torch.randn(2, 16), torch.randn(2, 16)
    loss = target.loss({"patches": predicted, "global": ends[0]}, {"patches": wanted, "global": ends[1]}, mask, (8, 8))

    def cosine(a, b):
        return (a.double() * b.double()).sum(-1) / (a.double().norm(dim=-1) * b.double().norm(dim=-1))

    by_hand = (1 - cosine(predicted, wanted))[mask].mean() + 0.5 * (1 - cosine(*ends)).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_teacher_is_outside_runs_once_and_is_shared(vit_folder, tmp_path):
    first, second = student(teacher=vit_folder), student(teacher=vit_folder, norm="none")
    assert first.target.teacher.model() is second.target.teacher.model()
    first.target.targets(torch.randn(1, 3, 32, 32), (8, 8))  # reads off the strides
    runs = []
    hook = first.target.teacher.model().encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    pixel_values = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        first(pixel_values).loss.backward()
    hook.remove()
    assert len(runs) == 1
    teacher = first.target.teacher.model()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name or "network" in name for name in first.state_dict())
    before = first.target.targets(pixel_values, (8, 8))["patches"]
    pixel_values.square_()  # the same tensor with other values is another batch
    assert not torch.equal(first.target.targets(pixel_values, (8, 8))["patches"], before)
    first.save_pretrained(tmp_path / "student")
    teachers.LOADED.clear()
    again = MIMForPreTraining.from_pretrained(tmp_path / "student")
    assert not teachers.LOADED  # built without the teacher
    again.config.target_config["teacher"] = "nowhere"
    again.save_pretrained(tmp_path / "orphan")
    orphan = MIMForPreTraining.from_pretrained(tmp_path / "orphan")
    assert torch.equal(orphan.mim(pixel_values).last_hidden_state, first.mim(pixel_values).last_hidden_state)
    with pytest.raises(ValueError, match="cannot use 'nowhere' as a teacher"):
        orphan(pixel_values)


def test_teachers_that_do_not_fit(vit_folder, resnet_folder, tmp_path):
    from transformers import BertConfig, BertModel

    tiny = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    BertModel(BertConfig(**tiny)).save_pretrained(tmp_path / "bert")
    for options, message in (
        ({"teacher": str(tmp_path / "absent")}, "as a teacher"),
        ({"teacher": str(tmp_path / "bert")}, "as a teacher"),
        ({}, "needs target_config.teacher"),
        ({"teacher": vit_folder, "layers": [7]}, "has no layer 7"),
        ({"teacher": vit_folder, "layers": ["stage9"]}, "did you mean"),
        ({"teacher": vit_folder, "match": "inputt"}, "did you mean 'input'"),
        ({"teacher": vit_folder, "loss": "l3"}, "loss of target"),
        ({"teacher": resnet_folder, "layers": [2, 3], "combine": "mean"}, "layers of one width"),
    ):
        with pytest.raises(ValueError, match=message):
            student(**options)
    for options, message in (
        ({"layers": [2, 3]}, "choose match 'interpolate'"),
        ({"match": "stage"}, "choose other layers"),
    ):
        with pytest.raises(ValueError, match=message):  # when the model is made, before any training
            student(teacher=resnet_folder, **options)


def test_feature_colours_are_principal_components():
    features = torch.randn(3, 12, 8)
    picture = feature_colours(features, (3, 4), (6, 8))
    assert picture.shape == (3, 3, 6, 8) and picture.min() == 0 and picture.max() == 1
    wanted = PCA(3, svd_solver="full").fit_transform(features.flatten(0, 1).double().numpy()).reshape(3, 12, 3)
    ours = picture[:, :, ::2, ::2].flatten(2).transpose(1, 2).flatten(0, 1).double().numpy()
    for component in range(3):
        assert abs(np.corrcoef(wanted.reshape(-1, 3)[:, component], ours[:, component])[0, 1]) > 1 - 1e-6


# --- the moving average ------------------------------------------------------------------------------------------


def test_moving_average_against_its_formula():
    model = student("moving_average", decay=0.5, end_decay=0.9, decay_steps=4)
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    teacher = model.target.average.teacher
    expected = {name: p.detach().clone().double() for name, p in teacher.named_parameters()}
    for step, decay in ((1, 0.6), (2, 0.7), (9, 0.9)):
        perturb(model.mim.encoder)
        model.target.update(step)
        for name, parameter in model.mim.encoder.named_parameters():
            if name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_moving_average_values_by_hand():
    """Instance norm of each block's MLP output over the patches, mean of the last two, LayerNorm (data2vec 2.0)."""
    model = student("moving_average", top_k_blocks=2)
    pixel_values = torch.randn(2, 3, 32, 32)
    model.target.bind(model.mim.encoder)
    values = model.target.targets(pixel_values, (8, 8))["patches"]
    encoder = copy.deepcopy(model.mim.encoder).eval()
    with torch.no_grad():
        tokens, _, _ = encoder._embed(pixel_values, None, (8, 8))
        outputs = []
        for layer in encoder.layers:
            middle = tokens + layer.attention(layer.norm1(tokens))[0]
            outputs.append(layer.mlp(layer.norm2(middle)))
            tokens = middle + outputs[-1]
    total = 0
    for out in outputs[-2:]:
        patches = out[:, 1:].double()
        total = total + (patches - patches.mean(1, keepdim=True)) / (patches.var(1, False, keepdim=True) + 1e-5).sqrt()
    mean = total / 2
    wanted = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(values.double(), wanted, rtol=1e-4, atol=1e-4)
    assert values.mean(-1).abs().max() < 1e-5 and (values.var(-1, False) - 1).abs().max() < 1e-2


def test_moving_average_is_kept_out_of_the_weights_and_comes_back_on_resume():
    model = student("moving_average", decay=0.9, end_decay=0.9)
    pixel_values = torch.randn(2, 3, 32, 32)
    model(pixel_values)
    perturb(model.mim.encoder)
    model.target.update(1)
    assert not any("average" in name or "teacher" in name for name in model.state_dict())
    again = student("moving_average", decay=0.9, end_decay=0.9)
    again.load_state_dict(model.state_dict())
    again.target.load_moving_state({name: value.clone() for name, value in model.target.moving_state().items()})
    again.target.bind(again.mim.encoder)
    wanted = model.target.targets(pixel_values, (8, 8))["patches"]
    assert torch.equal(again.target.targets(pixel_values, (8, 8))["patches"], wanted)
    with pytest.raises(ValueError, match="encoder 'vit'"):
        options = {"encoder": "convnet", "encoder_config": RESNET, "decoder": "linear"}
        MIMForPreTraining(MIMConfig(image_size=64, target="moving_average", **options))


# --- codes -------------------------------------------------------------------------------------------------------


def test_codes_are_the_nearest_and_cost_their_cross_entropy(tmp_path):
    torch.manual_seed(0)
    codes = torch.randn(7, 48)
    save_file({"codes": codes}, tmp_path / "codes.safetensors")
    features = {"name": "pixel", "normalize": False}
    model = student("discrete_token", features=features, codebook=str(tmp_path / "codes.safetensors"))
    pixel_values, mask = torch.randn(2, 3, 32, 32), random_masks(2, 64, 40)
    values = model.target.targets(pixel_values, (8, 8))["patches"]
    patches = model.target.wrapped.targets(pixel_values, (8, 8))["patches"].double()
    wanted = (patches[:, :, None] - codes.double()).square().sum(-1).argmin(-1)
    assert torch.equal(values[..., 0], wanted) and model.target.outputs == {"patches": 7}
    for count in (40, 64):
        logits = torch.randn(2, count, 7)
        loss = model.target.loss({"patches": logits}, {"patches": values}, mask, (8, 8))
        chosen = logits if count == 40 else logits[mask].view(2, 40, 7)
        shares = chosen.double().softmax(-1).gather(2, wanted[mask].view(2, 40, 1))
        assert loss.item() == pytest.approx(-shares.log().mean().item(), rel=1e-5)
    perplexity, dead = model.target.usage(torch.tensor([[0, 0, 1, 1]]))
    assert perplexity == pytest.approx(2.0, rel=1e-5) and dead == 5
    truth = torch.nn.functional.one_hot(values[..., 0], 7).float()
    assert torch.equal(*(model.target.to_image(v, pixel_values, (8, 8)) for v in (values, truth)))


def test_codebooks_that_do_not_fit(tmp_path):
    save_file({"codes": torch.randn(7, 5)}, tmp_path / "codes.safetensors")
    features = {"name": "pixel", "normalize": False}
    for options, message in (
        ({"codebook": str(tmp_path / "codes.safetensors")}, r"shape \(7, 5\), the features have 48"),
        ({"codebook": str(tmp_path / "absent.safetensors")}, "is not a codebook"),
        ({}, "hf-mim codebook"),
    ):
        with pytest.raises(ValueError, match=message):
            student("discrete_token", features=features, **options)
    save_file({"codes": torch.randn(7, 48)}, tmp_path / "codes.safetensors")
    model = student("discrete_token", features=features, codebook=str(tmp_path / "codes.safetensors"), num_codes=9)
    with pytest.raises(ValueError, match="has 7 codes, and target_config.num_codes is 9"):
        model(torch.randn(1, 3, 32, 32))
