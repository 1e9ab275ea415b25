"""The masked autoencoders that are compared, and the way of one's weights into another.

`tests/test_parity.py` uses the same mapping, so that what is timed is what is tested.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm
import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.modeling.layers import sincos_2d
from hf_mim.modeling.masking import sample_masks
from hf_mim.modeling.options import pair


# ---- weights -------------------------------------------------------------------------------------------------------
def load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies tensors into parameters of the same names; every parameter must get one."""
    parameters = dict(module.named_parameters())
    if set(parameters) != set(state):
        raise ValueError(f"parameters without a counterpart: {sorted(set(parameters) ^ set(state))}")
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value.reshape(parameters[name].shape))


def patch_weight(convolution: nn.Conv2d) -> Tensor:
    """A patch convolution (dim, channels, rows, cols) as a linear layer on row, column, channel."""
    return convolution.weight.permute(0, 2, 3, 1).flatten(1)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def norm_state(name: str, norm) -> dict[str, Tensor]:
    """Weight and bias of a norm, or of a linear layer, under our name."""
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def transformers_block(layer) -> dict[str, Tensor]:
    """A block of transformers' ViT or ViTMAE under our names."""
    attention, mlp, state = layer.attention, layer.mlp, {}
    for suffix in ("weight", "bias"):
        qkv = [getattr(part, suffix) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        state[f"attention.qkv.{suffix}"] = torch.cat(qkv)
        pairs = {"attention.proj": attention.o_proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
        pairs |= {"norm1": layer.layernorm_before, "norm2": layer.layernorm_after}
        state |= {f"{name}.{suffix}": getattr(module, suffix) for name, module in pairs.items()}
    return state


def vitmae_state(peer: ViTMAEForPreTraining) -> dict[str, Tensor]:
    """The weights of transformers' MAE under our names."""
    embeddings, decoder = peer.vit.embeddings, peer.decoder
    state = {
        "mim.encoder.prefix_tokens": embeddings.cls_token[0],
        "mim.encoder.patch_embedding.weight": patch_weight(embeddings.patch_embeddings.projection),
        "mim.encoder.patch_embedding.bias": embeddings.patch_embeddings.projection.bias,
        "decoder.mask_token": decoder.mask_token[0, 0],
    }
    for i, layer in enumerate(peer.vit.layers):
        state |= prefixed(f"mim.encoder.layers.{i}", transformers_block(layer))
    for i, layer in enumerate(decoder.decoder_layers):
        state |= prefixed(f"decoder.layers.{i}", transformers_block(layer))
    state |= norm_state("mim.encoder.final_norm", peer.vit.layernorm) | norm_state("decoder.norm", decoder.decoder_norm)
    state |= norm_state("decoder.embed.linear", decoder.decoder_embed)
    return state | norm_state("decoder.head", decoder.decoder_pred)


def lightly_state(vit, decoder) -> dict[str, Tensor]:
    """Lightly's parameters under our names; views, which can be written to."""
    state = {
        "mim.encoder.prefix_tokens": vit.cls_token[0],
        "mim.encoder.patch_embedding.weight": vit.patch_embed.proj.weight.permute(0, 2, 3, 1),
        "mim.encoder.patch_embedding.bias": vit.patch_embed.proj.bias,
        "decoder.mask_token": decoder.mask_token[0, 0],
    }
    for prefix, blocks in (("mim.encoder.layers", vit.blocks), ("decoder.layers", decoder.decoder_blocks)):
        for i, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                state[f"{prefix}.{i}.{name.replace('attn.', 'attention.')}"] = parameter
    state |= norm_state("mim.encoder.final_norm", vit.norm) | norm_state("decoder.norm", decoder.decoder_norm)
    state |= norm_state("decoder.embed.linear", decoder.decoder_embed)
    return state | norm_state("decoder.head", decoder.decoder_pred)


def fill_positions(peer: ViTMAEForPreTraining) -> None:
    """Writes the positions that MAE prescribes into tables that a model built from its config may hold as zeros."""
    embeddings = peer.vit.embeddings
    grid = (embeddings.image_size[0] // embeddings.patch_size,) * 2
    with torch.no_grad():
        for table in (embeddings.position_embeddings, peer.decoder.decoder_pos_embed):
            dim = table.shape[-1]
            table.copy_(torch.cat([torch.zeros(1, dim), sincos_2d(grid, grid, dim)])[None])


# ---- models --------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """pixel_values (batch, channels, height, width); mask (batch, tokens), True = hidden."""

    pixel_values: Tensor
    mask: Tensor

    @property
    def noise(self) -> Tensor:
        """(batch, tokens), from which transformers' MAE makes this mask: it hides the tokens of the largest noise."""
        return self.mask + torch.linspace(0, 0.5, self.mask.shape[1], device=self.mask.device)


def blueprint(config: MIMConfig) -> MIMForPreTraining:
    """Our model without memory, to be asked for its sizes."""
    with torch.device("meta"):
        return MIMForPreTraining(config)


def make_batch(config: MIMConfig, count: int) -> Batch:
    """Random images and masks, always the same."""
    size = pair(config.image_size)
    images = torch.randn(count, config.num_channels, *size, generator=torch.Generator().manual_seed(0))
    rngs = [np.random.default_rng(i) for i in range(count)]
    return Batch(images, sample_masks(config, blueprint(config).mask_grid(*size), rngs))


@dataclass
class Arm:
    """A model, and the function of nothing that returns its loss on the batch."""

    model: nn.Module
    loss: Callable[[], Tensor]


def make_ours(config: MIMConfig, batch: Batch) -> Arm:
    model = MIMForPreTraining(config).train()
    return Arm(model, lambda: model(batch.pixel_values, bool_masked_pos=batch.mask).loss)


def make_cross_attention(config: MIMConfig, batch: Batch) -> Arm:
    return make_ours(MIMConfig(**{**config.to_dict(), "decoder": "cross_attention"}), batch)


def architecture(config: MIMConfig) -> tuple[dict, dict, int, int]:
    """-> the sizes of encoder and of decoder by transformers' names, the patch size and the image size."""
    model, sizes = blueprint(config), []
    for part in (model.mim.encoder, model.decoder):
        block = part.layers[0]
        sizes.append(
            {
                "hidden_size": part.hidden_size,
                "num_hidden_layers": len(part.layers),
                "num_attention_heads": block.attention.num_heads,
                "intermediate_size": block.mlp.fc1.out_features,
            }
        )
    return *sizes, model.mim.encoder.patch_size[0], pair(config.image_size)[0]


def make_transformers(config: MIMConfig, batch: Batch) -> Arm:
    encoder, decoder, patch, size = architecture(config)
    peer_config = ViTMAEConfig(
        **encoder,
        **{f"decoder_{name}": value for name, value in decoder.items()},
        image_size=size,
        patch_size=patch,
        num_channels=config.num_channels,
        mask_ratio=config.masking_config["ratio"],
        norm_pix_loss=config.target_config["normalize"],
        layer_norm_eps=1e-6,
    )
    model, noise = ViTMAEForPreTraining(peer_config).train(), batch.noise
    fill_positions(model)
    return Arm(model, lambda: model(batch.pixel_values, noise=noise).loss)


class LightlyMAE(nn.Module):
    """lightly's modules put together as the MAE example in its documentation does."""

    def __init__(self, config: MIMConfig):
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        encoder, decoder, patch, size = architecture(config)
        vit = timm.models.VisionTransformer(
            img_size=size,
            patch_size=patch,
            in_chans=config.num_channels,
            embed_dim=encoder["hidden_size"],
            depth=encoder["num_hidden_layers"],
            num_heads=encoder["num_attention_heads"],
            mlp_ratio=encoder["intermediate_size"] / encoder["hidden_size"],
            num_classes=0,
        )
        self.patch_size, self.normalize = patch, config.target_config["normalize"]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated since 1.6 in favour of a class that 1.5 does not have
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                patch_size=patch,
                in_chans=config.num_channels,
                embed_dim=vit.embed_dim,
                decoder_embed_dim=decoder["hidden_size"],
                decoder_depth=decoder["num_hidden_layers"],
                decoder_num_heads=decoder["num_attention_heads"],
                mlp_ratio=decoder["intermediate_size"] / decoder["hidden_size"],
            )

    def forward(self, images: Tensor, idx_keep: Tensor, idx_mask: Tensor) -> Tensor:
        """Indices (batch, K) into the class token and the patches -> the loss."""
        from lightly.models import utils

        embedded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=idx_keep))
        length = self.backbone.sequence_length
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, idx_keep, embedded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), idx_mask))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), idx_mask - 1)
        target = utils.normalize_mean_var(target) if self.normalize else target
        return nn.functional.mse_loss(predicted, target)


def make_lightly(config: MIMConfig, batch: Batch) -> Arm:
    model = LightlyMAE(config).train()
    order = batch.mask.byte().argsort(dim=1, stable=True) + 1
    visible = int((~batch.mask[0]).sum())
    keep = torch.cat([torch.zeros(len(order), 1, dtype=order.dtype), order[:, :visible]], dim=1)
    return Arm(model, lambda: model(batch.pixel_values, keep, order[:, visible:]))


ARMS = {
    "hf_mim": make_ours,
    "hf_mim, cross_attention": make_cross_attention,
    "transformers": make_transformers,
    "lightly": make_lightly,
}


def equal_weights(arms: dict[str, Arm]) -> None:
    """Gives all arms of the same architecture the weights of transformers' model."""
    state = vitmae_state(arms["transformers"].model)
    load(arms["hf_mim"].model, state)
    if "lightly" in arms:
        model = arms["lightly"].model
        with torch.no_grad():
            for name, view in lightly_state(model.backbone.vit, model.decoder).items():
                view.copy_(state[name].reshape(view.shape))
