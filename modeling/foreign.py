"""What a config that others wrote must not bring about. A checkpoint is data: it opens no file, fetches no weights and
no kernels, and runs no code. Needs neither torch nor transformers."""

import os
from collections.abc import Mapping
from typing import Any

from .options import OptionError


TRUST = "HF_MIM_TRUST_REMOTE_CODE"
OWN_CODE = (
    f"Python code of its own, which is not run. If you have read it and trust it, set {TRUST}=1 in the environment"
)
# Options of timm.create_model that make it read files or fetch them, pickles among them.
LOADING = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
# Keys under which transformers' configs keep options for timm.
TIMM_OPTIONS = ("model_args", "backbone_kwargs")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
KERNELS = ("use_kernels", "kernel_config")


def trusts_remote_code() -> bool:
    """Whether the user has said that code which travels with a model may run: HF_MIM_TRUST_REMOTE_CODE=1. Libraries are
    told so or otherwise: they never ask."""
    return os.environ.get(TRUST, "0") not in ("", "0")


def refuse_loading(options: Mapping[str, Any], architecture: str = "") -> None:
    """Checks what is about to reach `timm.create_model`.

    Raises:
        OptionError: options, which come from a config, would make timm open a file, or the name would.
    """
    loading = sorted(LOADING & set(options))
    if loading:
        message = f"options of timm that load files are refused in a config: {', '.join(loading)}"
        raise OptionError(message, loading[0], options[loading[0]])
    if ":" in architecture or "/" in architecture:
        message = f"the timm model {architecture!r} is refused in a config: it names a place to load from"
        raise OptionError(message, "architecture", architecture)


def check_config(fields: Mapping[Any, Any], place: str = "") -> None:
    """Checks the fields of a config, those of nested configs too, before a library sees them.

    Raises:
        OptionError: it names a kernel or an attention implementation of the Hub, or a file for timm to load.
    """
    for key, value in fields.items():
        name = str(key).removeprefix("_").removesuffix("_internal")
        path = f"{place}.{key}" if place else str(key)
        values = value.values() if isinstance(value, dict) else [value]
        if name in IMPLEMENTATIONS and any(isinstance(v, str) and ("/" in v or ":" in v) for v in values):
            raise OptionError(f"{path} names code on the Hub ({value!r}), which a config must not", key, value)
        if name in KERNELS and value:
            raise OptionError(f"{path} asks for kernels of the Hub, which a config must not", key, value)
        if key in TIMM_OPTIONS and isinstance(value, dict):
            refuse_loading(value)
        if isinstance(value, dict):
            check_config(value, path)
