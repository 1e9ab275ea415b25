"""The encoders that a config can name."""

from .encoder_convnet import ConvNetEncoder
from .encoder_hiera import HieraEncoder
from .encoder_native import NativeEncoder
from .encoder_timm import TimmEncoder
from .encoder_vit import ViTEncoder


ENCODERS = {
    "vit": ViTEncoder,
    "convnet": ConvNetEncoder,
    "hiera": HieraEncoder,
    "native": NativeEncoder,
    "timm": TimmEncoder,
}
