"""The image processor that a checkpoint is saved with."""

from typing import Any

from transformers import ViTImageProcessor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.image_processing_mim import MIMImageProcessor
from hf_mim.modeling.options import pair
from hf_mim.modeling.pixels import crop_share
from hf_mim.training.data.batches import statistics
from hf_mim.training.data.sample import PixelSample, fits_stock_processor, sizes_like


BICUBIC = 3  # PIL's number for it


def processor_for(config: MIMConfig, sample: PixelSample | None = None) -> ViTImageProcessor:
    """The image processor that gives a model's `pixel_values` as its evaluation does.

    A stock one where that can do it, which loads and works in pipelines without code of this project; else ours.

    Args:
        sample: of the images that the model was trained on; None stands for 8-bit images of any other size.
    """
    (height, width), (mean, std) = pair(config.image_size), statistics(config)
    fields: dict[str, Any] = {"resample": BICUBIC, "image_mean": list(mean), "image_std": list(std)}
    share, sizes = crop_share(config.eval_crop), sizes_like(sample, config)
    squeezes = share is None or sizes == "model"
    crops = sizes == "other" and height == width
    if not fits_stock_processor(sample, config) or not (squeezes or crops):
        return own_processor(config, (height, width), config.eval_crop)
    fields["do_convert_rgb"] = True if config.num_channels == 3 else None
    if share is None or squeezes:
        return ViTImageProcessor(size={"height": height, "width": width}, **fields)
    return ViTImageProcessor(
        size={"shortest_edge": max(height, round(height / share))},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        **fields,
    )


def own_processor(config: MIMConfig, size: tuple[int, int], eval_crop: float | str | None) -> MIMImageProcessor:
    """The image processor of this project, with its (height, width) and crop."""
    mean, std = statistics(config)
    options: dict[str, Any] = {name: getattr(config, name) for name in ("num_channels", "value_range", "nodata")}
    options["eval_crop"] = eval_crop
    return MIMImageProcessor(
        size={"height": size[0], "width": size[1]},
        resample=BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
        **options,
    )
