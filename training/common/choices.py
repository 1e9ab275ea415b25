"""Values of keys that are one of a few words, and packages that an option needs: checked before anything heavy is
imported. The words stand in the source of the module that uses them."""

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

from hf_mim.modeling.options import unknown_choice
from hf_mim.training.common.errors import RecipeError, UserError
from hf_mim.training.common.source import parse_module


TRAINER = "transformers.trainer_utils"
# key -> the module and the tuple, dict or enumeration that names its choices
CHOICES = {
    "data.interpolation": ("hf_mim.training.data.arguments", "INTERPOLATIONS"),
    "model.keep": ("hf_mim.training.trainer.start", "DISTANCES"),
    "model.init_channels": ("hf_mim.training.conversion.starting", "CHANNELS"),
    "training.optimizer": ("hf_mim.training.trainer.optimization", "OPTIMIZERS"),
    "training.lr_scaling": ("hf_mim.training.trainer.optimization", "SCALINGS"),
    "training.optim": ("transformers.training_args", "OptimizerNames"),
    "training.lr_scheduler_type": (TRAINER, "SchedulerType"),
    "training.save_strategy": (TRAINER, "SaveStrategy"),
    "training.eval_strategy": (TRAINER, "IntervalStrategy"),
    "training.logging_strategy": (TRAINER, "IntervalStrategy"),
    "training.hub_strategy": (TRAINER, "HubStrategy"),
    "finetune.task": ("hf_mim.training.trainer.finetune_arguments", "TASKS"),
    "finetune.optimizer": ("hf_mim.training.trainer.finetune_arguments", "OPTIMIZERS"),
    "probe.task": ("hf_mim.training.commands.dense", "TASKS"),
    "probe.optimizer": ("hf_mim.training.evaluation.heads", "OPTIMIZERS"),
    **{
        f"{section}.figures": ("hf_mim.training.plots.charts", "FORMATS")
        for section in ("training", "probe", "analyze")
    },
}
ONNX = ("onnx", "onnxscript")  # what makes a graph, and
ONNX_RUN = (*ONNX, "onnxruntime")  # what runs it too


@cache
def words_of(module: str, name: str) -> tuple[str, ...]:
    """The strings of a tuple, the keys of a dict, or the values of an enumeration, as they stand in the source of a
    module."""
    for node in parse_module(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            values = [line.value for line in node.body if isinstance(line, ast.Assign)]
            return tuple(str(value.value) for value in values if isinstance(value, ast.Constant))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            items = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            return tuple(str(item.value) for item in items if isinstance(item, ast.Constant))
    raise LookupError(f"no {name} in {module}")


def check_choices(recipe: Mapping[str, Mapping]) -> None:
    """Raises:
    RecipeError: a value of {section: {key: value}} is not among its choices.
    """
    for key, place in CHOICES.items():
        section, _, name = key.partition(".")
        value = recipe.get(section, {}).get(name)
        if isinstance(value, str) and value not in (choices := words_of(*place)):
            raise RecipeError(str(unknown_choice(key, value, choices)), key)


def check_packages(purpose: str, packages: tuple[str, ...], extra: str) -> None:
    """Raises:
    UserError: one of the packages that are needed for something is not installed; `extra` of hf_mim brings them.
    """
    if absent := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{purpose} needs {', '.join(absent)}: pip install 'hf-mim[{extra}]'")
