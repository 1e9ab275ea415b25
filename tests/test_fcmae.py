"""FCMAE: features, prediction and loss against a computation on the visible places alone, which are kept in a dict and
know nothing of a map; the official file in and out."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CONVNEXT, perturb

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.conversion import convert, export


SIZE = (64, 96)
KEYS = Path(__file__).parent / "fixtures" / "official_keys" / "convnextv2_fcmae_tiny.json"
DEPTHS, WIDTHS, WIDTH = [1, 2, 1, 1], [4, 6, 8, 10], 12


def build(**changes) -> MIMForPreTraining:
    torch.manual_seed(0)
    encoder = {**CONVNEXT, "model_type": "convnextv2", "mask_style": "sparse", "pixel_fill": "none"}
    options = {"encoder_config": encoder, "decoder_config": {"hidden_size": 16}, **changes}
    config = MIMConfig(image_size=SIZE, encoder="convnet", masking_config={"ratio": 0.6}, decoder="convnext", **options)
    return perturb(MIMForPreTraining(config)).eval()


def half_hidden(batch: int) -> torch.Tensor:
    """(batch, 6), other cells in each image."""
    return torch.stack([torch.tensor([1, 0, 1, 1, 0, 0]).roll(i).bool() for i in range(batch)])


# --- an FCMAE of the official names, place by place --------------------------------------------------------------


def block_shapes(name: str, dim: int, sparse: bool) -> dict[str, list[int]]:
    """Of Minkowski's layers or of dense ones."""
    parts = {"norm": ("norm.ln" if sparse else "norm", [dim])}
    parts["1"] = ("pwconv1.linear" if sparse else "pwconv1", [4 * dim, dim])
    parts["2"] = ("pwconv2.linear" if sparse else "pwconv2", [dim, 4 * dim])
    kernel, kernel_shape = ("kernel", [49, dim]) if sparse else ("weight", [dim, 1, 7, 7])
    shapes = {f"dwconv.{kernel}": kernel_shape, "dwconv.bias": [1, dim] if sparse else [dim]}
    for part, shape in parts.values():
        shapes |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    shapes |= {f"grn.{part}": [1, 4 * dim] if sparse else [1, 1, 1, 4 * dim] for part in ("gamma", "beta")}
    return {f"{name}.{part}": shape for part, shape in shapes.items()}


def official_shapes(depths: list[int], widths: list[int], decoder: int) -> dict[str, list[int]]:
    shapes = {"mask_token": [1, decoder, 1, 1], "proj.weight": [decoder, widths[3], 1, 1], "proj.bias": [decoder]}
    shapes |= {"pred.weight": [3072, decoder, 1, 1], "pred.bias": [3072], **block_shapes("decoder.0", decoder, False)}
    down = "encoder.downsample_layers"
    shapes |= {f"{down}.0.0.weight": [widths[0], 3, 4, 4], f"{down}.0.0.bias": [widths[0]]}
    shapes |= {f"{down}.0.1.weight": [widths[0]], f"{down}.0.1.bias": [widths[0]]}
    for i, (before, after) in enumerate(zip(widths, widths[1:]), 1):
        shapes |= {f"{down}.{i}.0.ln.weight": [before], f"{down}.{i}.0.ln.bias": [before]}
        shapes |= {f"{down}.{i}.1.kernel": [4, before, after], f"{down}.{i}.1.bias": [1, after]}
    for i, depth in enumerate(depths):
        for j in range(depth):
            shapes |= block_shapes(f"encoder.stages.{i}.{j}", widths[i], True)
    return shapes


def test_the_names_used_here_are_those_of_the_release():
    fixture = json.loads(KEYS.read_text())["keys"]
    assert official_shapes([3, 3, 9, 3], [96, 192, 384, 768], 512) == fixture


def official_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: 0.5 * torch.randn(shape) for name, shape in official_shapes(DEPTHS, WIDTHS, WIDTH).items()}


def norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def respond(x, gamma, beta):
    """Global response normalisation of the rows (places, channels) of one image."""
    size = x.square().sum(0).sqrt()
    return gamma.flatten() * x * size / (size.mean() + 1e-6) + beta.flatten() + x


def sparse_block(places: dict, weights, name: str) -> dict:
    """places: (row, column) -> (channels,)"""
    kernel, rows = weights[f"{name}.dwconv.kernel"], []
    for y, x in places:
        total = weights[f"{name}.dwconv.bias"][0].clone()
        for i in range(49):  # places of the kernel are counted column by column
            neighbour = (y + i % 7 - 3, x + i // 7 - 3)
            if neighbour in places:
                total += kernel[i] * places[neighbour]
        rows.append(total)
    out = norm(torch.stack(rows), weights, f"{name}.norm.ln")
    out = F.gelu(out @ weights[f"{name}.pwconv1.linear.weight"].T + weights[f"{name}.pwconv1.linear.bias"])
    out = respond(out, weights[f"{name}.grn.gamma"], weights[f"{name}.grn.beta"])
    out = out @ weights[f"{name}.pwconv2.linear.weight"].T + weights[f"{name}.pwconv2.linear.bias"]
    return {place: value + row for (place, value), row in zip(places.items(), out)}


def sparse_encoder(image, hidden, weights) -> dict:
    """image (3, height, width), hidden (rows, columns) of cells of 32 pixels -> the features of the visible cells."""
    places, stem = {}, weights["encoder.downsample_layers.0.0.weight"]
    for y in range(image.shape[1] // 4):
        for x in range(image.shape[2] // 4):
            if not hidden[y // 8, x // 8]:
                pixels = image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
                value = (stem * pixels).sum((1, 2, 3)) + weights["encoder.downsample_layers.0.0.bias"]
                places[y, x] = norm(value, weights, "encoder.downsample_layers.0.1")
    for stage, depth in enumerate(DEPTHS):
        if stage:
            places = halve(places, weights, f"encoder.downsample_layers.{stage}")
        for block in range(depth):
            places = sparse_block(places, weights, f"encoder.stages.{stage}.{block}")
    return places


def halve(places: dict, weights, name: str) -> dict:
    kernel, out = weights[f"{name}.1.kernel"], {}
    for (y, x), value in places.items():
        start = out.get((y // 2, x // 2), weights[f"{name}.1.bias"][0])
        out[y // 2, x // 2] = start + norm(value, weights, f"{name}.0.ln") @ kernel[2 * (x % 2) + y % 2]
    return out


def dense_decoder(places: dict, grid, weights) -> torch.Tensor:
    """-> predictions (cells, values)"""
    cells = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    project, bias, token = weights["proj.weight"][:, :, 0, 0], weights["proj.bias"], weights["mask_token"].flatten()
    whole = {cell: project @ places[cell] + bias if cell in places else token for cell in cells}
    kernel, rows = weights["decoder.0.dwconv.weight"][:, 0], []
    for y, x in cells:
        total = weights["decoder.0.dwconv.bias"].clone()
        for (a, b), value in whole.items():
            if abs(a - y) <= 3 and abs(b - x) <= 3:
                total += kernel[:, a - y + 3, b - x + 3] * value
        rows.append(total)
    out = norm(torch.stack(rows), weights, "decoder.0.norm")
    out = F.gelu(out @ weights["decoder.0.pwconv1.weight"].T + weights["decoder.0.pwconv1.bias"])
    out = respond(out, weights["decoder.0.grn.gamma"], weights["decoder.0.grn.beta"])
    out = out @ weights["decoder.0.pwconv2.weight"].T + weights["decoder.0.pwconv2.bias"]
    out = out + torch.stack(list(whole.values()))
    return out @ weights["pred.weight"][:, :, 0, 0].T + weights["pred.bias"]


def squared_error(image, prediction, hidden) -> torch.Tensor:
    """Over the hidden cells of an image, against pixels of mean 0 and variance 1 in each cell."""
    errors = []
    for i in hidden.flatten().nonzero().flatten().tolist():
        y, x = divmod(i, hidden.shape[1])
        cell = image[:, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32].permute(1, 2, 0).flatten()
        errors.append((prediction[i] - (cell - cell.mean()) / (cell.var() + 1e-6).sqrt()).square().mean())
    return torch.stack(errors)


def test_against_a_computation_on_visible_places(tmp_path):
    weights = official_weights()
    torch.save({"model": weights}, tmp_path / "fcmae.pth")
    lines = convert(str(tmp_path / "fcmae.pth"), tmp_path / "ours", image_size=list(SIZE))
    assert not any("not used" in line for line in lines)
    model = MIMForPreTraining.from_pretrained(tmp_path / "ours").eval()
    assert model.config.options("masking") == {"ratio": 0.6}
    images, masks = torch.randn(2, 3, *SIZE), half_hidden(2)
    with torch.no_grad():
        out = model(images, masks)
        features = model.mim(images, masks).last_hidden_state
    double, errors = {name: value.double() for name, value in weights.items()}, []
    for i in range(2):
        hidden = masks[i].view(2, 3)
        places = sparse_encoder(images[i].double(), hidden, double)
        expected = torch.stack([places[divmod(j, 3)] for j in range(6) if not masks[i, j]])
        torch.testing.assert_close(features[i][~masks[i]].double(), expected, rtol=1e-4, atol=1e-5)
        prediction = dense_decoder(places, (2, 3), double)
        torch.testing.assert_close(out.logits[i].double(), prediction, rtol=1e-4, atol=2e-5)
        errors.append(squared_error(images[i].double(), prediction, hidden))
    torch.testing.assert_close(out.loss.double(), torch.cat(errors).mean(), rtol=1e-5, atol=0)


# --- what is hidden stays hidden ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [9.0, float("inf"), float("nan")])
def test_hidden_pixels_leak_nothing(value):
    """Neither into the visible features nor, through them, into any prediction: bit for bit."""
    model, images, masks = build(), torch.randn(2, 3, *SIZE), half_hidden(2)
    hidden = masks.view(2, 1, 2, 3).repeat_interleave(32, 2).repeat_interleave(32, 3)
    changed = torch.where(hidden, value * torch.randn_like(images), images)
    with torch.no_grad():
        first, second = (model.mim(pixels, masks) for pixels in (images, changed))
        assert torch.equal(first.last_hidden_state[~masks], second.last_hidden_state[~masks])
        assert torch.equal(model(images, masks).logits, model(changed, masks, return_loss=False).logits)


@pytest.mark.parametrize("name", ["mask_token", "embed", "layers", "head"])
def test_the_decoder_starts_as_said(name):
    decoder = MIMForPreTraining(build().config).decoder
    for part, value in decoder.named_parameters():
        if part.startswith(name) and part.endswith(("weight", "token")) and "norm" not in part:
            assert abs(value.std().item() - (0 if "grn" in part else 0.02)) < 0.01


# --- the official file -------------------------------------------------------------------------------------------


def test_the_official_file_comes_back_out(tmp_path):
    weights = official_weights()
    torch.save({"model": weights}, tmp_path / "fcmae.pth")
    convert(str(tmp_path / "fcmae.pth"), tmp_path / "ours", image_size=list(SIZE))
    lines = export(str(tmp_path / "ours"), tmp_path / "theirs", to="official")
    assert "fcmae.pth" in lines[0]
    written = torch.load(tmp_path / "theirs" / "fcmae.pth", weights_only=True)["model"]
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_config": {**CONVNEXT, "mask_style": "sparse"}}, "of FCMAE alone"),
        ({"decoder": "unet", "decoder_config": {}}, "decoder is 'convnext'"),
        ({"target_config": {"hog_weight": 1.0}}, "has hog_weight"),
    ],
)
def test_another_model_has_no_official_file(changes, message, tmp_path):
    options = {"encoder_config": {**CONVNEXT, "model_type": "convnextv2", "mask_style": "sparse"}}
    options |= {"decoder": "convnext", "decoder_config": {"hidden_size": 16}, **changes}
    MIMForPreTraining(MIMConfig(image_size=64, encoder="convnet", **options)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "ours"), tmp_path / "theirs", to="official")


def test_timm_has_no_convnext_of_two_stages(tmp_path):
    encoder = {"model_type": "convnextv2", "num_stages": 2, "depths": [1, 1], "hidden_sizes": [8, 12], "patch_size": 4}
    config = MIMConfig(image_size=16, encoder="convnet", encoder_config={**encoder, "mask_style": "sparse"})
    MIMModel(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="four stages"):
        export(str(tmp_path / "ours"), tmp_path / "theirs", to="timm")
