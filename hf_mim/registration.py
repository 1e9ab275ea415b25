"""Registers the config with `AutoConfig` without importing it. Every class of transformers, a config too, loads torch,
which takes seconds; so `MIMConfig` is registered in the moment in which transformers loads its table of configs, and
nobody can ask that table before."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder


TABLE = "transformers.models.auto.configuration_auto"


def register() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from hf_mim.modeling.configuration_mim import MIMConfig

    AutoConfig.register("mim", MIMConfig, exist_ok=True)


class TableFinder(MetaPathFinder):
    """Finds nothing itself: has the table registered in as soon as it is loaded, by whoever loads it."""

    def find_spec(self, name, path=None, target=None):
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_register(module):
            load(module)
            register()

        spec.loader.exec_module = load_and_register
        return spec


def register_once_loaded() -> None:
    """At once, where the table is loaded already."""
    if TABLE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, TableFinder())
