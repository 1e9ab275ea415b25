"""The fields of the configuration, and what can be checked of them without the parts that they name. The parts read
this class; `MIMConfig`, which builds them to check them, stands above them."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .options import Size, pair, unknown_choice


# The parts of a model: each a name, and a dict of options in the field <part>_config.
PARTS = ("encoder", "masking", "decoder", "target", "pooler")

# Keyword arguments that transformers itself puts into a config beside its dataclass fields.
TRANSFORMERS_KEYS = {
    *("num_labels", "output_attentions", "attn_implementation", "experts_implementation", "torch_dtype"),
    *("name_or_path", "auto_map", "model_type", "quantization_config", "out_features", "out_indices", "use_cache"),
}

# Of checkpoints. It is raised by a change that this file's older versions would load wrongly, and then `from_dict`
# (`format_versions.py`) learns to read the version before; a new field with a default is no such change.
FORMAT_VERSION = 2


def check_format(version) -> None:
    """Raises:
    ValueError: a checkpoint of this format version was saved by a newer hf_mim than this.
    """
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint was made by a newer hf_mim: its format version is {version!r}, and this one reads up to "
            f"{FORMAT_VERSION}. Upgrade it: pip install -U hf_mim"
        )


@strict
class MIMConfigBase(BackboneConfigMixin, PreTrainedConfig):
    """Everything of `MIMConfig` but the check of encoder and pooler: see there."""

    model_type = "mim"
    _auto_class = "AutoConfig"

    image_size: Size = 224
    num_channels: int = 3
    image_mean: list[float | int] | tuple[float | int, ...] | None = None
    image_std: list[float | int] | tuple[float | int, ...] | None = None
    value_range: list | tuple | None = None
    nodata: float | int | str | None = None
    eval_crop: float | int | str | None = None
    display_bands: list[int] | tuple[int, ...] | None = None
    encoder: str = "vit"
    encoder_config: dict | None = None
    origin: dict | None = None
    masking: str = "random"
    masking_config: dict | None = None
    masks_per_image: int = 1
    decoder: str = "transformer"
    decoder_config: dict | None = None
    target: str = "pixel"
    target_config: dict | None = None
    pooler: str = "mean"
    pooler_config: dict | None = None
    initializer_range: float | int = 0.02
    feature_pyramid: list[float | int] | tuple[float | int, ...] | None = None
    format_version: int = FORMAT_VERSION
    plugins: list[str] | tuple[str, ...] | None = None
    stage_names: list[str] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        check_format(self.format_version)
        fields = [name for name in MIMConfigBase.__annotations__ if not name.startswith("_")]
        fields += ["num_labels", "id2label", "label2id", "out_features", "out_indices"]
        for key in kwargs:
            if key not in TRANSFORMERS_KEYS and not key.startswith("_"):
                raise unknown_choice("key of MIMConfig", key, fields)
        for part in PARTS:
            setattr(self, f"{part}_config", dict(self.options(part)))
        self._fill_statistics()
        super().__post_init__(**kwargs)

    def options(self, part: str) -> dict:
        """The options of one of the `PARTS`."""
        return getattr(self, f"{part}_config") or {}

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, by which `pixel_values` are normalised."""
        return list(self.image_mean or ()), list(self.image_std or ())

    def get_text_config(self, decoder=None, encoder=None):
        """This config: `PreTrainedConfig` would take the field `decoder` for a config of text."""
        return self

    def _fill_statistics(self):
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")
        pair(self.image_size)
        imagenet = self.num_channels == 3
        self.image_mean = list(self.image_mean or ([0.485, 0.456, 0.406] if imagenet else [0.5] * self.num_channels))
        self.image_std = list(self.image_std or ([0.229, 0.224, 0.225] if imagenet else [0.5] * self.num_channels))
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.num_channels:
                raise ValueError(f"{name} has {len(getattr(self, name))} values for num_channels={self.num_channels}")
        bands = self.display_bands
        if bands is not None and (len(bands) not in (1, 3) or min(bands) < 0 or max(bands) >= self.num_channels):
            raise ValueError(f"display_bands must be one or three of {self.num_channels} channels from 0, got {bands}")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std}")
