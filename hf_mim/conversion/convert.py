"""A checkpoint of another project, or a model of transformers or timm, as one of ours."""

import json
from pathlib import Path

import torch
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.declared import check_declared
from hf_mim.modeling.modeling_mim import MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.options import Size
from hf_mim.training.checkpoint import checkpoint_errors, read_config, resolve
from hf_mim.training.common.output_folder import check_new_folder
from hf_mim.training.conversion.libraries import convert_file, convert_folder
from hf_mim.training.conversion.official import Converted, Hints
from hf_mim.training.conversion.reading import SUFFIXES
from hf_mim.training.data.processors import processor_for


def convert(
    source: str,
    out: str | Path,
    heads: int | None = None,
    image_size: Size | None = None,
    timm_name: str | None = None,
    decoder_heads: int | None = None,
    encoder: str | Path | None = None,
    force: bool = False,
) -> list[str]:
    """Converts a file, a folder or a model on the Hub into a checkpoint in `out`.

    Args:
        heads: attention heads, where the weights do not say and they are not 64 channels wide.
        image_size: pixels, where the weights do not say.
        timm_name: timm model name, for ConvNets other than ResNet and ConvNeXt.
        decoder_heads: attention heads of MAE's decoder, where they are not 32 channels wide.
        encoder: the file of the encoder, where `source` holds a pooling head alone (Beyond [cls]).
        force: write into a folder that is not empty.

    Returns:
        the report, line by line.

    Raises:
        ValueError: the source is of no known kind, holds other types than tensors, or parts of its encoder are unknown.
        FolderError: `out` is not empty.
        OSError: there is no such source, or `out` cannot be written.
    """
    check_new_folder(Path(out), force)
    with checkpoint_errors(source):
        converted = read_source(source, Hints(heads, image_size, timm_name, decoder_heads=decoder_heads), encoder)
        check_declared(converted.fields, len(converted.state))
        model = build(converted)
    model.save_pretrained(out)
    processor_for(model.config).save_pretrained(out)
    lines = report(converted, source, model)
    (Path(out) / "conversion.json").write_text(json.dumps(summary(converted), indent=2) + "\n")
    return lines


def read_source(source: str, hints: Hints, encoder: str | Path | None) -> Converted:
    """Arguments and errors as of `convert`."""
    path = Path(source)
    if not path.is_file():
        if path.suffix in SUFFIXES and not path.is_dir():
            raise FileNotFoundError(f"there is no file {source}")
        return convert_folder(resolve(source), read_config(source), hints)
    return convert_file(path, hints, None if encoder is None else Path(encoder))


def own_names(converted: Converted) -> dict[str, Tensor]:
    """The weights as the model that is saved names them."""
    if model_class(converted) is MIMModel:
        return converted.state
    heads = ("decoder.", "classifier.")
    return {name if name.startswith(heads) else f"mim.{name}": value for name, value in converted.state.items()}


def model_class(converted: Converted):
    if converted.classifier:
        return MIMForImageClassification
    return MIMForPreTraining if converted.pretraining else MIMModel


def build(converted: Converted) -> MIMModel | MIMForPreTraining | MIMForImageClassification:
    """The model with the weights in it; it must take all of them, and lack none but those of a new pooler.

    Raises:
        ValueError: it does not, which is found before memory is taken.
    """
    config, state = MIMConfig(**converted.fields), own_names(converted)
    new = () if converted.classifier else ("pooler.", "mim.pooler.")
    with torch.device("meta"):
        model = model_class(converted)(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if not name.startswith(new)}
    wrong = sorted(name for name in shapes.keys() ^ state.keys() if not name.startswith(new))
    wrong += [name for name in shapes.keys() & state.keys() if shapes[name] != tuple(state[name].shape)]
    if wrong:
        raise ValueError(f"the weights do not fill the model: {', '.join(wrong[:4])}")
    model = model_class(converted)(config)
    model.load_state_dict(state, strict=False)
    return model.eval()


def summary(converted: Converted) -> dict:
    """What became of every key, for `conversion.json`."""
    return {
        "kind": converted.kind,
        "used": sorted(converted.weights.used),
        "left": converted.weights.left,
        "notes": converted.notes,
    }


def report(converted: Converted, source: str, model) -> list[str]:
    config = model.config
    options = {name: value for name, value in config.encoder_config.items() if not isinstance(value, dict)}
    lines = [f"{source}: {converted.kind}", f"  used: {len(converted.weights.used)} weights"]
    lines.append(f"  encoder {config.encoder}: " + ", ".join(f"{name} {value}" for name, value in options.items()))
    reasons: dict[str, list[str]] = {}
    for name, reason in converted.weights.left.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 6} more, see conversion.json" if len(names) > 6 else ""
        lines.append(f"  not used ({reason}): {', '.join(names[:6])}{more}")
    lines += [f"  note: {note}" for note in converted.notes]
    return [*lines, f"  saved as {type(model).__name__}"]
