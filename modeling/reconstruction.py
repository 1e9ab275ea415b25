"""Pictures of what a pretraining model makes of hidden patches."""

import torch
from torch import Tensor

from .outputs import MIMReconstruction
from .target_base import displayable


def draw_reconstruction(
    model, predicted: Tensor, pixel_values: Tensor, bool_masked_pos: Tensor, with_target: bool
) -> MIMReconstruction:
    """Predictions (batch, rows * cols, dim) of a `MIMForPreTraining` for images (batch, channels, height, width) as
    pictures; `with_target` puts the target's own values beside them."""
    height, width = pixel_values.shape[2:]
    grid, target = model.mask_grid(height, width), model.target
    prediction, extra = target.to_image(predicted, pixel_values, grid, bool_masked_pos), {}
    if with_target:
        target.bind(model.mim.encoder)
        wanted = target.values(pixel_values, grid)["patches"]
        extra = dict(target.comparison(predicted, wanted, pixel_values, grid, bool_masked_pos))
        prediction = extra.pop("prediction", prediction)
    original = displayable(pixel_values, model.config.image_mean, model.config.image_std)
    hidden = bool_masked_pos.view(-1, 1, *grid)
    hidden = hidden.repeat_interleave(height // grid[0], 2).repeat_interleave(width // grid[1], 3)
    return MIMReconstruction(
        original=original,
        masked=torch.where(hidden, 0.5, original),
        prediction=prediction,
        combined=torch.where(hidden, prediction, extra.get("target", original)),
        bool_masked_pos=bool_masked_pos,
        extra=extra or None,
        note=target.image_note,
    )
