"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class MIMModelOutput(ModelOutput):
    """
    last_hidden_state: (batch, prefix + rows * cols, dim) after the final norm; (batch, prefix + visible, dim) where
        hidden tokens are dropped.
    pooler_output: (batch, dim), the pooler's vector.
    pooler_weights: (batch, [heads,] rows * cols), where the pooler weighs patches.
    hidden_states: the tokens entering the first block and leaving each, before the final norm; on request, None in
        place of those that were not asked for.
    attentions: (batch, heads, length, length) per block; on request.
    feature_maps: (batch, channels, height, width) per stage, the stem first; ConvNets only.
    visible_index, hidden_index: (batch, visible) and (batch, hidden), the places of the tokens in the image, where
        hidden tokens are dropped.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    pooler_weights: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    feature_maps: tuple[Tensor, ...] | None = None
    visible_index: Tensor | None = None
    hidden_index: Tensor | None = None


@dataclass
class MIMForPreTrainingOutput(ModelOutput):
    """
    loss: a scalar.
    logits: (batch, K, dim), the predictions for the hidden tokens in raster order, or for all tokens.
    bool_masked_pos: (batch, rows * cols), True where a token was hidden.
    hidden_states, attentions: the encoder's; on request.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    bool_masked_pos: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MIMReconstruction(ModelOutput):
    """Pictures (batch, 1 or 3, height, width) in [0, 1], of the images' size or, where the target draws larger, all of
    a whole multiple of it: the images, the images without their hidden patches, what the model predicts, and the
    prediction with the visible patches put back. `extra` holds further ones by caption, "target" among them where the
    target is not the image itself; `note` says what must be known."""

    original: Tensor | None = None
    masked: Tensor | None = None
    prediction: Tensor | None = None
    combined: Tensor | None = None
    bool_masked_pos: Tensor | None = None
    extra: dict[str, Tensor] | None = None
    note: str | None = None
