"""Equal weights, equal masks, equal numbers: against transformers' and timm's own models, in float32."""

import pytest
import timm
import torch
from peers import fill_positions, load, norm_state, patch_weight, prefixed, transformers_block, vitmae_state
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.modeling.encoder_base import unpatchify


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere, norms and biases too, so that nothing agrees by being zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.5 if parameter.ndim == 1 else 0))
    return model


@pytest.fixture(params=[True, False], ids=["normalised", "raw"])
def vitmae_pair(request):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    decoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            **sizes,
            **{f"decoder_{name}": value for name, value in decoder.items()},
            image_size=24,
            patch_size=4,
            mask_ratio=0.75,
            norm_pix_loss=request.param,
        )
    )
    randomise(peer)
    ours = MIMForPreTraining(
        MIMConfig(
            image_size=24,
            encoder_config={**sizes, "patch_size": 4, "layer_norm_eps": 1e-12},
            decoder_config={**decoder, "layer_norm_eps": 1e-12},
            target_config={"normalize": request.param},
        )
    )
    fill_positions(peer)
    load(ours, vitmae_state(peer))
    return ours, peer


def test_vitmae_parity(vitmae_pair):
    """Loss, predictions of the hidden patches and every gradient, at a mask that the peer draws from given noise."""
    ours, peer = vitmae_pair
    pixel_values = torch.randn(3, 3, 24, 24)
    theirs = peer(pixel_values, noise=torch.rand(3, 36))
    out = ours(pixel_values, bool_masked_pos=theirs.mask.bool())
    torch.testing.assert_close(out.loss, theirs.loss, **TOLERANCE)
    wanted = theirs.logits[theirs.mask.bool()].view(3, 27, -1)
    torch.testing.assert_close(out.logits, wanted, **TOLERANCE)

    out.loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for parameter in peer.parameters():
        parameter.data, parameter.grad = parameter.grad if parameter.grad is not None else parameter.data, None
    for name, wanted in vitmae_state(peer).items():
        torch.testing.assert_close(gradients[name], wanted.reshape(gradients[name].shape), **TOLERANCE, msg=name)


def test_vit_for_masked_image_modeling_parity():
    """SimMIM: mask token, all tokens encoded, linear decoder, L1 on hidden pixels; any number of hidden tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    peer = randomise(ViTForMaskedImageModeling(ViTConfig(**sizes, image_size=24, patch_size=4, encoder_stride=4)))
    ours = MIMForPreTraining(
        MIMConfig(
            image_size=24,
            encoder_config={
                **sizes,
                "patch_size": 4,
                "layer_norm_eps": 1e-12,
                "mask_style": "token",
                "position_embedding": "learned",
            },
            decoder="linear",
            target_config={"normalize": False, "loss": "l1"},
        )
    )
    load(ours, vit_mim_state(peer))
    pixel_values, mask = torch.randn(3, 3, 24, 24), torch.rand(3, 36) < 0.5
    theirs, out = peer(pixel_values, bool_masked_pos=mask), ours(pixel_values, bool_masked_pos=mask)
    torch.testing.assert_close(out.loss, theirs.loss, **TOLERANCE)
    image = ours.reconstruct(pixel_values, mask)
    assert image.prediction.shape == pixel_values.shape
    torch.testing.assert_close(unpatchify(out.logits, (6, 6), 24, 24), theirs.reconstruction, **TOLERANCE)

    out.loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    # Our position table has no entry for the class token: it is part of that token.
    for parameter in peer.parameters():
        parameter.data, parameter.grad = parameter.grad if parameter.grad is not None else parameter.data, None
    for name, wanted in vit_mim_state(peer, gradients=True).items():
        torch.testing.assert_close(gradients[name], wanted.reshape(gradients[name].shape), **TOLERANCE, msg=name)


def vit_mim_state(peer, gradients: bool = False) -> dict[str, torch.Tensor]:
    embeddings, vit, head = peer.vit.embeddings, peer.vit, peer.decoder[0]
    cls = embeddings.cls_token[0, 0]
    state = {
        "mim.encoder.prefix_tokens": cls if gradients else cls + embeddings.position_embeddings[0, 0],
        "mim.encoder.mask_token": embeddings.mask_token,
        "mim.encoder.learned_positions.table": embeddings.position_embeddings[0, 1:],
        "mim.encoder.patch_embedding.weight": patch_weight(embeddings.patch_embeddings.projection),
        "mim.encoder.patch_embedding.bias": embeddings.patch_embeddings.projection.bias,
        # The pixel shuffle orders its input channel, row, column; ours is row, column, channel.
        "decoder.head.linear.weight": head.weight.view(3, 16, 32).transpose(0, 1).reshape(48, 32),
        "decoder.head.linear.bias": head.bias.view(3, 16).T.flatten(),
    }
    for i, layer in enumerate(vit.layers):
        state |= prefixed(f"mim.encoder.layers.{i}", transformers_block(layer))
    return state | norm_state("mim.encoder.final_norm", vit.layernorm)


def timm_state(peer) -> dict[str, torch.Tensor]:
    state = {
        "encoder.prefix_tokens": peer.cls_token[0] + peer.pos_embed[:, 0],
        "encoder.learned_positions.table": peer.pos_embed[0, 1:],
        "encoder.patch_embedding.weight": patch_weight(peer.patch_embed.proj),
        "encoder.patch_embedding.bias": peer.patch_embed.proj.bias,
    } | norm_state("encoder.final_norm", peer.norm)
    ours = {"attn.qkv": "attention.qkv", "attn.proj": "attention.proj", "attn.q_norm": "attention.q_norm"}
    ours |= {"attn.k_norm": "attention.k_norm", "ls1.gamma": "scale1.scale", "ls2.gamma": "scale2.scale"}
    for i, block in enumerate(peer.blocks):
        for name, value in block.state_dict().items():
            for theirs, own in ours.items():
                name = name.replace(theirs, own)
            state[f"encoder.layers.{i}.{name}"] = value
    return state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": (24, 40)},
        {"img_size": (24, 40), "patch_size": (4, 8), "in_chans": 5},
        {"qk_norm": True, "init_values": 0.1},
    ],
    ids=["square", "non_square", "non_square_patches", "qk_norm_layer_scale"],
)
def test_timm_vit_parity(options):
    torch.manual_seed(0)
    options = {"img_size": 24, "patch_size": 4, "in_chans": 3, **options}
    peer = timm.models.VisionTransformer(embed_dim=32, depth=3, num_heads=4, mlp_ratio=2, num_classes=0, **options)
    randomise(peer).eval()
    scale = {"layer_scale_init_value": 0.1} if "init_values" in options else {}
    config = MIMConfig(
        image_size=options["img_size"],
        num_channels=options["in_chans"],
        encoder_config={
            **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
            **{"patch_size": options["patch_size"], "position_embedding": "learned", **scale},
            "qk_norm": options.get("qk_norm", False),
        },
    )
    ours = MIMModel(config).eval()
    load(ours, timm_state(peer))
    size = options["img_size"]
    pixel_values = torch.randn(2, options["in_chans"], *((size, size) if isinstance(size, int) else size))
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, peer.forward_features(pixel_values), **TOLERANCE)


CONVNETS = {
    "resnet": (
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], layer_type="basic"),
        ResNetModel,
    ),
    "convnext": (ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]), ConvNextModel),
    "convnextv2": (ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]), ConvNextV2Model),
}


@pytest.mark.parametrize("name", CONVNETS)
def test_unmasked_convnet_equals_native(name):
    """Bit for bit: last map, pooled vector and every stage's map."""
    torch.manual_seed(0)
    native_config, model_class = CONVNETS[name]
    native = randomise(model_class(native_config)).eval()
    options = {key: value for key, value in native_config.to_diff_dict().items() if key not in SHARED_KEYS}
    ours = MIMModel(MIMConfig(image_size=64, encoder="convnet", encoder_config={"model_type": name, **options})).eval()
    state = {f"encoder.network.{key}": value for key, value in native.state_dict().items()}
    state = {key.replace("encoder.network.layernorm", "pooled_norm"): value for key, value in state.items()}
    ours.load_state_dict(state)
    pixel_values = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        theirs, out = native(pixel_values, output_hidden_states=True), ours(pixel_values)
    assert torch.equal(out.last_hidden_state, theirs.last_hidden_state.flatten(2).transpose(1, 2))
    for own, their in zip(out.feature_maps, theirs.hidden_states, strict=True):
        assert torch.equal(own, their)
    torch.testing.assert_close(out.pooler_output, theirs.pooler_output.flatten(1), rtol=1e-6, atol=1e-6)


SHARED_KEYS = {"model_type", "transformers_version", "architectures", "out_features", "out_indices", "stage_names"}


def test_unmasked_timm_convnet_equals_timm():
    torch.manual_seed(0)
    for name in ("resnet18", "convnext_atto"):
        peer = timm.create_model(name, features_only=True, output_stride=32).eval()
        options = {"model_type": "timm", "model_name": name, "output_stride": 32}
        ours = MIMModel(MIMConfig(image_size=64, encoder="convnet", encoder_config=options)).eval()
        parts = {key.split(".", 2)[2]: key for key in ours.encoder.network.state_dict()}
        ours.encoder.network.load_state_dict({parts[key]: value for key, value in peer.state_dict().items()})
        pixel_values = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            maps, wanted = ours(pixel_values).feature_maps, peer(pixel_values)
        for own, their in zip(maps[-len(wanted) :], wanted, strict=True):
            assert torch.equal(own, their)
