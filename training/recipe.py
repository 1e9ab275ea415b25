"""Recipes: one YAML file per method, plus `section.key=value` overrides, checked before anything runs."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_mim.modeling.options import LEARNING_OPTIONS, shorten, unknown_choice
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.common.plugins import LOADED, PluginError, load_plugins, plugins_of
from hf_mim.training.common.recipe_keys import (
    COMMAND_SECTIONS,
    SECTIONS,
    check_keys,
    fields_of,
    imported_keys_of,
    is_text,
    keys_of,
)
from hf_mim.training.common.recipe_yaml import LENGTH, dump_yaml, parse_text, parse_yaml


PLUGINS = "plugins"  # what a recipe may have beside its sections: a list of modules
RECIPES = Path(__file__).parent / "recipes"
PARTS = ("encoder", "masking", "decoder", "target", "pooler")
# What a recipe's header may say, each as `# Key: text`, continued on indented lines.
HEADER_KEYS = ("Paper", "Command", "Cost", "Result")
VIT_SIZES = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # what `size` stands for
# Sections that not every recipe has: the command of that name is what runs a recipe that has it.
COMMANDS = ("finetune",)
KINDS = {"pretrain": "pretraining", "finetune": "fine-tuning"}  # of recipes, by the command that runs them


# ---- loading, overriding, saving -----------------------------------------------------------------------------------
def recipe_files() -> dict[str, Path]:
    """The recipes that ship with the package: name -> file; `quick`, which is the default, comes first."""
    paths = sorted(RECIPES.glob("*.yaml"), key=lambda path: (path.stem != "quick", path.stem))
    return {path.stem: path for path in paths}


def find(name: str) -> Path:
    """The file of a recipe: a name in `recipes/`, a YAML file, or the folder of a run; of a URL, a copy in the cache.

    Raises:
        RecipeError, OSError: there is no such recipe or file, or it cannot be read.
    """
    if name in recipe_files():
        return recipe_files()[name]
    if "://" in name:
        from hf_mim.training.data.fetching import fetch_recipe

        return fetch_recipe(name)
    path = Path(name).expanduser()
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        raise RecipeError(f"no recipe at {name}")
    raise RecipeError(str(unknown_choice("recipe", name, recipe_files())))


def read(name: str) -> dict:
    """A recipe as {section: {key: value}}, unchecked."""
    path = find(name)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LENGTH + 1)
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    recipe = parse_yaml(text, str(path))
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path}: a recipe must hold sections ({', '.join(SECTIONS)})")
    return {section: {} if values is None else values for section, values in recipe.items()}


def is_override(word: str) -> bool:
    """Whether a word of the command line is `section.key=value`, and not a path that happens to hold a `=`."""
    return "=" in word and not Path(word).expanduser().exists()


def parse_overrides(overrides: Sequence[str]) -> dict[str, dict]:
    """`["model.masking_config.ratio=0.6"]` as `{"model": {"masking_config": {"ratio": 0.6}}}`. The value of a key that
    holds text is taken as it is; others are YAML.

    Raises:
        RecipeError: an override without section, key or `=`, or two that contradict each other.
    """
    tree: dict[str, dict] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            raise RecipeError(f"an override looks like section.key=value, not {shorten(override)}")
        inner: dict = tree
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"{shorten(override)}: {name} already has the value {shorten(inner)}", path.strip())
        kind = type_of(names)
        inner[names[-1]] = parse_text(text, kind) if is_text(kind) else parse_yaml(text, override)
    return tree


def type_of(names: list[str]) -> Any:
    """The type of a key, `["data", "dataset"]`; Any where it is unknown, or an option of a part."""
    known = len(names) == 2 and names[0] in SECTIONS | COMMAND_SECTIONS
    return keys_of(names[0]).get(names[1], Any) if known else Any


def expand_task(overrides: Sequence[str], section: str) -> list[str]:
    """`task=dense`, which is short for `probe.task=dense`, in full."""
    return [f"{section}.{word}" if word.startswith("task=") else word for word in overrides]


def read_sections(overrides: Sequence[str], base: dict | None = None, **classes: type) -> tuple:
    """The overrides of a command that has no recipe, as one dataclass for each section: `data=DataArguments`.

    Args:
        base: {section: {key: value}} that they change.

    Raises:
        RecipeError: an unknown section or key, or a value of another type or out of range.
    """
    tree = merge(base or {}, parse_overrides(overrides))
    check_keys(tree, "", classes, lambda section: fields_of(classes[section]))
    return tuple(kind(**tree.get(name, {})) for name, kind in classes.items())


def check_names(overrides: Sequence[str], command: str, sections: Sequence[str]) -> None:
    """Checks overrides of a command that has no recipe as far as that goes without torch.

    Raises:
        RecipeError: an unknown section or key, or a value of another type.
    """
    check_keys(parse_overrides(expand_task(overrides, command)), "", sections, keys_of)


def merge(base: dict, changes: dict) -> dict:
    """`base` with `changes`, dicts within dicts merged; neither is modified."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def command_of(recipe: dict) -> str:
    """The command that runs a recipe."""
    return next((command for command in COMMANDS if command in recipe), "pretrain")


def check_command(name: str, recipe: dict, command: str) -> None:
    """Raises:
    RecipeError: the recipe is one of another command.
    """
    runner = command_of(recipe)
    if runner != command:
        model = "" if runner == "pretrain" else " MODEL"
        kind = f"{name} is a {KINDS[runner]} recipe: run hf-mim {runner}{model} {name}"
        others = [other for other in recipe_files() if command_of(read(other)) == command]
        raise RecipeError(f"{kind}. Recipes of {command}: {', '.join(others)}")


def read_words(name: str, overrides: Sequence[str], command: str | None = None) -> tuple[dict, dict]:
    """A recipe and its overrides, both as {section: {key: value}}, checked as far as that goes without torch.

    Raises:
        RecipeError: an unknown recipe, section or key, a recipe of another command, or an override that is none.
    """
    recipe, changes = read(name), parse_overrides(overrides)
    if command is not None:
        check_command(name, recipe, command)
        for other in set(COMMANDS) & set(changes) - {command}:
            raise RecipeError(f"hf-mim {command} has no section {other!r}: hf-mim {other} MODEL has", other)
    sections = {section: values for section, values in recipe.items() if section != PLUGINS}
    for tree, file in ((sections, find(name).name), (changes, "")):
        check_keys(tree, file, SECTIONS, keys_of)
    return recipe, changes


def resolve(name: str, overrides: Sequence[str] = (), command: str | None = None) -> dict:
    """A recipe with overrides applied, checked: {"model": {...}, "data": {...}, "training": {...}}, and the section of
    the command that runs it if that is not `pretrain`.

    Where an override names another encoder, mask generator, decoder, target or pooler, the recipe's options of that
    part no longer apply and are dropped; so are mean and std with another number of channels, and what belongs to the
    schedule and the optimizer with another `training.lr_scheduler_type` and `training.optimizer`. With
    `model.init_from` the encoder comes from there, so what describes that of a recipe without `init_from` is dropped
    too; its masks, decoder, target and training stay.

    Args:
        command: the one that is about to run it; None does not ask.

    Raises:
        RecipeError: an unknown recipe, section or key (the nearest valid one is named), a value of another type, or a
            recipe or a section of another command.
    """
    from hf_mim.modeling.configuration_mim import MIMConfig

    recipe, changes = read_words(name, overrides, command)
    plugins = load_named(recipe, name)
    for tree, file in ((recipe, find(name).name), (changes, "")):
        check_keys(tree, file, SECTIONS, imported_keys_of)
    model, new = recipe.setdefault("model", {}), changes.get("model", {})
    if new.get("init_from") and not model.get("init_from"):
        drop_encoder(model)
    for part in PARTS:
        if part in new and new[part] != model.get(part, MIMConfig.__dataclass_fields__[part].default):
            model.pop(f"{part}_config", None)
    if "num_channels" in new:  # mean and std are per channel
        for name in ("image_mean", "image_std"):
            model.pop(name, None)
    training, asked = recipe.setdefault("training", {}), changes.get("training", {})
    for choice, options in (("lr_scheduler_type", "lr_scheduler_kwargs"), ("optimizer", "muon_scale")):
        if choice in asked and asked[choice] != training.get(choice):
            training.pop(options, None)
    merged = merge(recipe, changes)
    resolved = {name: merged.get(name, {}) for name in SECTIONS if name not in COMMANDS or name in merged}
    return ({PLUGINS: plugins} if plugins else {}) | resolved


def load_named(recipe: dict, name: str) -> list[str]:
    """Takes the plug-ins out of a recipe and imports them. -> them, and those that the command line names.

    Raises:
        PluginError: one cannot be imported, or is named at a URL and not by the user.
    """
    names = plugins_of(recipe, find(name).name)
    if "://" in name and (strange := [plugin for plugin in names if plugin not in LOADED]):
        message = f"the recipe at {name} names the plug-in {strange[0]}, whose code would run"
        raise PluginError(f"{message}: add --plugin {strange[0]} if you trust it", strange[0])
    load_plugins(names, find(name).name, find(name).parent)
    return list(dict.fromkeys([*names, *LOADED]))


def drop_encoder(model: dict) -> None:
    """Takes what describes the encoder and its images out of the section `model`, but for the image size. Which kind of
    encoder it was stays, as its other options are for that kind. A recipe for grey images does not ask for one channel:
    they can be repeated."""
    options = model.pop("encoder_config", None) or {}
    model["encoder_config"] = {name: value for name, value in options.items() if name in LEARNING_OPTIONS}
    for key in ("pooler", "pooler_config"):
        model.pop(key, None)
    if model.get("num_channels", 1) == 1:
        model.pop("num_channels", None)
    if model.get("num_channels", 3) <= 3:
        model.pop("image_mean", None)
        model.pop("image_std", None)


def credited_paper(name: str, recipe: dict) -> str:
    """The paper that a recipe's header names, and each part that a run takes from elsewhere: it is another method's.

    Args:
        name: of the recipe, as of `find`.
        recipe: the same, resolved with the overrides of the run.
    """
    from hf_mim.modeling.configuration_mim import MIMConfig

    paper, own, model = read_header(find(name)).get("paper", ""), read(name).get("model", {}), recipe["model"]
    started = ("encoder", "pooler") if model.get("init_from") else ()  # what the start brings is told as the start
    changes = []
    for part in (part for part in PARTS if part not in started):
        default = MIMConfig.__dataclass_fields__[part].default
        before, now = own.get(part, default), model.get(part, default)
        if now != before:
            changes.append(f"{part} {now} in place of {before}")
    return f"{paper}; changed in this run: {', '.join(changes)}" if paper and changes else paper


def without_effect(recipe: dict) -> list[str]:
    """A message about each setting of a resolved recipe that another one makes meaningless."""
    training, data, messages = recipe.get("training", {}), recipe.get("data", {}), []
    saves = str(training.get("save_strategy", "epoch"))
    evaluates = str(training.get("eval_strategy", "no" if "finetune" not in recipe else saves))
    start = recipe.get("model", {}).get("init_from")
    overruled = {
        "training.save_steps": (saves != "steps", f"training.save_strategy is {saves}"),
        "training.eval_steps": (evaluates != "steps", f"training.eval_strategy is {evaluates}"),
        "data.shuffle_buffer": (not data.get("streaming"), "data.streaming is false"),
        "model.keep_weight": (not recipe.get("model", {}).get("keep"), "model.keep is not set"),
        "training.adam_epsilon": (training.get("optimizer") == "muon", "training.optimizer is muon"),
        "training.muon_scale": (training.get("optimizer") != "muon", "training.optimizer is not muon"),
        "data.cache_size": (not data.get("cache_decoded"), "data.cache_decoded is false"),
        "data.forgetting_dataset": (
            not start or training.get("watch_every") == 0,
            "training.watch_every is 0" if start else "model.init_from is not set",
        ),
    }
    for section in ("training", "finetune"):
        without_lora = not recipe.get(section, {}).get("lora")
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_layers"):
            overruled[f"{section}.{name}"] = (without_lora, f"{section}.lora is false")
    for key, (is_overruled, reason) in overruled.items():
        section, _, name = key.partition(".")
        if is_overruled and recipe.get(section, {}).get(name) is not None:
            messages.append(f"{key} has no effect: {reason}")
    encoder = recipe.get("model", {}).get("encoder_config") or {}
    if encoder.get("size") is not None and all(encoder.get(name) is not None for name in VIT_SIZES):
        messages.append(
            f"model.encoder_config.size has no effect: {', '.join(VIT_SIZES)} are set; null takes those of the size"
        )
    return messages


def save(recipe: dict, path: Path, comment: str) -> None:
    """Writes a resolved recipe, with `comment` (one or more lines) as its header."""
    header = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    path.write_text(header + dump_yaml(recipe), encoding="utf-8")


def read_header(path: Path) -> dict[str, str]:
    """The header comment of a recipe: {"title", "paper", "command", "cost", "result"}, as far as it says so."""
    header, current = {"title": ""}, "title"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        key, colon, rest = text.partition(":")
        if colon and key in HEADER_KEYS:
            current, text = key.lower(), rest.strip()
        elif not text:
            current = ""  # a blank line ends an entry; remarks may follow
        if current:
            header[current] = f"{header.get(current, '')} {text}".strip()
    return header


def list_recipes() -> list[dict[str, str]]:
    """What every shipped recipe says of itself: its name, the command that runs it, and `read_header`."""
    files = recipe_files().items()
    return [{"name": name, "runs": command_of(read(name)), **read_header(path)} for name, path in files]
