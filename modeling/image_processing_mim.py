"""The image processor of checkpoints whose images a stock one cannot prepare: 16 bits, floats, missing values, any
number of channels, and centre crops that are not square."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import SegformerImageProcessor, ViTImageProcessor
from transformers.processing_utils import ImagesKwargs

from .pixels import MAX_PIXELS, channels_last, from_pillow, pixel_rules, read_file
from .resizing import fit_whole


class MIMImageProcessorKwargs(ImagesKwargs, total=False):
    num_channels: int
    value_range: list | None
    nodata: float | str | None
    eval_crop: float | str | None


class MIMImageProcessor(ViTImageProcessor):
    r"""Makes `pixel_values` as training and evaluation of hf_mim make them.

    It takes paths of image files (.npy and TIFF included), PIL images, and arrays or tensors of the values that the
    files hold: (height, width), (height, width, channels) or (channels, height, width).

    Args:
        num_channels: of the model; grey is repeated.
        value_range: values that become black and white: one pair, or one per channel.
        nodata: the value of what was not measured, `nan` for NaN; it becomes the mean.
        eval_crop: see `fit_whole`.
        size, image_mean, image_std: as of every image processor.
    """

    _auto_class: Any = "AutoImageProcessor"  # saving writes the code beside the config
    valid_kwargs = MIMImageProcessorKwargs
    resample = PIL.Image.Resampling.BICUBIC
    num_channels = 3
    value_range = None
    nodata = None
    eval_crop = None
    post_process_semantic_segmentation = SegformerImageProcessor.post_process_semantic_segmentation

    def fetch_images(self, image_url_or_urls: Any):
        """Paths of files -> the values that they hold; everything else as it is."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str | Path) and Path(image_url_or_urls).is_file():
            return read_file(Path(image_url_or_urls).read_bytes(), self.num_channels, MAX_PIXELS)
        return super().fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        images = self.fetch_images(images)
        if isinstance(images, list | tuple):
            return list(images)
        if isinstance(images, PIL.Image.Image):
            return [images]
        return list(images) if images.ndim == expected_ndims + 1 else [images]

    def process_image(
        self, image: Any, do_convert_rgb=None, input_data_format=None, device=None, **kwargs: Any
    ) -> torch.Tensor:
        """One image -> (num_channels, height, width), uint8."""
        options = {name: kwargs.get(name, getattr(self, name)) for name in ("value_range", "nodata", "image_mean")}
        channels = kwargs.get("num_channels") or self.num_channels
        rules = pixel_rules(channels, options["image_mean"], options["value_range"], options["nodata"])
        if isinstance(image, PIL.Image.Image):
            values = from_pillow(image, channels)
        else:
            values = image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
        try:
            pixels, _ = rules.apply(channels_last(values, channels))
        except ValueError as error:
            raise ValueError(f"an image {error}") from None
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(1, 2, 0))).permute(2, 0, 1).to(device)

    def resize(self, image: torch.Tensor, size, resample=None, antialias: bool = True, **kwargs) -> torch.Tensor:
        return fit_whole(image, (size.height, size.width), self.eval_crop)
