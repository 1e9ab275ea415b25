"""What a recipe says about data: the section `data`, and the augmentations of the section `finetune`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_mim.modeling.pixels import MAX_PIXELS, as_number, as_pairs, crop_share
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.data import urls


# The smallest value that a number may have.
MINIMUM = {
    "max_train_images": 1,
    "max_eval_images": 0,
    "max_bad_images": 0,
    "max_pixels": 1,
    "cache_size": 1,
    "shuffle_buffer": 0,
}
INTERPOLATIONS = ("bicubic", "bilinear")  # of random crops
MAGNITUDES = 11  # strengths of RandAugment, 0 to 10 as in timm's `rand-m9`


@dataclass
class DataArguments:
    """The section `data` of a recipe.

    Args:
        dataset: a Hub id, or a folder or file of images, parquet or WebDataset shards, or the URL of one, as fsspec
            knows them (s3://, hf://, https://); None is the Fashion-MNIST subset that ships with the package.
        subset: the configuration of a Hub data set that has several.
        split: what to train on; None is `train`, else the only split there is.
        eval_split: what to test on; None is `test` or `validation`, else a tenth held out from a labelled `split`.
        extra_splits: further splits for pretraining, such as the folder `unlabeled` beside `train`; others ignore them.
        image_column, label_column, mask_column: None finds them; masks are for segmentation.
        mask_values: what stands for each class in a mask, in the order of the classes: grey values such as [0, 128], or
            colours such as [[0, 0, 0], [255, 0, 0]]. A pixel becomes the class of the nearest one; what is further from
            all than half of what they are apart has no class. None takes the values as the ids of the classes.
        streaming: read the data set as it comes instead of downloading or indexing it first; needs
            `training.max_steps`. Its shards (files; slices of a folder) are dealt to the loader's workers in all
            processes: give it several times as many as workers, of like size. The number of workers and processes
            at the beginning is part of what the order of the images follows from. See `StreamedImages`.
        shuffle_buffer: how many undecoded images of a stream are held to draw the next one from; its shards are read in
            a random order. 1 shuffles the shards only, 0 keeps the stream's own order.
        max_train_images: train only on so many, drawn at random from the seed and of every class. Of a stream the first
            so many, after it was shuffled by `shuffle_buffer`; each worker then reads all of them.
        max_eval_images: use at most so many images of either split for the scores, drawn at random, always the same and
            of every class; 0 leaves the scores out.
        crop_scale: area of the random crops as shares of the image, in (0, 1]; None trains on images as they are
            evaluated: see `eval_crop`.
        interpolation: how random crops are resized, bicubic or bilinear (SimMIM, A2MIM); whole images are always
            resized by bicubic interpolation.
        horizontal_flip: mirror half of the training images.
        color_jitter: strength, in [0, 1], of random brightness, contrast and saturation, after the crop; 0 changes
            nothing. For images of one or three channels.
        crop_on_device: crop and flip on the device instead of in the loader; for images of one size that are held in
            memory. Slower on a processor, and not measured on a GPU.
        max_bad_images: how many files may be skipped because they cannot be decoded: a share below 1 (of which at
            least one image), or a number. The same holds for damaged shards of a stream.
        max_pixels: images with more of them are bad ones; they take memory.
        value_range: the values that become black and white, 0 and 255: one pair, one pair per channel, or `auto`, the
            0.1 and 99.9 percentiles of each channel in a sample. Values beyond are clipped. None: that of the
            checkpoint, else 8-bit values stay, other whole numbers are divided by 257, and floats lie in [0, 1].
        nodata: the value of what was not measured, or `nan`; it becomes the mean, 0 after normalisation.
        eval_crop: how a whole image gets the model's size: `squeeze`, or the share of its shorter side that a centre
            crop keeps (`none` is 1). None: that of the checkpoint, else 0.875. See `modeling.resizing.fit_whole`.
        forgetting_dataset: a data set as of `dataset`, with labels or without, on which a run that starts from another
            encoder (`model.init_from`) watches what is forgotten, besides its own; None is the images that ship.
        display_bands: numbers of the three channels, or the one, that pictures show, counted from 0.
        memory_limit_mb: images of one size that fit into this much memory are decoded once, and kept.
        cache_decoded: decode every image once, into a file that is much larger than the images; see `DecodedCache`.
        cache_dir: where that file lies, and those of `training.cache_teacher`; None is `hf_mim` in the cache folder
            of `datasets`.
        cache_size: pixels to which the shorter side is shrunk for it; null keeps the size, and the crops exact.
    """

    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    eval_split: str | None = None
    extra_splits: list[str] | None = None
    image_column: str | None = None
    label_column: str | None = None
    mask_column: str | None = None
    mask_values: list | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    max_train_images: int | None = None
    max_eval_images: int | None = None
    crop_scale: list[float] | None = None
    interpolation: str = "bicubic"
    horizontal_flip: bool = True
    color_jitter: float = 0.0
    crop_on_device: bool = False
    max_bad_images: float = 0.01
    max_pixels: int = MAX_PIXELS
    value_range: list | str | None = None
    nodata: float | str | None = None
    eval_crop: float | str | None = None
    forgetting_dataset: str | None = None
    display_bands: list[int] | None = None
    memory_limit_mb: int = 1024
    cache_decoded: bool = False
    cache_dir: str | None = None
    cache_size: int | None = None

    def __post_init__(self):
        urls.check_url("data.dataset", self.dataset)
        urls.check_url("data.forgetting_dataset", self.forgetting_dataset)
        urls.check_local("data.cache_dir", self.cache_dir)
        if self.streaming and self.crop_on_device:
            raise RecipeError(
                "data.crop_on_device needs images that are held in memory: leave out data.streaming",
                "data.crop_on_device",
            )
        if self.interpolation not in INTERPOLATIONS:
            message = f"data.interpolation must be bicubic or bilinear, not {self.interpolation!r}"
            raise RecipeError(message, "data.interpolation")
        if self.interpolation != "bicubic" and self.crop_on_device:
            raise RecipeError("data.crop_on_device is bicubic: leave data.interpolation out", "data.interpolation")
        if not 0 <= self.color_jitter <= 1:
            raise RecipeError(f"data.color_jitter must be in [0, 1], not {self.color_jitter}", "data.color_jitter")
        if self.color_jitter and self.crop_on_device:
            raise RecipeError("data.color_jitter does not go with data.crop_on_device", "data.color_jitter")
        self._check_mask_values()
        scale = self.crop_scale
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise RecipeError(
                f"data.crop_scale must be two shares like [0.2, 1.0], or null, not {scale}", "data.crop_scale"
            )
        self._check_pixels()
        for name, smallest in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise RecipeError(f"data.{name} must be at least {smallest}, not {value}", f"data.{name}")

    def _check_pixels(self):
        if isinstance(self.nodata, float) and not math.isfinite(self.nodata):
            self.nodata = str(self.nodata)  # JSON has no such numbers
        if isinstance(self.value_range, str) and self.value_range != "auto":
            message = f"data.value_range must be a pair, one pair per channel, or auto, not {self.value_range!r}"
            raise RecipeError(message, "data.value_range")
        checks: tuple[tuple[str, Callable], ...] = (
            ("value_range", lambda value: value == "auto" or as_pairs(value, max(1, len(value or [])))),
            ("nodata", as_number),
            ("eval_crop", crop_share),
        )
        for name, check in checks:
            try:
                check(getattr(self, name))
            except ValueError as error:
                raise RecipeError(f"data.{error}", f"data.{name}") from None
        bands = self.display_bands
        if bands is not None and (len(bands) not in (1, 3) or min(bands) < 0):
            raise RecipeError(f"data.display_bands must be one or three channels, not {bands}", "data.display_bands")

    def _check_mask_values(self) -> None:
        values = self.mask_values
        if values is None:
            return
        grey = all(isinstance(value, int) for value in values)
        colours = all(isinstance(value, list) and len(value) == 3 for value in values)
        if len(values) < 2 or not (grey or colours) or len(set(map(str, values))) < len(values):
            raise RecipeError(
                "data.mask_values must be different grey values like [0, 128], or colours like "
                f"[[0, 0, 0], [255, 0, 0]], one for each of at least two classes, not {values}",
                "data.mask_values",
            )


@dataclass
class AugmentArguments:
    """The augmentations of fine-tuning, part of the section `finetune` of a recipe.

    Args:
        mixup, cutmix: alpha of the Beta distribution that the shares are drawn from; 0 switches it off. With both, each
            pair of images gets one of them.
        mix_probability: for a pair to be mixed at all.
        randaugment: strength, 0 to 10 as in timm's names (`rand-m9` is 9); 0 switches it off.
        randaugment_ops: how many operations an image gets.
        random_erasing: probability that a rectangle of an image is replaced by noise.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    randaugment: int = 0
    randaugment_ops: int = 2
    random_erasing: float = 0.0

    def __post_init__(self):
        for name in ("mix_probability", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"finetune.{name} must be in [0, 1], not {getattr(self, name)}", f"finetune.{name}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                value = getattr(self, name)
                raise RecipeError(f"finetune.{name} must be 0 or a positive number, not {value}", f"finetune.{name}")
        if not 0 <= self.randaugment < MAGNITUDES:
            raise RecipeError(
                f"finetune.randaugment must be from 0 to {MAGNITUDES - 1}, not {self.randaugment}",
                "finetune.randaugment",
            )
        if self.randaugment_ops < 1:
            raise RecipeError(
                f"finetune.randaugment_ops must be at least 1, not {self.randaugment_ops}", "finetune.randaugment_ops"
            )
