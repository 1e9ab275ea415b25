"""The models: `MIMModel`, `MIMForPreTraining`, `MIMForImageClassification`, `MIMBackbone`."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_mim import MIMConfig
from .decoder_base import draw_predicted, heads_of
from .encoder_base import MASK_PARAMETERS, Encoder, EncoderOutput, image_size, select_states, to_grey
from .initial_weights import draw_linear
from .layers import has_checkpointed_layers
from .masking import check_masking, check_nothing_hidden, hides_tokens, sample_masks
from .native_models import load_native
from .options import Grid, pair
from .outputs import MIMForPreTrainingOutput, MIMModelOutput, MIMReconstruction
from .parts import make_decoder, make_encoder, make_global_head, make_pooler, make_target
from .pooler_base import Pooler
from .pyramid import make_pyramid
from .reconstruction import draw_reconstruction


# What a pretraining checkpoint holds and other heads are meant not to have, as patterns of names.
PRETRAINING_PARTS = [*MASK_PARAMETERS, r"^decoder\.", r"^target\.", r"^global_head\."]


HiddenStates = bool | int | list[int] | None  # as in transformers: all of them, or those of these indices


class MIMPreTrainedModel(PreTrainedModel):
    config: MIMConfig
    config_class = MIMConfig
    _auto_class: Any = None
    base_model_prefix = "mim"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True  # of a class; `post_init` asks the instance
    _no_split_modules = ["ViTLayer", "CrossLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self):
        self.supports_gradient_checkpointing = has_checkpointed_layers(self)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if hasattr(module, "init_parameters"):
            module.init_parameters()
        elif isinstance(module, nn.Linear) or hasattr(module, "drawn_as"):
            # xavier as MAE does: with the fixed 0.02 of other models, narrow networks would start far too small.
            draw_linear(module, getattr(module, "drawn_as", "xavier"))
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
        native_fields, state, _ = load_native(name_or_path)
        without = {} if add_pooling_layer else {"add_pooling_layer": False}
        model = cls(MIMConfig(**{**native_fields, **fields}), **without)
        model.get_encoder().load_native_state(state)
        return model.eval()

    def get_encoder(self, modality: str | None = None) -> Encoder:
        """The encoder, whatever the head."""
        return cast(Encoder, self.base_model.encoder)

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
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MIMModelOutput:
        """pixel_values (batch, channels, height, width), normalised; height and width may differ from the config's, and
        RGB becomes grey for a model of one channel (see `to_grey`). bool_masked_pos (batch, rows * cols) on
        `encoder.mask_grid(height, width)`, True = hidden. output_hidden_states: all, or indices, the others being None.

        Raises:
            ValueError: the channels are not the config's, the size is no multiple of the patch, or the mask does not
                fit the grid.
        """
        pixel_values = to_grey(pixel_values, self.config.num_channels)
        self.check_inputs(pixel_values, bool_masked_pos)
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        asked = self.config.output_attentions if output_attentions is None else output_attentions
        encoded = self.encoder(
            pixel_values.to(self.dtype),
            bool_masked_pos,
            states is not None and states is not False,
            asked or ("last" if self.pooler is not None and self.pooler.needs_attentions else False),
        )
        tokens = self.encoder.final_norm(encoded.tokens)
        vector, weights = self._pool(encoded, tokens, image_size(pixel_values))
        return MIMModelOutput(
            last_hidden_state=tokens,
            pooler_output=vector,
            pooler_weights=weights,
            hidden_states=select_states(encoded.hidden_states, states),
            attentions=encoded.attentions if asked else None,
            feature_maps=encoded.feature_maps,
            visible_index=encoded.visible_index,
            hidden_index=encoded.hidden_index,
        )

    def _pool(self, encoded: EncoderOutput, normed: Tensor, size: Grid) -> tuple[Tensor | None, Tensor | None]:
        """-> the pooler's vector and weights; None without a pooler, and where tokens were dropped."""
        if self.pooler is None or self.pooled_norm is None or encoded.visible_index is not None:
            return None, None
        tokens = normed if self.pooler.apply_final_norm else encoded.tokens
        grid = self.encoder.token_grid(*size)
        vector, weights = self.pooler(tokens, self.encoder.num_prefix_tokens, grid, encoded.attentions)
        return self.pooled_norm(vector), weights

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
        rows, cols = self.encoder.target_grid(*pixel_values.shape[2:])
        batch, shape = len(pixel_values), tuple(bool_masked_pos.shape)
        shape = (shape[0], shape[2]) if several and len(shape) == 3 else shape
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
        self.hides_tokens = hides_tokens(config)
        self.mim = MIMModel(config, add_pooling_layer=False, use_mask_token=self.hides_tokens)
        check_masking(config, self.mask_grid(*pair(config.image_size)))
        self.target = make_target(config, self.mim.encoder)
        config.target_config = {**config.options("target"), **self.target.options_to_save()}
        self.decoder = make_decoder(config, self.mim.encoder, self.target)
        self.needs_hidden_states = any(head.needs_hidden_states for head in heads_of(self.decoder))
        self.global_head = make_global_head(self.mim.encoder.hidden_size, self.target)
        self.post_init()

    def mask_grid(self, height: int, width: int) -> Grid:
        """The (rows, cols) of `bool_masked_pos`, of predictions and targets for images of this size."""
        return self.mim.encoder.target_grid(height, width)

    def learned_tokens(self, bool_masked_pos: Tensor) -> Tensor:
        """The tokens that the loss is about, bool as `bool_masked_pos`: the hidden ones, or with masking `none` all."""
        return bool_masked_pos if self.hides_tokens else ~bool_masked_pos

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        return_loss: bool = True,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> MIMForPreTrainingOutput:
        """pixel_values (batch, channels, height, width), normalised. bool_masked_pos (batch, rows * cols), or
        (batch, M, rows * cols) for M masks of each image; drawn as `masking` says where it is absent."""
        masks = self._masks(pixel_values, bool_masked_pos)
        repeats = masks.shape[1] if masks.ndim == 3 else 1
        masks = masks.flatten(0, 1) if masks.ndim == 3 else masks
        images = pixel_values.repeat_interleave(repeats, dim=0) if repeats > 1 else pixel_values
        outputs, encoded = self._encode(images, masks, output_hidden_states, output_attentions)
        learned = self.learned_tokens(masks)
        if self.training and self.target.scope == "hidden":
            encoded, learned = draw_predicted(self.decoder, encoded, learned)
        grid = self.mask_grid(*image_size(pixel_values))
        predictions = {"patches": self.decoder(encoded, masks, grid, self.target.scope)}
        if self.global_head is not None:
            predictions["global"] = self.global_head(self.mim.encoder.global_token(outputs.last_hidden_state, masks))
        loss = None
        if return_loss:
            targets = self._targets(pixel_values, grid)  # once for each image, however many masks of it there are
            if repeats > 1:
                targets = {name: target.repeat_interleave(repeats, dim=0) for name, target in targets.items()}
            loss = self.target.loss(predictions, targets, learned, grid, generator)
        return MIMForPreTrainingOutput(
            loss=loss,
            logits=predictions["patches"],
            bool_masked_pos=masks,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _masks(self, pixel_values: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        """The masks that are given, checked; else new ones from torch's random state."""
        self.mim.check_inputs(pixel_values, bool_masked_pos, several=True)
        if bool_masked_pos is not None:
            if not self.hides_tokens:
                check_nothing_hidden(bool_masked_pos)
            return bool_masked_pos
        seeds = torch.randint(2**62, (len(pixel_values),)).tolist()
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return sample_masks(self.config, self.mask_grid(*image_size(pixel_values)), rngs).to(pixel_values.device)

    def _targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        self.target.bind(self.mim.encoder)
        return self.target.targets(pixel_values, grid)

    def _encode(
        self, images: Tensor, masks: Tensor, hidden_states: HiddenStates = None, attentions: bool | None = None
    ) -> tuple[MIMModelOutput, EncoderOutput]:
        """One mask for each image -> what the encoder returns, and what the decoder reads of it."""
        outputs = self.mim(
            images,
            masks if self.hides_tokens else None,
            output_hidden_states=True if self.needs_hidden_states else hidden_states,
            output_attentions=attentions,
            return_dict=True,
        )
        names = ("visible_index", "hidden_index", "feature_maps", "hidden_states")
        return outputs, EncoderOutput(outputs.last_hidden_state, **{name: getattr(outputs, name) for name in names})

    @torch.no_grad()
    def reconstruct(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, with_target: bool = False
    ) -> MIMReconstruction:
        """What the model makes of the hidden patches, as pictures. Arguments as of `forward`; of several masks the
        first is shown. `with_target` shows what should have been predicted beside it; it may need a teacher."""
        masks = self._masks(pixel_values, bool_masked_pos)
        masks = masks[:, 0] if masks.ndim == 3 else masks
        grid = self.mask_grid(*image_size(pixel_values))
        _, encoded = self._encode(pixel_values, masks)
        predicted = self.decoder(encoded, masks, grid, "all").to(pixel_values.dtype)
        targets = self._targets(pixel_values, grid)["patches"] if with_target else None
        return draw_reconstruction(self.config, self.target, pixel_values, predicted, targets, masks, grid)


class MIMForImageClassification(MIMPreTrainedModel):
    """Encoder, pooler and a linear classifier. `freeze_encoder()` leaves pooler and classifier to be trained."""

    _auto_class = "AutoModelForImageClassification"
    _keys_to_ignore_on_load_unexpected = PRETRAINING_PARTS

    def __init__(self, config: MIMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mim = MIMModel(config)
        self.classifier = nn.Linear(cast(Pooler, self.mim.pooler).out_dim, cast(int, config.num_labels))
        self.post_init()

    def freeze_encoder(self):
        """Keeps the encoder and its last norm as they are, in eval mode, until the model is loaded again."""
        self.mim.encoder.freeze()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """labels (batch,) of class indices, or as `config.problem_type` says -> logits (batch, num_labels)."""
        outputs = self.mim(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
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
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        outputs = self.mim(
            pixel_values, output_hidden_states=True, output_attentions=output_attentions, return_dict=True
        )
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
