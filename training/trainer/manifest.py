"""What a checkpoint says of itself: its files with checksums, and what the run was that wrote it."""

import hashlib
import json
import platform
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
from safetensors import SafetensorError, safe_open

from hf_mim.modeling.options import shorten


MANIFEST = "manifest.json"
LEFT_OUT = (MANIFEST, "training_args.bin")
STATE = "trainer_state.json"  # the last file that the Trainer writes into a checkpoint
DAMAGED = "damaged-"  # before the name of a checkpoint that cannot be used
MIXED = "from here on images come in another order: the run will not end as it would have without a break"
DIGESTS = ("sample", "files")  # of the data: they say no more than that they differ
# What of a record differs, and what that means.
MEANINGS = {
    "data": f"the training data have changed ({{change}}); {MIXED}",
    "total_batch": f"the total batch is {{change}}; {MIXED}",
    "processes": "the number of processes is {change}; random numbers and rounding differ: the run will not end with "
    "exactly the same weights",
    "versions": "other versions than before ({change}): results may differ by rounding",
    "start": "the weights of model.init_from have changed ({change}): from here on the run keeps near other ones",
    "recipe": "with other settings than before: {change}",
}


def versions() -> dict[str, str]:
    modules = (torch, transformers, datasets, accelerate)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


# ---- files ---------------------------------------------------------------------------------------------------------
def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the manifest of a complete checkpoint.

    Args:
        record: what the run is: any of the keys of `MEANINGS`.
    """
    files = {path.relative_to(folder).as_posix(): describe(path) for path in sorted(folder.rglob("*"))}
    text = json.dumps({"files": {name: entry for name, entry in files.items() if entry}, **record}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def describe(path: Path) -> dict[str, Any] | None:
    """Size and checksum of a file; None for a folder, and for what a resume does not need."""
    if not path.is_file() or path.name in LEFT_OUT:
        return None
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def update_manifest(folder: Path, name: str) -> None:
    """Enters a file anew that was changed on purpose."""
    manifest = read_manifest(folder)
    if manifest:
        manifest["files"][name] = describe(folder / name)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; {} of a checkpoint of an older version, which has none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files", {}), dict):
        raise ValueError("not a manifest")
    return manifest


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    try:
        files = read_manifest(folder).get("files")
    except (OSError, ValueError):
        return f"{MANIFEST} is damaged"
    if files is None:
        return next((f"{path.name} is damaged" for path in sorted(folder.rglob("*")) if not is_readable(path)), None)
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if describe(path) != entry:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def is_readable(path: Path) -> bool:
    """Whether a file without a checksum has the form that its name says."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as file:
                return file.testzip() is None
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    return True


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the latest step whose files are all as they were written, and a message about each later one.
    Those are renamed: the next checkpoints would be removed as the older ones."""
    messages: list[str] = []
    steps = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(steps, reverse=True):
        path = steps[step]
        if not (path / STATE).is_file() and not (path / MANIFEST).is_file():
            continue  # written by others than MIMTrainer, and not finished
        damage = find_damage(path)
        if damage is None:
            return path, messages
        aside = set_aside_name(path)
        path.rename(aside)
        messages.append(f"{path} cannot be used: {damage}; it is {aside.name} now")
    return None, messages


def set_aside_name(path: Path) -> Path:
    names = (path.with_name(f"{DAMAGED}{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(name for name in names if not name.exists())


# ---- what differs --------------------------------------------------------------------------------------------------
def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"masking_config": {"ratio": 0.6}}} -> {"model.masking_config.ratio": 0.6}."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A message about everything in which two records differ, as far as both know it."""
    messages = []
    for key, message in MEANINGS.items():
        if key in before and key in now and before[key] != now[key]:
            messages.append(message.format(change=describe_change(key, before[key], now[key])))
    return messages


def describe_change(key: str, before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{shorten(now)} instead of {shorten(before)}"
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if key == "recipe":
        return ", ".join(changed)
    changes = [f"{name}: {now.get(name)} instead of {before.get(name)}" for name in changed if name not in DIGESTS]
    return ", ".join(changes) or "as many, but not the same"
