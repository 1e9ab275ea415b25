"""Loading checkpoints, with errors that say what is there instead."""

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.encoder_base import MASK_PARAMETERS
from hf_mim.modeling.loading import config_fields, load_whole
from hf_mim.modeling.modeling_mim import MIMForPreTraining, MIMModel
from hf_mim.modeling.options import shorten, shorten_text
from hf_mim.training.common.checkpoint_path import check_path
from hf_mim.training.common.errors import CheckpointError, RecipeError, UserError
from hf_mim.training.common.foreign_errors import field_reason
from hf_mim.training.common.hub_reach import is_out_of_reach
from hf_mim.training.common.sharing import masked
from hf_mim.training.conversion.reading import SUFFIXES
from hf_mim.training.conversion.starting import (
    DESCRIBES,
    METHOD,
    StartingEncoder,
    adapt_channels,
    check_forward,
    describe_hiding,
    fill,
    fill_head,
    start_fields,
)
from hf_mim.training.data.fetching import fetch_model
from hf_mim.training.data.urls import LOCAL, is_url


ModelT = TypeVar("ModelT", bound=PreTrainedModel)
TIMM_PREFIXES = ("timm:", "hf-hub:", "hf_hub:", "local-dir:")  # which timm has before its names
SHARDS = "pytorch_model_fsdp_0"  # what accelerate calls the folder of a checkpoint's shards


@contextmanager
def config_errors() -> Iterator[None]:
    """Around what makes a `MIMConfig` of a recipe: a field of a wrong type becomes a `RecipeError` of one line.

    Raises:
        RecipeError: in place of the error of huggingface_hub, which is no ValueError.
    """
    try:
        yield
    except StrictDataclassError as error:
        raise RecipeError(field_reason(error), "model") from None


@contextmanager
def checkpoint_errors(source: str) -> Iterator[None]:
    """Around what makes a model of a checkpoint as it is.

    Raises:
        CheckpointError: in place of whatever goes wrong inside with a config or weights that are damaged; its cause
            stays, as a command asks it about the Hub, the disk and memory.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except StrictDataclassError as error:
        raise CheckpointError(f"{source} is damaged: its config.json: {field_reason(error)}", source) from error
    except ImportError as error:
        reason = f"it needs a package that cannot be imported: {first_line(error)}"
        raise CheckpointError(f"cannot load {source}: {reason}", source) from error
    except (ValueError, OSError) as error:  # a line already
        raise CheckpointError(f"cannot load {source}: {first_line(error)}", source) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{source} is damaged, its config or its weights: {reason}", source) from error


def first_line(error: Exception) -> str:
    return shorten_text((str(error).strip().splitlines() or [type(error).__name__])[0])


def check_timm_name(source: str) -> None:
    """Raises:
    CheckpointError: it is written as timm names models, whose weights have other names on the Hub.
    """
    prefix = next((prefix for prefix in TIMM_PREFIXES if source.startswith(prefix)), "")
    name = source.removeprefix(prefix)
    if "/" not in name and (known := timm_config(name)) is not None:
        hint = f"its weights are {known.hf_hub_id} on the Hub" if known.hf_hub_id else "it has no weights"
        raise CheckpointError(f"no checkpoint at {source}: this is a name of timm: {hint}", source)
    if prefix:
        raise CheckpointError(f"no checkpoint at {source}: leave out {prefix!r} and write {name}", source)


def timm_config(name: str) -> Any:
    """What timm knows of the weights of a model; None where there is none of this name."""
    try:
        import timm  # slow to import, and not everybody has it
    except ImportError:
        return None
    return timm.get_pretrained_cfg(name) if timm.is_model(name) else None


def check_source(source: str) -> None:
    """Raises:
    CheckpointError: as of `check_path`, or it is written as timm names its models. Or its weights are in shards, whose
        table of contents is a pickle: only the user may say that it is to be trusted.
    """
    if not Path(source).exists():
        check_timm_name(source)
        if Path(source).suffix in SUFFIXES and source.count("/") != 1:  # with one it may be an id
            raise CheckpointError(f"no checkpoint at {source}: there is no such file", source)
    check_path(source)
    shards = Path(source) / SHARDS
    if shards.is_dir() and not any(Path(source).glob("model*.safetensors")):
        raise CheckpointError(
            f"the weights in {source} are sharded over several processes; if you trust these files (they hold a "
            f"pickle), merge them by: accelerate merge-weights {shlex.quote(str(shards))} {shlex.quote(source)}",
            source,
        )


def resolve(source: str | Path) -> str:
    """What transformers can load: a local folder or an id on the Hub; of a URL, the model in the cache.

    Raises:
        CheckpointError: as of `check_source`, or there is no model at the URL.
        Unreachable: the URL cannot be read.
    """
    location = str(source)
    if is_url(location):
        protocol, _, path = location.partition("://")
        if protocol not in LOCAL and Path(path.partition("?")[0]).suffix in SUFFIXES:
            raise CheckpointError(
                f"{masked(location)} is a single file, and folders alone are fetched: download it, and name the file "
                "on this machine",
                masked(location),
            )
        location = path if protocol in LOCAL else str(fetch_model(location))
    location = os.path.expanduser(location)
    check_source(location)
    return location


def read_config(source: str) -> dict[str, Any]:
    """The fields of a model's config.json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    location = resolve(source)
    if not Path(location).is_dir() and is_out_of_reach(location):
        reason = f"there is nothing of this name here, and the Hub at {constants.ENDPOINT} cannot be reached"
        raise CheckpointError(f"no checkpoint at {source}: {reason}", source)
    try:
        fields = config_fields(location)
    except OSError as error:  # stays as the cause: the command explains what the Hub said from there
        raise CheckpointError(f"no checkpoint at {source}: {first_line(error)}", source) from error
    except ValueError as error:
        raise CheckpointError(f"cannot load {source}: {first_line(error)}", source) from error
    if not fields:
        raise CheckpointError(f"no checkpoint at {source}: there is no config.json", source)
    return fields


def load_config(checkpoint: str, changes: Mapping[str, Any] | None = None) -> MIMConfig:
    """The config of a MIM checkpoint, with changes.

    Args:
        checkpoint: a folder, a URL, or an id on the Hub.
        changes: fields of `MIMConfig`; a part's options are merged, unless the part itself changes.

    Raises:
        CheckpointError: there is no checkpoint, or it is of another model type.
        ValueError: the changes do not fit it.
    """
    fields, changes = read_config(checkpoint), changes or {}
    if fields.get("model_type") != MIMConfig.model_type:
        kind = shorten(fields.get("model_type", "no model that transformers knows"))
        message = f"{checkpoint} holds {kind}, and only a checkpoint of model type 'mim' can be used here"
        raise CheckpointError(message, checkpoint)
    with checkpoint_errors(checkpoint):
        config = MIMConfig.from_dict(fields)
    if not changes:
        return config
    for key, value in changes.items():
        part = key.removesuffix("_config")
        keeps = isinstance(value, dict) and changes.get(part, fields.get(part)) == fields.get(part)
        fields[key] = {**fields[key], **value} if keeps and fields.get(key) else value
        if f"{key}_config" in fields and f"{key}_config" not in changes and part == key:
            fields[f"{key}_config"] = {}
    for follows in ("stage_names", "out_features", "out_indices"):
        fields.pop(follows, None)
    return MIMConfig.from_dict(fields)


def load_model(checkpoint: str, changes: Mapping[str, Any] | None = None) -> MIMForPreTraining:
    """A pretraining model with the weights of a checkpoint.

    Raises:
        CheckpointError: as of `load_config`, or weights are missing or do not fit the changed config.
    """
    return load_checkpoint(MIMForPreTraining, checkpoint, load_config(checkpoint, changes))


def model_type_of(source: str) -> str:
    """`mim`, or the model type of a model of transformers.

    Raises:
        CheckpointError: there is no model, or it is one of timm.
    """
    kind = read_config(source).get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"no checkpoint at {source}: there is no config.json that names a model type", source)
    if kind == "timm_wrapper":
        message = f"{source} is a timm model: convert it first with hf-mim convert {source} FOLDER"
        raise CheckpointError(message, source)
    return kind


def load_encoder(source: str) -> MIMModel:
    """The frozen encoder of a checkpoint of this project or of a vision model of transformers, in eval mode and without
    a pooler. It sees whole images, also where the model's own class would hide patches (ViTMAE).

    Args:
        source: a folder, a URL, or an id on the Hub.

    Raises:
        CheckpointError: there is no model, it is no image encoder, or it is damaged.
    """
    kind, location = model_type_of(source), resolve(source)
    if kind == MIMConfig.model_type:
        model = load_checkpoint(MIMModel, source, add_pooling_layer=False)
    else:
        with checkpoint_errors(source):
            model = MIMModel.from_encoder(location, add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def load_checkpoint(model_class: type[ModelT], source: str, config: MIMConfig | None = None, **options) -> ModelT:
    """A model of this project with the weights of a checkpoint.

    Args:
        config: None is the checkpoint's own.
        options: of `load_whole`, and of the class.

    Raises:
        CheckpointError: as of `load_config`, or weights are missing or of another shape.
    """
    config = config or load_config(source)
    with checkpoint_errors(source):
        return load_whole(model_class, resolve(source), config, use_safetensors=True, **options)[0]


# ---- encoders to start from ----------------------------------------------------------------------------------------
CONVERT_FIRST = "options with -- are those of hf-mim convert: convert the file with them, and start from that folder"


@contextmanager
def convert_options() -> Iterator[None]:
    """Around the conversion of a file that nobody gave options for.

    Raises:
        ValueError: as inside; it says of which command an option is.
    """
    try:
        yield
    except ValueError as error:
        if " --" not in str(error):
            raise
        raise ValueError(f"convert it first, by hf-mim convert: {error}") from error


def starting_encoder(source: str) -> StartingEncoder:
    """The encoder of a checkpoint of this project, of a vision model of transformers or timm, or of an official file.
    It becomes one of our own encoders where its weights fit exactly, else `native`, the class of transformers.

    Args:
        source: a folder, a URL, an id on the Hub, or a local file of weights.

    Raises:
        CheckpointError: there is no model, or it is no image encoder.
    """
    from hf_mim.training.conversion import libraries  # transformers' and timm's models, slow to import

    path = Path(source).expanduser()
    if path.is_file():
        with checkpoint_errors(source), convert_options():
            start = libraries.start_from(source, libraries.convert_file(path, libraries.Hints()))
        start.notes += [CONVERT_FIRST] if any(" --" in note for note in start.notes) else []
        return start
    fields, location = read_config(source), resolve(source)
    if fields.get("model_type") == MIMConfig.model_type:
        return own_start(source, location)
    with checkpoint_errors(source):
        return libraries.start_from(source, libraries.convert_folder(location, fields, libraries.Hints()))


def own_start(source: str, location: str) -> StartingEncoder:
    """Of a checkpoint of this project, of whatever head."""
    config = load_config(source)
    whole = "MIMForPreTraining" in (config.architectures or ())
    kind: Any = MIMForPreTraining
    options: dict[str, Any] = {"use_safetensors": True}
    if not whole:
        kind, options = (
            MIMModel,
            {**options, "add_pooling_layer": False, "use_mask_token": True, "new": MASK_PARAMETERS},
        )
    with checkpoint_errors(source):
        model, info = load_whole(kind, location, config, **options)
    state = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
    fields = {name: getattr(config, name) for name in DESCRIBES}
    start = StartingEncoder(source, fields, state, f"a checkpoint of this project, encoder {config.encoder!r}")
    if whole:
        start.state = {name.removeprefix("mim."): value for name, value in state.items() if name.startswith("mim.")}
        start.head = {name: value for name, value in state.items() if not name.startswith("mim.")}
        start.method = {name: getattr(config, name) for name in METHOD}
    return start


def start_model(section: dict[str, Any]) -> tuple[MIMForPreTraining, list[str]]:
    """A recipe's method with the encoder of `init_from`. -> the model, and what to tell about it.

    Args:
        section: `model` of a recipe.

    Raises:
        CheckpointError: there is no encoder to start from, or the weights do not fit.
        ValueError: the recipe's mask, decoder, target, image size or channels do not go with the encoder.
    """
    section = dict(section)
    source, how = section.pop("init_from"), section.pop("init_channels", None)
    start = starting_encoder(source)
    fields, notes = start_fields(start, section)
    state = adapt_channels(start, fields["num_channels"], how)
    model = MIMForPreTraining(MIMConfig(**fields))
    with checkpoint_errors(source):
        fill(model.mim, state, start.state.keys() - state.keys())
    decoder = "its decoder too" if fill_head(model, start) else "with a new decoder"
    check_forward(model, start)
    first = f"start: {source}, {start.description}, {decoder}; {describe_hiding(model)}"
    return model.train(), [first, *start.notes, *notes]


def untrained_twin(model: MIMModel, seed: int = 0) -> MIMModel:
    """An encoder of the same config with weights drawn from `seed`; the random state outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MIMModel(model.config, add_pooling_layer=False).eval().requires_grad_(False)
