"""hf_mim: masked image modeling for the Hugging Face ecosystem. Importing it registers its models with the Auto
classes of transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig

from hf_mim.modeling.configuration_mim import MIMConfig


if TYPE_CHECKING:
    from hf_mim.modeling.modeling_mim import MIMBackbone, MIMForImageClassification, MIMForPreTraining, MIMModel

__version__ = "0.1.0"
__all__ = ["MIMBackbone", "MIMConfig", "MIMForImageClassification", "MIMForPreTraining", "MIMModel"]

AutoConfig.register("mim", MIMConfig, exist_ok=True)


def __getattr__(name: str):
    # The model classes need most of transformers: they are imported, and registered, with the first config or name.
    if name in __all__:
        return getattr(import_module("hf_mim.modeling.modeling_mim"), name)
    raise AttributeError(f"module 'hf_mim' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
