"""Registers the config, the models and the image processor with the Auto classes without importing them, since every
class of transformers, a config too, loads torch, which takes seconds. The config is registered at the moment at which
transformers loads its table of configs, which nobody can ask before; the rest with the first config that is made."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from hf_mim.modeling.configuration_mim import MIMConfig

    AutoConfig.register("mim", MIMConfig, exist_ok=True)


def register_models() -> None:
    import hf_mim.modeling.modeling_mim  # noqa: F401 (its last lines register)


def register_processors() -> None:
    from transformers import AutoImageProcessor, ViTImageProcessor

    from hf_mim.modeling.configuration_base import MIMConfigBase
    from hf_mim.modeling.configuration_mim import MIMConfig
    from hf_mim.modeling.image_processing_mim import MIMImageProcessor

    # The class of a saved processor is found by its name, under whatever config it is registered: under one of its own,
    # since of those of one config the first is taken. The stock one is for checkpoints without a processor.
    for config, processor in ((MIMConfig, ViTImageProcessor), (MIMConfigBase, MIMImageProcessor)):
        AutoImageProcessor.register(config, image_processor_classes={"torchvision": processor}, exist_ok=True)


def load_plugins() -> None:
    from hf_mim.training.common.plugins import load_installed

    load_installed()


# What registers when a module is loaded. The first config loads the parts, to check its own.
TRIGGERS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.image_processing_auto": register_processors,
    "hf_mim.modeling.parts": register_models,
    "hf_mim.modeling.modeling_mim": load_plugins,  # when all that they may import is there
}


class TriggerFinder(MetaPathFinder):
    """Finds nothing itself: calls `register` as soon as the module `trigger` is loaded, by whoever loads it."""

    def __init__(self, trigger: str, register: Callable[[], None]):
        self.trigger, self.register = trigger, register

    def find_spec(self, name, path=None, target=None):
        if name != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_register(module):
            load(module)
            self.register()

        spec.loader.exec_module = load_and_register
        return spec


def register_once_loaded() -> None:
    """At once for what is loaded already."""
    for trigger, register in TRIGGERS.items():
        if trigger in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, TriggerFinder(trigger, register))
