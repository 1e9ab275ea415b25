"""The configuration of every model of hf_mim: five parts, each a name and a dict of options."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .options import Size, pair, unknown_choice


# The Auto classes that a saved checkpoint answers to through remote code. `save_pretrained` of transformers writes
# only the entry of the class that is saved; a checkpoint of any of our heads must load as all of them.
AUTO_MAP = {
    "AutoConfig": "configuration_mim.MIMConfig",
    "AutoModel": "modeling_mim.MIMModel",
    "AutoModelForPreTraining": "modeling_mim.MIMForPreTraining",
    "AutoModelForMaskedImageModeling": "modeling_mim.MIMForPreTraining",
    "AutoModelForImageClassification": "modeling_mim.MIMForImageClassification",
    "AutoBackbone": "modeling_mim.MIMBackbone",
}

# Keyword arguments that transformers itself puts into a config beside its dataclass fields.
TRANSFORMERS_KEYS = {
    *("num_labels", "output_attentions", "attn_implementation", "experts_implementation", "torch_dtype"),
    *("name_or_path", "auto_map", "model_type", "quantization_config", "out_features", "out_indices", "use_cache"),
}

# Of checkpoints. It is raised by a change that this file's older versions would load wrongly, and then `from_dict`
# learns to read the version before; a new field with a default is no such change.
FORMAT_VERSION = 1


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
class MIMConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""One config class for every head, because the Auto classes need one config class per model.

    Sizes are an int or a (height, width) pair. Every option has a default, so a partial config is valid. The encoder
    and the pooler are checked here; the masking, decoder and target when `MIMForPreTraining` is built, so that a
    checkpoint made with somebody's private target still loads as `AutoModel`.

    Args:
        image_size: pixels; other resolutions work at inference, positions are interpolated.
        num_channels: 1 to N.
        image_mean, image_std: per channel, of the normalised `pixel_values`; ImageNet's for three channels, else 0.5.
        encoder, encoder_config: an entry of `ENCODERS` and its options.
        masking, masking_config: an entry of `MASK_GENERATORS`; `ratio` in (0, 1) is the share of hidden tokens.
        masks_per_image: how many masks of each image a training step sees (data2vec 2.0); its target is computed once.
        decoder, decoder_config: an entry of `DECODERS`.
        target, target_config: an entry of `TARGETS`.
        pooler, pooler_config: an entry of `POOLERS`; `apply_final_norm` says whether it sees the tokens after the
            encoder's last norm.
        feature_pyramid: of `MIMBackbone`, for encoders of one stride: factors by which the `out_features` are scaled;
            [4, 2, 1, 0.5] makes strides 4, 8, 16 and 32 of patches of 16.
        format_version: of the checkpoint that holds this config; nobody sets it.

    Raises:
        ValueError: an unknown key, part or option, values that do not fit together, or a newer format version.
    """

    model_type = "mim"
    _auto_class = "AutoConfig"

    image_size: Size = 224
    num_channels: int = 3
    image_mean: list[float | int] | tuple[float | int, ...] | None = None
    image_std: list[float | int] | tuple[float | int, ...] | None = None
    encoder: str = "vit"
    encoder_config: dict | None = None
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
    stage_names: list[str] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        check_format(self.format_version)
        fields = [name for name in MIMConfig.__annotations__ if not name.startswith("_")]
        fields += ["num_labels", "id2label", "label2id", "out_features", "out_indices"]
        for key in kwargs:
            if key not in TRANSFORMERS_KEYS and not key.startswith("_"):
                raise unknown_choice("key of MIMConfig", key, fields)
        for part in ("encoder", "masking", "decoder", "target", "pooler"):
            setattr(self, f"{part}_config", dict(getattr(self, f"{part}_config") or {}))
        self._fill_statistics()
        stages = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        super().__post_init__(**kwargs)
        self.stage_names = self._check_encoder_and_pooler()
        self.set_output_features_output_indices(**stages)

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
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std}")

    def _check_encoder_and_pooler(self) -> list[str]:
        # Imported with the first config, not with this file: the model classes need most of transformers, and
        # `import hf_mim` is to be as quick as `import transformers`. Importing them also registers them (see there).
        from .modeling_mim import check_encoder_and_pooler

        return check_encoder_and_pooler(self)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; keys that this version does not know are kept as attributes, since libraries and later
        versions add some. (The constructor refuses them: there they are typing errors.)"""
        check_format(config_dict.get("format_version", 1))  # before anything that a newer version may have changed
        known = {*cls.__dataclass_fields__, *TRANSFORMERS_KEYS}
        extra = {k: v for k, v in config_dict.items() if k not in known and not k.startswith("_")}
        result = super().from_dict({k: v for k, v in config_dict.items() if k not in extra}, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for key, value in extra.items():
            setattr(config, key, value)
        return result

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with the whole `AUTO_MAP`."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        self.auto_map = dict(AUTO_MAP)
