"""Models from files: configs with bounds, and all weights, each in its shape, or an error. transformers draws at random
what a file lacks, and says so in its log alone."""

import copy
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers import initialization as init
from transformers.utils import cached_file

from .declared import FILE, check_declared
from .foreign import OWN_CODE, check_config, trusts_remote_code
from .options import shorten


WHOLE, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def config_fields(source: str) -> dict[str, Any]:
    """The fields of a model's config.json, bounded, and without what a config must not ask for; {} without one.

    Args:
        source: a local folder, or an id on the Hub.

    Raises:
        ValueError, OSError: it is damaged or hostile, or the Hub cannot be reached.
    """
    tensors = None
    if os.path.isdir(source):
        path = os.path.join(source, "config.json")
        if os.path.isfile(path) and os.path.getsize(path) > FILE:
            raise ValueError(f"{path} holds {os.path.getsize(path):,} bytes, too many for a config")
        tensors = count_tensors(source)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except RecursionError:
        raise ValueError("config.json is nested too deeply") from None
    except (TypeError, AttributeError):  # transformers looks for keys at once
        fields = None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type", ""), str):
        raise ValueError("config.json holds no config")
    check_declared(fields, tensors)
    check_config(fields)
    if "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING and not trusts_remote_code():
        raise ValueError(f"it brings {OWN_CODE}")
    return fields


def count_tensors(folder: str) -> int | None:
    """How many tensors the safetensors of a folder hold; None where there are none.

    Raises:
        ValueError: as of `weight_files` and `check_whole`.
    """
    return sum(map(check_whole, weight_files(folder))) or None


def load_whole(
    model_class: Any, source: str, config: Any, new: tuple[str, ...] = (), reshaped: tuple[str, ...] = (), **options
) -> tuple[Any, dict]:
    """`from_pretrained` of a model's class, or of an Auto class, that leaves no weight to chance.

    Args:
        source: a local folder, or an id on the Hub.
        new: parts of names of weights that may be absent; they are initialised.
        reshaped: of weights that may have another shape in the file; so are they.
        options: of `from_pretrained`.

    Returns:
        the model, and what transformers reports: "missing_keys", "unexpected_keys", "mismatched_keys".

    Raises:
        ValueError: as of `check_files`, or a weight is missing or of another shape, which is named.
    """
    check_files(model_class, source, config, (*new, *reshaped), **options)
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = model_class.from_pretrained(
        source, config=config, trust_remote_code=trusts_remote_code(), **options
    )
    for name, in_file, in_model in sorted(report["mismatched_keys"]):
        if not is_among(name, reshaped):
            shapes = f"{tuple(in_file)} in the file and {tuple(in_model)} by the config"
            raise ValueError(f"weights and config do not fit: {name} is {shapes}")
    missing = sorted(name for name in report["missing_keys"] if not is_among(name, new))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"there are no weights {missing[0]}{more}, which the config asks for")
    return model, report


def check_files(model_class: Any, source: str, config: Any, new: tuple[str, ...] = (), **options) -> None:
    """Looks at the files of a model before memory is taken. Arguments as of `load_whole`.

    Raises:
        ValueError: a file is damaged, or the config asks for more weights than the files have bytes.
    """
    paths = weight_files(source)
    for path in paths:
        check_whole(path)
    if not paths and options.get("use_safetensors"):
        pickle = "; its pytorch_model.bin is a pickle, which is not read" if file_of(source, PICKLE) else ""
        raise ValueError(f"there are no weights, no {WHOLE}{pickle}")
    if not paths:
        return
    build = getattr(model_class, "from_config", model_class)
    options = {name: value for name, value in options.items() if name != "use_safetensors"}
    if build is not model_class:  # an Auto class
        options["trust_remote_code"] = trusts_remote_code()
    with torch.device("meta"), init.meta_device_safe_creation_ops(), init.no_init_weights():
        model = build(copy.deepcopy(config), **options)
    count = sum(weight.numel() for name, weight in model.named_parameters() if not is_among(name, new))
    if count > (size := sum(os.path.getsize(path) for path in paths)):
        raise ValueError(f"the config asks for {count:,} weights, and the files hold {size:,} bytes")


def is_among(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def weight_files(source: str) -> list[str]:
    """Paths of the safetensors that transformers reads of a model; [] where there are none.

    Raises:
        ValueError: the table of contents of several is damaged, or names a file elsewhere.
    """
    if (whole := file_of(source, WHOLE)) is not None:
        return [whole]
    if (index := file_of(source, INDEX)) is None:
        return []
    paths = []
    for name in shard_names(index):
        if os.path.basename(name) != name or (path := file_of(source, name)) is None:
            raise ValueError(f"{index} names {shorten(name)}, which is no file beside it")
        paths.append(path)
    return paths


def file_of(source: str, name: str) -> str | None:
    """The path of a model's file; None where there is none."""
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def shard_names(index: str) -> list[str]:
    """Raises:
    ValueError: it is no table of contents of transformers.
    """
    try:
        with open(index, encoding="utf-8") as file:
            return sorted({str(name) for name in json.load(file)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: it has no weight_map of names") from error


def check_whole(path: str) -> int:
    """How many tensors a file holds.

    Raises:
        ValueError: it is no safetensors file, or is cut short; its header says how long it is.
    """
    try:
        with safe_open(path, "pt") as file:
            return len(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {str(error).partition(chr(10))[0][:200]}") from error
