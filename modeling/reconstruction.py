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
    grid, target = model.mask_grid(*pixel_values.shape[2:]), model.target
    prediction, extra = target.to_image(predicted, pixel_values, grid, bool_masked_pos), {}
    if with_target:
        target.bind(model.mim.encoder)
        wanted = target.values(pixel_values, grid)["patches"]
        extra = dict(target.comparison(predicted, wanted, pixel_values, grid, bool_masked_pos))
        prediction = extra.pop("prediction", prediction)
    size = tuple(prediction.shape[2:])
    original = enlarged(displayable(pixel_values, model.config.image_mean, model.config.image_std), size)
    hidden = enlarged(bool_masked_pos.view(-1, 1, *grid), size)
    return MIMReconstruction(
        original=original,
        masked=torch.where(hidden, 0.5, original),
        prediction=prediction,
        combined=torch.where(hidden, prediction, extra.get("target", original)),
        bool_masked_pos=bool_masked_pos,
        extra=extra or None,
        note=target.image_note,
    )


def enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(batch, channels, height, width) -> by whole factors to `size`."""
    for axis, length in zip((2, 3), size):
        images = images.repeat_interleave(length // images.shape[axis], dim=axis)
    return images
