"""Sparse masking of ConvNets (SparK): hidden pixels reach no visible feature, and the numbers are those of a
computation on the visible positions alone."""

import pytest
import torch
from helpers import CONVNEXT, RESNET, random_masks

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.modeling.sparse import SparseBatchNorm2d, SparseMask


NETWORKS = {
    "resnet": RESNET,
    "bottleneck": {**RESNET, "layer_type": "bottleneck"},
    "convnext": CONVNEXT,
    "convnextv2": {**CONVNEXT, "model_type": "convnextv2"},
    "timm": {"model_type": "timm", "model_name": "resnet18"},
}


def model_of(name: str, target: str = "pixel") -> MIMForPreTraining:
    torch.manual_seed(0)
    options = {**NETWORKS[name], "mask_style": "sparse"}
    config = MIMConfig(
        image_size=[64, 96],
        encoder="convnet",
        encoder_config=options,
        masking_config={"ratio": 0.5},
        decoder="unet",
        decoder_config={"hidden_size": 32},
        target=target,
    )
    model = MIMForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_hidden_pixels_change_no_visible_feature(name, training):
    model = model_of(name).mim.train(training)
    pixel_values, mask = torch.randn(2, 3, 64, 96), random_masks(2, 6, 3)
    hidden = mask.view(2, 1, 2, 3).repeat_interleave(32, 2).repeat_interleave(32, 3)
    changed = torch.where(hidden, 9 * torch.randn_like(pixel_values), pixel_values)
    with torch.no_grad():
        maps = [model(pixels, mask).feature_maps for pixels in (pixel_values, changed)]
    for first, second in zip(*maps, strict=True):
        size = 64 // first.shape[2]
        visible = (~hidden[:, :, ::size, ::size]).expand_as(first)
        assert torch.equal(first[visible], second[visible])
    assert model.encoder.sparse_mask.visible is None


@pytest.mark.parametrize("name", NETWORKS)
def test_unmasked_it_is_the_dense_network(name):
    sparse = model_of(name).mim.eval()
    config = MIMConfig(**{**sparse.config.to_dict(), "encoder_config": NETWORKS[name]})
    dense = MIMModel(config, add_pooling_layer=False).eval()
    dense.load_state_dict(sparse.state_dict())
    pixel_values, nothing = torch.randn(2, 3, 64, 96), torch.zeros(2, 6, dtype=torch.bool)
    with torch.no_grad():
        wanted = dense(pixel_values).last_hidden_state
        assert torch.equal(sparse(pixel_values).last_hidden_state, wanted)
        assert torch.equal(sparse(pixel_values, nothing).last_hidden_state, wanted)


def test_batch_norm_against_the_compacted_input():
    """PyTorch's own batch norm on the visible positions put into a row: outputs and running statistics."""
    features, mask = torch.randn(3, 5, 8, 12), SparseMask()
    mask.visible = ~random_masks(3, 6, 2).view(3, 1, 2, 3)
    visible = mask.at(features)[:, 0]
    sparse, dense = SparseBatchNorm2d(5), torch.nn.BatchNorm1d(5)
    sparse.mask = mask
    with torch.no_grad():
        sparse.weight.normal_(), sparse.bias.normal_()
        dense.load_state_dict(sparse.state_dict())
    for _ in range(2):
        ours = sparse(features).permute(0, 2, 3, 1)[visible]
        theirs = dense(features.permute(0, 2, 3, 1)[visible])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse.running_mean, dense.running_mean)
    torch.testing.assert_close(sparse.running_var, dense.running_var)


def test_convolution_against_a_loop_over_visible_positions():
    """The first convolution of a residual stage on a masked map: a sum over visible neighbours only."""
    model = model_of("resnet").mim.eval()
    convolution = model.encoder.network.encoder.stages[0].layers[0].layer[0].convolution
    features, mask = torch.randn(1, 8, 16, 24), random_masks(1, 6, 3)
    model.encoder.sparse_mask.visible = ~mask.view(1, 1, 2, 3)
    visible = model.encoder.sparse_mask.at(features)[0, 0]
    out = convolution(features)[0]
    weight = convolution.weight.double()
    for y, x in ((0, 0), (7, 7), (8, 8), (15, 23), (3, 16)):
        wanted = torch.zeros(8, dtype=torch.float64)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if 0 <= y + dy < 16 and 0 <= x + dx < 24 and visible[y + dy, x + dx]:
                    wanted += weight[:, :, dy + 1, dx + 1] @ features[0, :, y + dy, x + dx].double()
        torch.testing.assert_close(out[:, y, x].double(), wanted, rtol=1e-5, atol=1e-5)
    model.encoder.sparse_mask.visible = None


@pytest.mark.parametrize("name", ["resnet", "convnext", "timm"])
@pytest.mark.parametrize("target", ["pixel", "hog"])
def test_it_trains_and_every_parameter_is_used(name, target):
    model = model_of(name, target).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pixel_values, losses = torch.randn(4, 3, 64, 96), []
    for _ in range(8):
        torch.manual_seed(1)
        loss = model(pixel_values).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_unet_predicts_each_pixel_at_its_place():
    """The order of values: a head that writes (row, column) of its own position gives the picture's coordinates."""
    model = model_of("resnet").eval()
    decoder = model.decoder
    with torch.no_grad():
        decoder.head.weight.zero_()
        decoder.head.bias.copy_(torch.arange(4 * 4 * 3))
    out = model(torch.randn(1, 3, 64, 96))
    cell = out.logits[0, 0].view(32, 32, 3)
    for y, x, c in ((0, 0, 0), (5, 2, 1), (31, 30, 2)):
        assert cell[y, x, c].item() == ((y % 4) * 4 + x % 4) * 3 + c


def test_what_is_refused():
    with pytest.raises(ValueError, match="needs the feature maps"):
        MIMForPreTraining(MIMConfig(image_size=32, encoder_config={"size": "tiny"}, decoder="unet"))
    with pytest.raises(ValueError, match="mask_style 'sparse' knows no way"):
        options = {"model_type": "timm", "model_name": "convnextv2_atto", "mask_style": "sparse"}
        MIMConfig(image_size=64, encoder="convnet", encoder_config=options)
