"""The models: `MIMModel`, `MIMForPreTraining`, `MIMForImageClassification`, `MIMBackbone`."""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_mim import MIMConfig
from .decoders import DECODERS
from .encoder_base import EncoderOutput, to_grey
from .encoder_native import load_native
from .encoders import ENCODERS
from .masking import check_masking, sample_masks
from .options import check_part, pair
from .outputs import MIMForPreTrainingOutput, MIMModelOutput, MIMReconstruction
from .poolers import POOLERS
from .pyramid import make_pyramid
from .reconstruction import draw_reconstruction
from .targets import TARGETS


# What a pretraining checkpoint holds and other heads are meant not to have, as patterns of names.
PRETRAINING_PARTS = [r"mask_token", r"mask_scale", r"^decoder\.", r"^target\.", r"^global_head\."]


def make_encoder(config: MIMConfig, use_mask_token: bool = False):
    check_part("encoder", ENCODERS, config.encoder, config.encoder_config)
    return ENCODERS[config.encoder](config, use_mask_token, **config.encoder_config)


def make_pooler(config: MIMConfig, encoder):
    check_part("pooler", POOLERS, config.pooler, config.pooler_config)
    return POOLERS[config.pooler](encoder, **config.pooler_config)


def check_encoder_and_pooler(config: MIMConfig) -> list[str]:
    """Builds both without memory, so that a config is found wrong where it is written. -> the stages' names.

    Raises:
        ValueError: a name or an option is unknown, or values do not fit together.
    """
    with torch.device("meta"):
        encoder = make_encoder(config)
        make_pooler(config, encoder)
    encoder.token_grid(*pair(config.image_size))
    return encoder.stage_names


class MIMPreTrainedModel(PreTrainedModel):
    config_class = MIMConfig
    base_model_prefix = "mim"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTLayer", "CrossLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        if getattr(module, "keeps_own_init", False):
            return
        if hasattr(module, "init_parameters"):
            module.init_parameters()
        elif isinstance(module, nn.Linear):
            # As MAE does: with the fixed 0.02 of other models, narrow networks would start far too small.
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_encoder(cls, name_or_path: str, add_pooling_layer: bool = True, **fields):
        """Wraps a pretrained vision model of transformers, with its weights.

        `name_or_path` is a Hub id or a local folder; `fields` are those of `MIMConfig` (a pooler, say). A config of
        its own is not kept: what is saved loads as any other checkpoint of this project. Only `MIMModel` can be made
        without its pooling layer.

        Raises:
            ValueError: the model type has no bare vision model.
        """
        native_fields, state = load_native(name_or_path)
        without = {} if add_pooling_layer else {"add_pooling_layer": False}
        model = cls(MIMConfig(**{**native_fields, **fields}), **without)
        encoder = model.encoder if isinstance(model, MIMModel) else model.mim.encoder
        encoder.load_native_state(state)
        return model.eval()

    def get_input_embeddings(self):
        """None, as there is no table of words; accelerate asks for one when it shards a model by FSDP2."""
        return None

    def parameters_without_decay(self) -> set[str]:
        """Names of what weight decay should leave alone: biases, norms, tokens, positions, scales."""
        special = ("token", "position", "relative", "prefix")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim < 2 or any(word in name.lower() for word in special)
        }


class MIMModel(MIMPreTrainedModel):
    """The encoder with its final norm and a pooler. It hides nothing unless it is given `bool_masked_pos`.

    Args:
        config: a `MIMConfig`.
        add_pooling_layer: whether to build the pooler; without it `pooler_output` is None.
        use_mask_token: whether to build what mask styles `token` and `add` need.
    """

    _auto_class = "AutoModel"
    # A checkpoint of a head brings parts that the bare model is meant not to have.
    _keys_to_ignore_on_load_unexpected = [*PRETRAINING_PARTS, r"^classifier\."]

    def __init__(self, config: MIMConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.encoder = make_encoder(config, use_mask_token)
        self.pooler = make_pooler(config, self.encoder) if add_pooling_layer else None
        self.pooled_norm = self.encoder.pooled_norm() if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MIMModelOutput:
        """pixel_values (batch, channels, height, width), normalised; height and width may differ from the config's, and
        RGB becomes grey for a model of one channel (see `to_grey`). bool_masked_pos (batch, rows * cols) on
        `encoder.mask_grid(height, width)`, True = hidden.

        Raises:
            ValueError: the channels are not the config's, the size is no multiple of the patch, or the mask does not
                fit the grid.
        """
        pixel_values = to_grey(pixel_values, self.config.num_channels)
        self.check_inputs(pixel_values, bool_masked_pos)
        asked = self.config.output_attentions if output_attentions is None else output_attentions
        encoded = self.encoder(
            pixel_values.to(self.dtype),
            bool_masked_pos,
            bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states),
            asked or ("last" if getattr(self.pooler, "needs_attentions", False) else False),
        )
        tokens = self.encoder.final_norm(encoded.tokens)
        vector = weights = None
        if self.pooler is not None and encoded.visible_index is None:
            seen = tokens if self.pooler.apply_final_norm else encoded.tokens
            grid = self.encoder.token_grid(*pixel_values.shape[2:])
            vector, weights = self.pooler(seen, self.encoder.num_prefix_tokens, grid, encoded.attentions)
            vector = self.pooled_norm(vector)
        return MIMModelOutput(
            last_hidden_state=tokens,
            pooler_output=vector,
            pooler_weights=weights,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions if asked else None,
            feature_maps=encoded.feature_maps,
            visible_index=encoded.visible_index,
            hidden_index=encoded.hidden_index,
        )

    def check_inputs(self, pixel_values: Tensor, bool_masked_pos: Tensor | None, several: bool = False):
        """Raises:
        ValueError: see `forward`. With `several`, the masks may be (batch, M, rows * cols).
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be (batch, {self.config.num_channels}, height, width) as num_channels says, "
                f"got {tuple(pixel_values.shape)}"
            )
        if self.pooler is not None:
            self.encoder.token_grid(*pixel_values.shape[2:])
        if bool_masked_pos is None:
            return
        rows, cols = self.encoder.mask_grid(*pixel_values.shape[2:])
        batch, shape = len(pixel_values), bool_masked_pos.shape
        shape = (shape[0], shape[2]) if several and len(shape) == 3 else tuple(shape)
        if shape != (batch, rows * cols) or bool_masked_pos.dtype != torch.bool:
            repeated = f" or ({batch}, M, {rows * cols})" if several else ""
            raise ValueError(
                f"bool_masked_pos must be bool ({batch}, {rows * cols}){repeated} for the {rows}x{cols} mask grid, "
                f"got {bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}"
            )


class MIMForPreTraining(MIMPreTrainedModel):
    """Masked encoder, decoder and target. Trains under any `Trainer`: masks come with the batch as `bool_masked_pos`,
    or are drawn here from torch's random state."""

    _auto_class = "AutoModelForPreTraining"
    _keys_to_ignore_on_load_unexpected = [r"^mim\.pooler", r"^mim\.pooled_norm", r"^classifier\."]
    # The loss is a mean over the batch's hidden tokens: Trainer must not divide it by a count of labels.
    accepts_loss_kwargs = False

    def __init__(self, config: MIMConfig):
        super().__init__(config)
        self.mim = MIMModel(config, add_pooling_layer=False, use_mask_token=True)
        check_masking(config, self.mask_grid(*pair(config.image_size)))
        check_part("target", TARGETS, config.target, config.target_config)
        check_part("decoder", DECODERS, config.decoder, config.decoder_config)
        self.target = TARGETS[config.target](config, self.mim.encoder, **config.target_config)
        config.target_config = {**config.target_config, **self.target.options_to_save()}
        outputs, dim = self.target.outputs, self.mim.encoder.hidden_size
        self.decoder = DECODERS[config.decoder](config, self.mim.encoder, outputs["patches"], **config.decoder_config)
        has_global = "global" in outputs
        self.global_head = (
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs["global"])) if has_global else None
        )
        self.post_init()

    def mask_grid(self, height: int, width: int) -> tuple[int, int]:
        """The (rows, cols) of `bool_masked_pos` for images of this size."""
        return self.mim.encoder.mask_grid(height, width)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        return_loss: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> MIMForPreTrainingOutput:
        """pixel_values (batch, channels, height, width), normalised. bool_masked_pos (batch, rows * cols), or
        (batch, M, rows * cols) for M masks of each image; drawn as `masking` says where it is absent."""
        self.mim.check_inputs(pixel_values, bool_masked_pos, several=True)
        grid = self.mask_grid(*pixel_values.shape[2:])
        masks = self._sample_masks(pixel_values, grid) if bool_masked_pos is None else bool_masked_pos
        repeats = masks.shape[1] if masks.ndim == 3 else 1
        masks = masks.flatten(0, 1) if masks.ndim == 3 else masks
        outputs = self.mim(
            pixel_values.repeat_interleave(repeats, dim=0) if repeats > 1 else pixel_values,
            masks,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        predictions = {"patches": self._decode(outputs, masks, grid, self.target.scope)}
        if self.global_head is not None:
            predictions["global"] = self.global_head(self._global_token(outputs, masks))
        loss = None
        if return_loss:
            self.target.bind(self.mim.encoder)
            values = self.target.values(pixel_values, grid)
            if repeats > 1:
                values = {name: value.repeat_interleave(repeats, dim=0) for name, value in values.items()}
            loss = self.target.loss(predictions, values, masks, grid, generator)
        return MIMForPreTrainingOutput(
            loss=loss,
            logits=predictions["patches"],
            bool_masked_pos=masks,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _decode(self, outputs: MIMModelOutput, masks: Tensor, grid: tuple[int, int], scope: str) -> Tensor:
        encoded = EncoderOutput(
            tokens=outputs.last_hidden_state,
            visible_index=outputs.visible_index,
            hidden_index=outputs.hidden_index,
            feature_maps=outputs.feature_maps,
        )
        return self.decoder(encoded, masks, grid, scope)

    def _global_token(self, outputs: MIMModelOutput, masks: Tensor) -> Tensor:
        """The class token (batch, dim), or without one the mean of the visible tokens."""
        tokens, prefix = outputs.last_hidden_state, self.mim.encoder.num_prefix_tokens
        if self.mim.encoder.has_cls_token:
            return tokens[:, 0]
        patches = tokens[:, prefix:]
        if patches.shape[1] != masks.shape[1]:  # hidden tokens were dropped, or a coarser map has mixed them in
            return patches.mean(dim=1)
        visible = (~masks)[..., None].to(patches.dtype)
        return (patches * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)

    def _sample_masks(self, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
        seeds = torch.randint(2**62, (len(pixel_values),)).tolist()
        masks = sample_masks(self.config, grid, [np.random.default_rng(seed) for seed in seeds])
        return masks.to(pixel_values.device)

    @torch.no_grad()
    def reconstruct(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, with_target: bool = False
    ) -> MIMReconstruction:
        """What the model makes of the hidden patches, as pictures. Arguments as of `forward`; of several masks the
        first is shown. `with_target` shows what should have been predicted beside it; it may need a teacher."""
        self.mim.check_inputs(pixel_values, bool_masked_pos, several=True)
        grid = self.mask_grid(*pixel_values.shape[2:])
        masks = self._sample_masks(pixel_values, grid) if bool_masked_pos is None else bool_masked_pos
        masks = masks[:, 0] if masks.ndim == 3 else masks
        predicted = self._decode(self.mim(pixel_values, masks), masks, grid, "all").to(pixel_values.dtype)
        return draw_reconstruction(self, predicted, pixel_values, masks, with_target)


class MIMForImageClassification(MIMPreTrainedModel):
    """Encoder, pooler and a linear classifier. `freeze_encoder()` leaves pooler and classifier to be trained."""

    _auto_class = "AutoModelForImageClassification"
    _keys_to_ignore_on_load_unexpected = PRETRAINING_PARTS

    def __init__(self, config: MIMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mim = MIMModel(config)
        self.classifier = nn.Linear(self.mim.pooler.out_dim, config.num_labels)
        self.post_init()

    def freeze_encoder(self):
        """Keeps the encoder and its last norm as they are, in eval mode, until the model is loaded again."""
        self.mim.encoder.freeze()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """labels (batch,) of class indices, or as `config.problem_type` says -> logits (batch, num_labels)."""
        outputs = self.mim(pixel_values, output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MIMBackbone(BackboneMixin, MIMPreTrainedModel):
    """Feature maps for detection and segmentation: one (batch, channels, rows, cols) per name in `out_features`,
    scaled by `feature_pyramid`."""

    _auto_class = "AutoBackbone"
    _keys_to_ignore_on_load_unexpected = [*PRETRAINING_PARTS, r"^classifier\.", r"^mim\.pooler", r"^mim\.pooled_norm"]

    def __init__(self, config: MIMConfig):
        super().__init__(config)
        self.mim = MIMModel(config, add_pooling_layer=False)
        self.num_features = self.mim.encoder.num_features
        self.pyramid = make_pyramid(self.mim.encoder, config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        outputs = self.mim(pixel_values, output_hidden_states=True, output_attentions=output_attentions)
        encoded = EncoderOutput(
            tokens=outputs.last_hidden_state, feature_maps=outputs.feature_maps, hidden_states=outputs.hidden_states
        )
        maps = dict(zip(self.stage_names, self.mim.encoder.stage_maps(encoded, *pixel_values.shape[2:])))
        return BackboneOutput(
            feature_maps=self.pyramid(tuple(maps[name] for name in self.out_features)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


if __name__ == "hf_mim.modeling.modeling_mim":
    # The plugin, not a copy of this file that travelled with a checkpoint: there remote code must stay in charge.
    AutoModel.register(MIMConfig, MIMModel, exist_ok=True)
    AutoModelForPreTraining.register(MIMConfig, MIMForPreTraining, exist_ok=True)
    AutoModelForMaskedImageModeling.register(MIMConfig, MIMForPreTraining, exist_ok=True)
    AutoModelForImageClassification.register(MIMConfig, MIMForImageClassification, exist_ok=True)
    AutoBackbone.register(MIMConfig, MIMBackbone, exist_ok=True)
    AutoImageProcessor.register(MIMConfig, image_processor_classes={"torchvision": ViTImageProcessor}, exist_ok=True)
