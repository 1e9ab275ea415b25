"""Files of runs and models at URLs, fetched into the user's cache."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants

from hf_mim.training.common.errors import CheckpointError, RecipeError, UserError
from hf_mim.training.data import urls


MODEL_FILES = (".json", ".safetensors")  # neither code nor pickles


def cached(kind: str, url: str) -> Path:
    """The folder in the user's cache that belongs to a URL."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2]).strip("-.")[-60:]
    return Path(constants.HF_HOME) / "hf_mim" / kind / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def fetch_files(url: str, names: list[str], folder: Path) -> None:
    """Raises:
    ValueError: a name leads out of the folder.
    Unreachable: one cannot be read or written.
    """
    fs, path = urls.filesystem(url)
    root = folder.resolve()
    for name in names:
        target = (root / name).resolve()
        if not urls.is_inside(name) or not target.is_relative_to(root):
            raise UserError(f"{url} holds a file whose name leads elsewhere: {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        try:
            fs.get_file(f"{path}/{name}", str(partial))
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise urls.failed(urls.join(url, name), error) from None
        partial.replace(target)


def fetch_model(url: str) -> Path:
    """A folder in the cache with the configuration and the safetensors files of a model, as they are there now.

    Raises:
        ValueError: there is no model, its weights are no safetensors, or the URL holds a secret.
        Unreachable: it cannot be read.
    """
    urls.check_url("the model's URL", url)
    url = url.rstrip("/")
    listed = [name for name in urls.list_below(url) if "/" not in name]
    names = [name for name in listed if name.endswith(MODEL_FILES)]
    if "config.json" not in names:
        raise CheckpointError(f"no checkpoint at {url}: there is {'no config.json' if listed else 'nothing'}", url)
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"no checkpoint at {url}: it has no weights as safetensors, and others are not fetched", url
        )
    fs, path = urls.filesystem(url)
    state = repr([sorted(fs.info(f"{path}/{name}").items()) for name in names])
    folder = cached("models", url) / hashlib.sha256(state.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            staging = folder.with_suffix(".partial")
            shutil.rmtree(staging, ignore_errors=True)
            fetch_files(url, names, staging)
            check_index(staging, names)
            staging.rename(folder)
    return folder


def check_index(folder: Path, names: list[str]) -> None:
    """Raises:
    ValueError: weights in several files name one that was not fetched, or lies elsewhere on this machine.
    """
    for index in folder.glob("*.index.json"):
        parts = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        for name in sorted(parts - set(names)):
            raise CheckpointError(f"{index.name} names weights that are not there: {name!r}")


def fetch_recipe(url: str) -> Path:
    """The recipe of a run, or a YAML file, as a file in the cache.

    Raises:
        ValueError: there is none, or the URL holds a secret.
        Unreachable: it cannot be read.
    """
    urls.check_url("the recipe's URL", url)
    place = url if url.endswith((".yaml", ".yml")) else urls.join(url, "recipe.yaml")
    try:
        content = urls.read_url(place)
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {place}") from None
    file = cached("recipes", place) / place.rpartition("/")[2]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{os.getpid()}.partial")  # every process fetches it
    partial.write_bytes(content)
    partial.replace(file)
    return file
