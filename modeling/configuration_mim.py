"""The configuration of every model of hf_mim: five parts, each a name and a dict of options."""

from huggingface_hub.dataclasses import strict

from .configuration_base import TRANSFORMERS_KEYS, MIMConfigBase, check_format
from .foreign import check_config
from .format_versions import upgrade


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


@strict
class MIMConfig(MIMConfigBase):
    r"""One config class for every head, because the Auto classes need one config class per model.

    Sizes are an int or a (height, width) pair. Every option has a default, so a partial config is valid. The encoder
    and the pooler are checked here; the masking, decoder and target when `MIMForPreTraining` is built, so that a
    checkpoint made with somebody's private target still loads as `AutoModel`.

    Args:
        image_size: pixels; other resolutions work at inference, positions are interpolated.
        num_channels: 1 to N.
        image_mean, image_std: per channel, of the normalised `pixel_values`; ImageNet's for three channels, else 0.5.
        value_range, nodata, eval_crop: how the values and the shape of a file become those of `pixel_values`: see
            `pixels.PixelRules` and `resizing.fit_whole`. A run writes here what it was trained with.
        display_bands: numbers of the channels that pictures show as red, green and blue, counted from 0; or of one.
        encoder, encoder_config: an entry of `ENCODERS` and its options.
        origin: of an encoder that was made of somebody else's: its `library`, transformers or timm, and that library's
            own options. `hf-mim export` goes back to it.
        masking, masking_config: an entry of `MASK_GENERATORS`; `ratio` in (0, 1) is the share of hidden tokens.
        masks_per_image: how many masks of each image a training step sees (data2vec 2.0); its target is computed once.
        decoder, decoder_config: an entry of `DECODERS`.
        target, target_config: an entry of `TARGETS`.
        pooler, pooler_config: an entry of `POOLERS`; `apply_final_norm` says whether it sees the tokens after the
            encoder's last norm.
        initializer_range: standard deviation of the weights that a part draws from a normal distribution.
        feature_pyramid: of `MIMBackbone`, for encoders of one stride: factors by which the `out_features` are scaled;
            [4, 2, 1, 0.5] makes strides 4, 8, 16 and 32 of patches of 16.
        plugins: modules of other projects that the parts come from; saved with a checkpoint, and never imported by it.
        format_version: of the checkpoint that holds this config; nobody sets it.

    Raises:
        ValueError: an unknown key, part or option, values that do not fit together, or a newer format version.
    """

    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs):
        # Imported with the first config, not with this file: the parts need most of transformers, and
        # `import hf_mim` is to be as quick as `import transformers`.
        from .parts import check_encoder_and_pooler

        stages = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        super().__post_init__(**kwargs)
        self.stage_names = check_encoder_and_pooler(self)
        self.set_output_features_output_indices(**stages)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; keys that this version does not know are kept as attributes, since libraries and later
        versions add some. (The constructor refuses them: there they are typing errors.)"""
        check_format(config_dict.get("format_version", 1))  # before anything that a newer version may have changed
        check_config(config_dict)
        config_dict = upgrade(config_dict)
        known = {*cls.__dataclass_fields__, *TRANSFORMERS_KEYS}
        extra = {k: v for k, v in config_dict.items() if k not in known and not k.startswith("_")}
        result = super().from_dict({k: v for k, v in config_dict.items() if k not in extra}, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for key, value in extra.items():
            setattr(config, key, value)
        return result

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with the whole `AUTO_MAP`, and the plug-ins that the parts come from."""
        from .parts import plugins_of

        self.plugins = plugins_of(self) or None
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        self.auto_map = dict(AUTO_MAP)
