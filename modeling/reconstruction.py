"""Pictures of what a pretraining model makes of hidden patches."""

import torch
from torch import Tensor

from .configuration_base import MIMConfigBase
from .encoder_base import image_size
from .masking import hides_tokens
from .options import Grid
from .outputs import MIMReconstruction
from .target_base import VISIBLE_NOTE, WHOLE_NOTE, Target, displayable


def draw_reconstruction(
    config: MIMConfigBase,
    target: Target,
    pixel_values: Tensor,
    predicted: Tensor,
    targets: Tensor | None,
    bool_masked_pos: Tensor,
    grid: Grid,
) -> MIMReconstruction:
    """Predictions (batch, rows * cols, dim) for images (batch, channels, height, width) as pictures; `targets`, of the
    shape of the predictions or integer codes, are shown beside them where they are given."""
    prediction, extra = target.to_image(predicted, pixel_values, grid, bool_masked_pos), {}
    if targets is not None:
        extra = dict(target.comparison(predicted, targets, pixel_values, grid, bool_masked_pos))
        prediction = extra.pop("prediction", prediction)
    size = image_size(prediction)
    original = enlarged(displayable(pixel_values, *config.statistics(), config.display_bands), size)
    hidden = enlarged(bool_masked_pos.view(-1, 1, *grid), size)
    note = target.image_note
    if not hides_tokens(config):  # the prediction stands everywhere
        note, combined = note.replace(VISIBLE_NOTE, WHOLE_NOTE), prediction
    else:
        combined = torch.where(hidden, prediction, extra.get("target", original))
    return MIMReconstruction(
        original=original,
        masked=torch.where(hidden, 0.5, original),
        prediction=prediction,
        combined=combined,
        bool_masked_pos=bool_masked_pos,
        extra=extra or None,
        note=note,
    )


def enlarged(images: Tensor, size: Grid) -> Tensor:
    """(batch, channels, height, width) -> by whole factors to `size`."""
    for axis, length in zip((2, 3), size):
        images = images.repeat_interleave(length // images.shape[axis], dim=axis)
    return images
