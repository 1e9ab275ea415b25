"""Registers the config, the models and the image processor with the Auto classes without importing them. Every class of
transformers, a config too, loads torch, which takes seconds; so they are registered at the moment at which transformers
loads the table that they belong into, and nobody can ask that table before."""

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


TABLES: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.models.auto.image_processing_auto": register_models,
}


class TableFinder(MetaPathFinder):
    """Finds nothing itself: calls `register` as soon as the module `table` is loaded, by whoever loads it."""

    def __init__(self, table: str, register: Callable[[], None]):
        self.table, self.register = table, register

    def find_spec(self, name, path=None, target=None):
        if name != self.table:
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
    """At once for the tables that are loaded already."""
    for table, register in TABLES.items():
        if table in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, TableFinder(table, register))
