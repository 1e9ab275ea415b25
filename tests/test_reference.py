"""hf_mim beside the numbers of the authors' own programs (tests/fixtures/reference: random weights, official outputs).

A case is `NAME.safetensors` with `input.*` and `expected.*`; `NAME.weights.safetensors` is the official state dict,
which is converted as a user converts an official file.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.conversion import convert
from hf_mim.modeling.encoder_base import unpatchify
from hf_mim.modeling.layers import take_tokens
from hf_mim.modeling.masking import MASK_GENERATORS
from hf_mim.modeling.parts import make_encoder
from hf_mim.modeling.target_hog import oriented_gradients
from hf_mim.modeling.targets import TARGETS
from hf_mim.training import recipe
from hf_mim.training.conversion.official import Hints, convert_state


REFERENCE = Path(__file__).parent / "fixtures" / "reference"
EXACT = {"rtol": 1e-5, "atol": 1e-5}
BATCH_NORM = {"rtol": 1e-5, "atol": 2e-5}  # in training, statistics are sums over many places


def read(path: Path) -> dict[str, torch.Tensor]:
    """Its tensors, those in half precision as float32: they are exact."""
    tensors = load_file(path).items()
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in tensors}


def case(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """-> inputs and expected outputs by name."""
    tensors = read(REFERENCE / f"{name}.safetensors")
    parts = (
        {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        for part in ("input", "expected")
    )
    return tuple(parts)


def official_file(name: str, folder: Path) -> Path:
    """The case's weights as the official program saves them."""
    with safe_open(REFERENCE / f"{name}.weights.safetensors", "pt") as file:
        container = file.metadata()["container"]
    weights = read(REFERENCE / f"{name}.weights.safetensors")
    if teacher := teacher_weights(weights):  # data2vec's lie in a dict of their own among the weights
        weights = {key: value for key, value in weights.items() if not key.startswith("_ema.")} | {"_ema": teacher}
    path = folder / f"{name}.pth"
    torch.save({container: weights}, path)
    return path


def teacher_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("_ema."): value for key, value in weights.items() if key.startswith("_ema.")}


def converted(name: str, folder: Path, model_class=MIMForPreTraining, **hints):
    convert(str(official_file(name, folder)), folder / "ours", **hints)
    return model_class.from_pretrained(folder / "ours").eval()


@pytest.mark.parametrize("name", ["spark_resnet", "spark_convnext"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@torch.no_grad()
def test_spark_with_its_decoder(name, mode, tmp_path):
    inputs, expected = case(name)
    model = converted(name, tmp_path, image_size=64).train(mode == "train")
    tolerance = BATCH_NORM if mode == "train" else EXACT
    entering = []
    for part in model.decoder.inputs:
        part.register_forward_hook(lambda module, arguments, out: entering.append(out))
    out = model(inputs["pixels"], ~inputs["active"].flatten(1))
    image = unpatchify(out.logits, (2, 2), 64, 64)
    for i, step in enumerate((1, 1, 2, 4)):
        mine = entering[i][..., ::step, ::step]
        torch.testing.assert_close(mine, expected[f"decoder_input_{mode}_{i}"], **tolerance)
    # In evaluation the case's image hardly varies: each channel's deviation is below 1e-4.
    close = tolerance if mode == "train" else {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(image[..., ::4, ::4], expected[f"reconstruction_{mode}_every_fourth"], **close)
    torch.testing.assert_close(out.loss, expected[f"loss_{mode}"], rtol=1e-5, atol=0)
    if mode == "train" and name == "spark_resnet":
        mean = model.decoder.inputs[0].norm.running_mean
        torch.testing.assert_close(mean, expected["running_mean_after_train.densify_0"], **BATCH_NORM)


@pytest.fixture
def data2vec(tmp_path):
    """Student and teacher with the official weights, and a decoder whose noise is the case's."""
    inputs, expected = case("data2vec2")
    model = converted("data2vec2", tmp_path, heads=2)
    model.target = TARGETS["moving_average"](model.config, model.mim.encoder, top_k_blocks=2, global_weight=0.01 * 4)
    # The case's student has positions of its own, its teacher the fixed ones.
    found = convert_state(teacher_weights(read(REFERENCE / "data2vec2.weights.safetensors")), Hints(heads=2))
    teacher = make_encoder(MIMConfig(**found.fields)).eval()
    teacher.load_state_dict({name.removeprefix("encoder."): value for name, value in found.state.items()})
    model.target.average.teacher = teacher
    # The file has the tokens of an image in the order of an unstable sort of the mask, ours are in reading order.
    order = torch.tensor(json.loads((REFERENCE / "data2vec2_order.json").read_text())["order"])
    noise = take_tokens(inputs["decoder_noise"], order[:, 6:].argsort(dim=1))
    model.decoder._hidden_tokens = lambda zeros: zeros + noise
    patches = take_tokens(expected["encoder_visible"][:, 1:], order[:, :6].argsort(dim=1))
    expected["encoder_visible"][:, 1:] = patches
    return model, inputs, expected


@torch.no_grad()
def test_data2vec_features_and_targets(data2vec):
    model, inputs, expected = data2vec
    features = model.mim(inputs["pixels"]).last_hidden_state
    torch.testing.assert_close(features, expected["features_unmasked"], **EXACT)
    targets = model.target.targets(inputs["pixels"], (6, 6))
    torch.testing.assert_close(targets["patches"], expected["targets"], **EXACT)


@torch.no_grad()
def test_data2vec_prediction_and_losses(data2vec):
    model, inputs, expected = data2vec
    masks, entering = inputs["mask"].bool(), []
    model.decoder.layers[0].register_forward_hook(lambda module, arguments, out: entering.append(arguments[0]))
    out = model(inputs["pixels"], masks.view(2, 2, 36), output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1], expected["encoder_visible"], **EXACT)
    torch.testing.assert_close(entering[0].flatten(2).mT[:2], expected["decoder_input"], **EXACT)
    torch.testing.assert_close(out.logits[:, ::3], expected["prediction"], **EXACT)
    torch.testing.assert_close(out.loss, expected["loss_total_over_sample_size"], rtol=1e-5, atol=0)
    targets = model.target.targets(inputs["pixels"], (6, 6))["patches"].repeat_interleave(2, dim=0)
    errors = (out.logits - targets)[masks].square() / 24**0.5
    torch.testing.assert_close(errors[:40], expected["regression_map"], **EXACT)
    model.target.global_weight = 0.0
    patches = model(inputs["pixels"], masks.view(2, 2, 36)).loss
    torch.testing.assert_close(patches, expected["loss_regression_over_sample_size"], rtol=1e-5, atol=0)
    class_loss = out.loss - patches
    torch.testing.assert_close(class_loss, expected["loss_cls_over_sample_size"], rtol=1e-4, atol=0)


def test_data2vec_decay():
    wanted = json.loads((REFERENCE / "data2vec2_decay.json").read_text())
    config = MIMConfig(image_size=32, encoder_config={"size": "tiny"})
    options = {"decay": wanted["start"], "end_decay": wanted["end"], "decay_steps": wanted["steps"]}
    target = TARGETS["moving_average"](config, make_encoder(config), **options)
    for step, decay in wanted["decay"].items():
        assert target.decay_at(int(step)) == pytest.approx(decay, rel=0, abs=1e-12)
    assert target.decay_at(wanted["steps"]) == target.decay_at(10 * wanted["steps"]) == wanted["end"]


def test_data2vec_masks():
    """157 of 196 hidden; how often in the corners and in the centre, as measured on the released generator."""
    rngs = [np.random.default_rng(seed) for seed in range(20_000)]
    masks = MASK_GENERATORS["inverse_block"](len(rngs), (14, 14), rngs)
    assert (masks.sum(dim=1) == 157).all()
    shares = masks.float().mean(dim=0).view(14, 14)
    corners, centre = shares[[0, 0, -1, -1], [0, -1, 0, -1]].mean(), shares[6:8, 6:8].mean()
    assert corners.item() == pytest.approx(0.890, abs=0.004) and centre.item() == pytest.approx(0.782, abs=0.005)


@pytest.mark.parametrize("name", ["dtm_encoder", "beit2"])
@torch.no_grad()
def test_beit_s_family_with_its_head(name, tmp_path):
    inputs, expected = case(name)
    model, masks = converted(name, tmp_path), inputs["mask"].bool()
    unmasked, masked = (model.mim(inputs["pixels"], mask).last_hidden_state for mask in (None, masks))
    torch.testing.assert_close(unmasked, expected["features_unmasked"], **EXACT)
    torch.testing.assert_close(masked, expected["features_masked"], **EXACT)
    logits = model(inputs["pixels"], masks, return_loss=False).logits
    if name == "beit2":
        torch.testing.assert_close(logits[masks], expected["logits"], **EXACT)
    else:
        torch.testing.assert_close(logits, expected["head"], **EXACT)


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cell", "window", "step"),
    [("pool8_window0", 8, False, 1), ("pool8_window16", 8, True, 1), ("pool4_window0", 4, False, 2)],
)
def test_hog(name, cell, window, step):
    inputs, expected = case("hog")
    histogram = oriented_gradients(inputs["pixels"], (cell, cell), window=window)[..., ::step, ::step]
    torch.testing.assert_close(histogram, expected[f"hog_{name}"], **EXACT)


def test_hog_as_a_patch_s_target():
    inputs, expected = case("hog")
    config = MIMConfig(image_size=64, encoder_config={"size": "tiny"}, target="hog")
    target = TARGETS["hog"](config, make_encoder(config))
    torch.testing.assert_close(target.targets(inputs["pixels"], (4, 4))["patches"], expected["label_patch16"], **EXACT)


def morphing_cases() -> list[dict]:
    with safe_open(REFERENCE / "dtm_morphing.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"])


@pytest.mark.parametrize("schedule", morphing_cases(), ids=lambda entry: f"n{entry['n']}_k{entry['k']}")
def test_token_morphing(schedule):
    """The same groups, in the same order, and the five losses."""
    inputs, expected = case("dtm_morphing")
    number = f"n{schedule['n']}_k{schedule['k']}"
    config = MIMConfig(image_size=56, encoder_config={"patch_size": 8, "hidden_size": 12, "num_attention_heads": 1})
    encoder = make_encoder(config)
    options = {"features": {"name": "hog"}, "halves": "alternating", "num_draws": 1}
    options |= {"num_merged": schedule["n"], "num_iterations": schedule["k"]}
    losses = {"smoothl1": "smooth_l1", "l1": "l1", "l2": "mse", "cosine": "cosine", "smoothl1_normalised": "smooth_l1"}
    for name, loss in losses.items():
        norm = "unbiased" if name.endswith("normalised") else "none"
        target = TARGETS["token_morphing"](config, encoder, **options, loss=loss, norm=norm)
        groups = target.morph(inputs["target"])
        assert groups.count == schedule["tokens_left"]
        assert torch.equal(groups.index, expected[f"group_{number}"].long())
        found = target.loss({"patches": inputs["prediction"]}, {"patches": inputs["target"]}, None, (7, 7))
        torch.testing.assert_close(found, expected[f"loss_{name}_{number}"], rtol=1e-5, atol=1e-6)
    for name in ("target", "prediction"):
        if f"morphed_{name}_{number}" in expected:
            wanted = expected[f"morphed_{name}_{number}"]
            means = take_tokens(groups.means(inputs[name]), groups.index)[: len(wanted)]
            torch.testing.assert_close(means, wanted, **EXACT)


# --- first weights -----------------------------------------------------------------------------------------------


MEASURED = json.loads((REFERENCE / "init.json").read_text())


@pytest.mark.parametrize("name", MEASURED)
def test_recipes_draw_their_first_weights_as_released(name):
    """Standard deviations on the base size. Two draws of n numbers differ by 1 / sqrt(n) as a rule."""
    torch.manual_seed(0)
    fields = recipe.resolve(name)["model"]
    if name == "dtm":  # its teacher is not at hand
        fields |= {"target": "pixel", "target_config": {}}
    parameters = dict(MIMForPreTraining(MIMConfig(**fields)).named_parameters())
    for ours, measured in MEASURED[name]["parameters"].items():
        parameter = parameters[ours].detach()
        tolerance = 0.02 + 3 * parameter.numel() ** -0.5
        assert parameter.std().item() == pytest.approx(measured["std"], rel=tolerance), (ours, measured["official"])
