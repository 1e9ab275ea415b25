"""CrossMAE: decoder blocks that look at weighted sums of the encoder's blocks, and a part of the hidden tokens that is
predicted, against a plain computation in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import CONVNEXT, TIMM_VIT, perturb, random_masks, tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.modeling.encoder_base import EncoderOutput
from hf_mim.modeling.layers import sincos_2d


OPTIONS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mix_blocks": True}
GRID, TOKENS, HIDDEN = (6, 4), 24, 18


def build(**options) -> MIMForPreTraining:
    torch.manual_seed(0)
    config = tiny_config(
        image_size=[24, 16],
        encoder_config={"num_register_tokens": 1},
        masking_config={"ratio": 0.75},
        decoder="cross_attention",
        decoder_config={**OPTIONS, **options},
    )
    return perturb(MIMForPreTraining(config))


def decode(decoder, states: torch.Tensor, visible: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """One image: states (maps, prefix + visible, dim) -> predictions for the tokens `asked` (rows of the grid)."""
    weights = {name: value.double() for name, value in decoder.state_dict().items()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    places = sincos_2d(GRID, GRID, 16).double()
    x = weights["mask_token"] + places[asked]
    for i in range(3):
        mixed = sum(weights["mix"][i, k] * states[k] for k in range(len(states)))
        context = linear(norm(mixed, f"mix_norms.{i}"), "embed.linear")
        context[2:] += places[visible]
        query = linear(norm(x, f"layers.{i}.norm1"), f"layers.{i}.attention.query")
        key, value = linear(context, f"layers.{i}.attention.key_value").chunk(2, dim=1)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            shares = (query[:, part] @ key[:, part].T / 8**0.5).softmax(dim=1)
            heads.append(shares @ value[:, part])
        x = x + linear(torch.cat(heads, dim=1), f"layers.{i}.attention.proj")
        inner = F.gelu(linear(norm(x, f"layers.{i}.norm2"), f"layers.{i}.mlp.fc1"))
        x = x + linear(inner, f"layers.{i}.mlp.fc2")
    return linear(norm(x, "norm"), "head")


@pytest.mark.parametrize(("training", "count"), [(True, 6), (False, HIDDEN)])
def test_predictions_and_loss(training, count, monkeypatch):
    model, drawn = build(prediction_ratio=0.25).train(training), []

    def spy(encoded, hidden_index):
        drawn.append(hidden_index)
        return replace(encoded, hidden_index=hidden_index)

    monkeypatch.setattr("hf_mim.modeling.decoder_base.replace", spy)
    images, masks = torch.randn(2, 3, 24, 16), random_masks(2, TOKENS, HIDDEN)
    with torch.no_grad():
        out = model(images, masks, output_hidden_states=True)
    asked = drawn[0] if training else torch.stack([row.nonzero().flatten() for row in masks])
    assert out.logits.shape == (2, count, 48) and out.bool_masked_pos is masks
    errors = []
    for i in range(2):
        assert masks[i][asked[i]].all() and (asked[i].diff() > 0).all()
        last = model.mim.encoder.final_norm(out.hidden_states[-1][i])
        states = torch.stack([*(state[i] for state in out.hidden_states[:-1]), last]).double()
        expected = decode(model.decoder, states, (~masks[i]).nonzero().flatten(), asked[i])
        torch.testing.assert_close(out.logits[i].double(), expected, rtol=1e-5, atol=1e-5)
        for row, place in zip(expected, asked[i].tolist()):
            y, x = divmod(place, GRID[1])
            patch = images[i, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(1, 2, 0).flatten().double()
            errors.append((row - (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()).square().mean())
    torch.testing.assert_close(out.loss.double(), torch.stack(errors).mean(), rtol=1e-5, atol=0)


def test_every_hidden_token_has_the_same_chance():
    """6 of 18: of 600 draws, each token 200 times, with a deviation of 12."""
    model, masks = build(prediction_ratio=0.25).train(), random_masks(1, TOKENS, HIDDEN)
    counts, images = torch.zeros(TOKENS), torch.randn(20, 3, 24, 16)
    model.target.loss = lambda predictions, targets, mask, *rest: counts.add_(mask.sum(0)).sum() * 0
    with torch.no_grad():
        for _ in range(30):
            model(images, masks.expand(20, -1))
    assert (counts[~masks[0]] == 0).all() and (counts[masks[0]] - 200).abs().max() < 60


def test_the_weights_of_the_blocks_start_as_in_the_paper_and_learn():
    torch.manual_seed(0)
    decoder = MIMForPreTraining(build(num_hidden_layers=64, prediction_ratio=0.5).config).decoder
    assert decoder.mix.shape == (64, 3) and abs(decoder.mix.std().item() - 3**-0.5) < 0.08
    model = build(prediction_ratio=0.25).train()
    model(torch.randn(2, 3, 24, 16)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model.decoder.mix.grad.abs().sum(dim=0) > 0).all()


def test_pictures_show_every_token():
    model = build(prediction_ratio=0.25).train()
    shown = model.reconstruct(torch.rand(1, 3, 24, 16))
    assert shown.prediction.shape == (1, 3, 24, 16)


def test_blocks_of_timm_are_mixed_too():
    model = MIMForPreTraining(
        tiny_config(
            image_size=32,
            encoder="timm",
            encoder_config=TIMM_VIT,
            masking_config={"ratio": 0.75},
            decoder="cross_attention",
            decoder_config=OPTIONS,
        )
    )
    states = model.mim(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    decoder, grid = model.decoder, (4, 4)
    positions = decoder.positions(grid, torch.device("cpu"))
    encoded = EncoderOutput(tokens=states.last_hidden_state, hidden_states=states.hidden_states)
    tokens = [state.flatten(2).mT for state in states.hidden_states]
    for i, context in enumerate(decoder._contexts(encoded, grid, positions)):
        mixed = decoder.mix_norms[i](sum(weight * state for weight, state in zip(decoder.mix[i], tokens)))
        torch.testing.assert_close(context, decoder.embed(mixed, grid) + positions, rtol=1e-4, atol=1e-5)
    assert model(torch.randn(2, 3, 32, 32)).loss.isfinite()


CONVNET = {"encoder": "convnet", "encoder_config": CONVNEXT, "image_size": 64}


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"prediction_ratio": 1.5}, {}, "must be in"),
        (
            {"prediction_ratio": 0.5},
            {"encoder_config": {"mask_style": "token"}},
            "drops hidden tokens.*prediction_ratio=null",
        ),
        ({"mix_blocks": True}, CONVNET, "same width"),
        ({"prediction_ratio": 0.9}, {}, "more than the 75%"),
    ],
)
def test_what_does_not_go_together(options, changes, message):
    options = {**OPTIONS, "mix_blocks": False, **options}
    with pytest.raises(ValueError, match=message):
        MIMForPreTraining(tiny_config(decoder="cross_attention", decoder_config=options, **changes))
