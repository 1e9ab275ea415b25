"""UperNet of transformers over `MIMBackbone`, in a form that loads through remote code as well."""

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead, UperNetPreTrainedModel

from .configuration_mim import MIMConfig
from .layers import has_checkpointed_layers
from .modeling_mim import MIMBackbone


# `model_type` stays "upernet": where hf_mim is imported, transformers' own classes load the same files.
AUTO_MAP = {
    "AutoConfig": "modeling_upernet.MIMUperNetConfig",
    "AutoModelForSemanticSegmentation": "modeling_upernet.MIMUperNet",
}


@strict
class MIMUperNetConfig(UperNetConfig):
    """`UperNetConfig` whose `backbone_config` is a `MIMConfig`, without a look into the registry: remote code has not
    registered it."""

    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = MIMConfig.from_dict(self.backbone_config)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with the whole `AUTO_MAP`."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        self.auto_map = dict(AUTO_MAP)


class MIMUperNet(UperNetForSemanticSegmentation):
    """Semantic segmentation (UperNet, 1807.10221): `forward(pixel_values, labels)` as of transformers' class.

    pixel_values (batch, channels, height, width), normalised; labels (batch, height, width) of class ids, 255 where
    there is none -> logits (batch, num_labels, height, width).
    """

    config_class = MIMUperNetConfig
    _auto_class: Any = "AutoModelForSemanticSegmentation"
    _no_split_modules = ["ViTLayer"]
    # The loss is a mean over the batch's labelled pixels: Trainer must not divide it by a count of labels.
    accepts_loss_kwargs = False

    def __init__(self, config: MIMUperNetConfig):
        UperNetPreTrainedModel.__init__(self, config)  # the parent's asks the registry for the backbone
        self.backbone = MIMBackbone(cast(MIMConfig, config.backbone_config))
        self.decode_head = UperNetHead(config, in_channels=self.backbone.channels)
        channels = self.backbone.channels
        self.auxiliary_head = UperNetFCNHead(config, channels) if config.use_auxiliary_head else None
        self.supports_gradient_checkpointing = has_checkpointed_layers(self)
        self.post_init()

    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs):
        output = super().forward(pixel_values, labels=labels, **kwargs)
        if labels is not None and not isinstance(output, tuple):
            # The mean over no pixel is NaN; a batch without a label is to teach nothing.
            nothing = (labels == self.config.loss_ignore_index).all()
            output.loss = torch.where(nothing, 0 * output.logits.sum(), output.loss)
        return output
