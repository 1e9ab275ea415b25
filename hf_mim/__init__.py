"""hf_mim: masked image modeling for the Hugging Face ecosystem. Importing it registers its models with the Auto
classes of transformers, and loads neither torch nor transformers until something of them is needed."""

from importlib import import_module
from typing import TYPE_CHECKING

from hf_mim.registration import register_once_loaded


if TYPE_CHECKING:
    from hf_mim.modeling.configuration_mim import MIMConfig
    from hf_mim.modeling.modeling_mim import MIMBackbone, MIMForImageClassification, MIMForPreTraining, MIMModel

__version__ = "0.2.0"
__all__ = ["MIMBackbone", "MIMConfig", "MIMForImageClassification", "MIMForPreTraining", "MIMModel"]

register_once_loaded()


def __getattr__(name: str):
    # The model classes need most of transformers: they are imported, and registered, with the first config or name.
    if name in __all__:
        module = "configuration_mim" if name == "MIMConfig" else "modeling_mim"
        return getattr(import_module(f"hf_mim.modeling.{module}"), name)
    raise AttributeError(f"module 'hf_mim' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
