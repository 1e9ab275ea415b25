"""Bad input to the library: one clear line that names the value and the choices, and what is accepted instead."""

import pytest
import torch
from helpers import CONVNEXT, DINOV2, NATIVE_VIT, RESNET, SWIN, random_masks, tiny_config

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.masking import MASK_GENERATORS


TOKEN = {"encoder_config": {"mask_style": "token"}, "decoder": "linear", "decoder_config": {}}
PIXELS = torch.randn(2, 3, 16, 16)


def refuses(call, *parts: str):
    """Asserts that the call is a ValueError of one line with all these parts."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, wrong, near", [("encoder", "vits", "vit"), ("pooler", "means", "mean")])
def test_unknown_encoder_or_pooler(part, wrong, near):
    refuses(lambda: MIMConfig(**{part: wrong}), f"unknown {part} {wrong!r}", f"did you mean {near!r}", "Choices: ")


@pytest.mark.parametrize("part, wrong, near", [("target", "pixels", "pixel"), ("decoder", "transformr", "transformer")])
def test_unknown_target_or_decoder(part, wrong, near):
    config = tiny_config(**{part: wrong})
    refuses(lambda: MIMForPreTraining(config), f"unknown {part} {wrong!r}", f"did you mean {near!r}", "Choices: ")


def test_unknown_mask_generator():
    config = tiny_config(masking="randm")
    refuses(lambda: MIMForPreTraining(config), "'randm'", "did you mean 'random'", ", ".join(MASK_GENERATORS))


# --- sizes, channels, ratios -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [MIMModel, MIMForPreTraining, MIMForImageClassification])
@pytest.mark.parametrize(
    "fields, size, parts",
    [
        ({}, (18, 16), ("18x16", "4x4", "16x16 would be")),
        ({"encoder_config": {"patch_size": [4, 8]}}, (16, 20), ("16x20", "4x8", "16x16 would be")),
        ({"image_size": 64, "encoder": "convnet", "encoder_config": RESNET}, (64, 90), ("64x90", "32x32", "64x96")),
        ({"image_size": 64, "encoder": "convnet", "encoder_config": CONVNEXT}, (3, 64), ("3x64", "32x64 would be")),
        ({"encoder": "native", "encoder_config": NATIVE_VIT}, (18, 16), ("18x16", "4x4", "16x16 would be")),
        ({"encoder": "native", "encoder_config": SWIN}, (16, 20), ("16x20", "8x8", "16x16 would be")),
    ],
)  # fmt: skip
def test_an_image_that_is_not_divisible(model_class, fields, size, parts):
    model = model_class(tiny_config(**fields)).eval()
    refuses(lambda: model(torch.randn(1, 3, *size)), *parts)


@pytest.mark.parametrize("model_class", [MIMModel, MIMForPreTraining, MIMForImageClassification])
@pytest.mark.parametrize("channels, shape", [(3, (2, 1, 16, 16)), (5, (2, 3, 16, 16)), (3, (3, 16, 16)), (3, (16, 16))])
def test_channels_that_differ(model_class, channels, shape):
    model = model_class(tiny_config(num_channels=channels)).eval()
    refuses(lambda: model(torch.randn(shape)), f"(batch, {channels}, height, width)", "num_channels", f"got {shape}")


@pytest.mark.parametrize(
    "masking_config, parts",
    [
        ({"ratio": 0}, ("(0, 1)", "got 0")),
        ({"ratio": 1}, ("(0, 1)", "got 1")),
        ({"ratio": 1.2}, ("(0, 1)", "got 1.2")),
        ({"ratio": -0.1}, ("(0, 1)", "got -0.1")),
        ({"ratio": 0.97}, ("0.97", "no visible token", "4x4 grid")),
        ({"ratio": 0.8, "unit": 2}, ("0.8", "mask unit 2x2", "no visible token")),
        ({"ratio": "most"}, ("'ratio'", "float", "'most'")),
        ({"unit": [2, 2, 2]}, ("(height, width) pair", "[2, 2, 2]")),
    ],
)
@pytest.mark.parametrize("masking", [name for name in MASK_GENERATORS if name != "none"])
def test_ratios_and_units(masking, masking_config, parts):
    config = tiny_config(masking=masking, masking_config={"ratio": 0.5, **masking_config})
    refuses(lambda: MIMForPreTraining(config), *parts)


def test_a_picture_too_small_to_hide_anything():
    model = MIMForPreTraining(tiny_config())
    refuses(lambda: model(torch.randn(1, 3, 4, 4)), "mask ratio 0.75", "no visible token", "1x1 grid")


# --- masks -------------------------------------------------------------------------------------------------------


WRONG_MASKS = {
    "integers": random_masks(2, 16, 9).long(),
    "floats": random_masks(2, 16, 9).float(),
    "too_short": random_masks(2, 15, 9),
    "too_long": random_masks(2, 17, 9),
    "one_image": random_masks(1, 16, 9),
    "no_batch": random_masks(2, 16, 9)[0],
    "rows_and_columns": random_masks(2, 16, 9).view(2, 4, 4),
    "pixels": torch.zeros(2, 1, 16, 16, dtype=torch.bool),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_masks_of_a_wrong_shape_or_type(name):
    mask = WRONG_MASKS[name]
    got = f"got {mask.dtype} {tuple(mask.shape)}"
    model = MIMForPreTraining(tiny_config())
    refuses(lambda: model(PIXELS, mask), "bool_masked_pos must be bool (2, 16) or (2, M, 16)", "4x4 mask grid", got)
    refuses(lambda: model.mim(PIXELS, mask), "bool_masked_pos must be bool (2, 16) for", "4x4 mask grid", got)
    refuses(lambda: model.reconstruct(PIXELS, mask), "bool_masked_pos must be bool (2, 16) or (2, M, 16)", got)


def test_several_masks_are_for_pretraining_only():
    masks = torch.stack([random_masks(2, 16, 9), random_masks(2, 16, 9)], dim=1)
    refuses(lambda: MIMModel(tiny_config())(PIXELS, masks), "bool (2, 16) for", "(2, 2, 16)")


@pytest.mark.parametrize("fields", [{}, TOKEN])
def test_several_masks_per_image(fields):
    torch.manual_seed(0)
    model = MIMForPreTraining(tiny_config(**fields)).eval()
    masks = torch.stack([random_masks(2, 16, 9) for _ in range(3)], dim=1)
    out = model(PIXELS, masks)
    assert torch.equal(out.bool_masked_pos, masks.flatten(0, 1))
    single = [model(PIXELS, masks[:, i]) for i in range(3)]
    assert torch.allclose(out.loss, torch.stack([one.loss for one in single]).mean(), atol=1e-6)
    for i in range(3):
        assert torch.allclose(out.logits.unflatten(0, (2, 3))[:, i], single[i].logits, atol=1e-5)


@pytest.mark.parametrize(
    "counts, parts",
    [((5, 6), ("[5, 6] hidden of 16",)), ((0, 0), ("[0] hidden of 16",)), ((16, 16), ("[16] hidden of 16",))],
)
def test_drop_needs_equal_counts(counts, parts):
    mask = torch.arange(16) < torch.tensor(counts)[:, None]
    model = MIMForPreTraining(tiny_config())
    refuses(lambda: model(PIXELS, mask), "'drop'", "the same number", "mask_style 'token'", *parts)
    out = MIMForPreTraining(tiny_config(**TOKEN))(PIXELS, mask)  # as the message says
    assert out.loss.isfinite()


MADE_WITHOUT = {
    "token": {"encoder_config": {"mask_style": "token"}},
    "add": {"encoder_config": {"mask_style": "add"}},
    "later_stage": {"encoder_config": {"mask_style": "token", "mask_stage": 1}},
    "resnet": {"image_size": 64, "encoder": "convnet", "encoder_config": RESNET},
    "native_vit": {"encoder": "native", "encoder_config": NATIVE_VIT},
    "native_swin": {"encoder": "native", "encoder_config": SWIN},
    "native_dinov2": {"encoder": "native", "encoder_config": DINOV2},
}


@pytest.mark.parametrize("name", MADE_WITHOUT)
def test_a_mask_for_a_model_without_its_mask_token(name):
    config = tiny_config(**MADE_WITHOUT[name])
    pixel_values, mask = torch.randn(2, 3, config.image_size, config.image_size), random_masks(2, 16, 9)
    refuses(lambda: MIMModel(config)(pixel_values, mask), "without its mask token", "use_mask_token=True")
    hidden = MIMModel(config, use_mask_token=True).eval()(pixel_values, mask).last_hidden_state  # as the message says
    assert hidden.isfinite().all()


def test_a_native_model_that_cannot_hide():
    config = tiny_config(image_size=64, encoder="native", encoder_config={**RESNET, "model_type": "resnet"})
    assert MIMModel(config)(torch.randn(1, 3, 64, 64)).pooler_output.shape == (1, 20)
    refuses(lambda: MIMForPreTraining(config), "'resnet'", "takes no bool_masked_pos", "'vit', 'convnet'")


def test_convnets_have_no_attentions():
    model = MIMModel(tiny_config(image_size=64, encoder="convnet", encoder_config=RESNET))
    refuses(lambda: model(torch.randn(1, 3, 64, 64), output_attentions=True), "no attentions")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_config": {"num_hidden_layers": 0}}, "num_hidden_layers must be at least 1"),
        ({"encoder_config": {"num_register_tokens": -1}}, "num_register_tokens must be at least 0"),
        ({"encoder_config": {"drop_path_rate": 1.0}}, "drop_path_rate must be in"),
        ({"masks_per_image": 0}, "masks_per_image must be at least 1"),
    ],
)
def test_numbers_out_of_range(fields, message):
    refuses(lambda: MIMForPreTraining(tiny_config(**fields)), message)
