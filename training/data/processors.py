"""The image processor that a checkpoint is saved with."""

from transformers import ViTImageProcessor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.training.data.batches import statistics


BICUBIC = 3  # PIL's number for it


def processor_for(config: MIMConfig) -> ViTImageProcessor:
    """The stock image processor that gives a model's `pixel_values`: resize (bicubic), divide by 255, normalise."""
    (height, width), (mean, std) = pair(config.image_size), statistics(config)
    return ViTImageProcessor(
        size={"height": height, "width": width},
        resample=BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True if config.num_channels == 3 else None,
    )
