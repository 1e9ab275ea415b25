"""A checkpoint for those who do not have hf_mim: its encoder as a model of transformers or timm, or as ONNX; FCMAE with
its decoder as the official program saves it."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMForPreTraining, MIMModel
from hf_mim.modeling.options import unknown_choice
from hf_mim.training.checkpoint import load_checkpoint, load_config, resolve
from hf_mim.training.common.errors import UserError
from hf_mim.training.common.output_folder import check_new_folder
from hf_mim.training.conversion.fcmae import to_official
from hf_mim.training.data.processors import processor_for

from .export_timm import to_timm
from .export_transformers import to_transformers
from .onnx import to_onnx


FORMATS = {"transformers": to_transformers, "timm": to_timm, "onnx": to_onnx}
OFFICIAL = "official"  # of whole models: what the authors' program goes on with


def export(checkpoint: str, out: str | Path, to: str | None = None, force: bool = False) -> list[str]:
    """Writes the encoder of a checkpoint into the folder `out`.

    Args:
        checkpoint: a folder, or an id on the Hub.
        to: `transformers`, `timm` or `onnx`; `official` for a whole FCMAE; None for the library that the encoder came
            from.
        force: write into a folder that is not empty.

    Returns:
        the report, line by line.

    Raises:
        ValueError: there is no checkpoint or no such format, or the format has no counterpart of what the encoder
            does, or a package is not installed; the message says which.
        FolderError: `out` is not empty.
    """
    if to not in (None, *FORMATS, OFFICIAL):
        raise unknown_choice("format", str(to), [*FORMATS, OFFICIAL])
    check_new_folder(Path(out), force)
    config = load_config(checkpoint)
    to = to or (config.origin or {}).get("library")
    if to is None:
        raise UserError(f"{checkpoint} came from no other library: say --to {', '.join(FORMATS)} or {OFFICIAL}")
    if to == OFFICIAL:
        return export_whole(checkpoint, config, Path(out))
    model = load_checkpoint(MIMModel, checkpoint, config, new=("pooler.", "pooled_norm.")).float().eval()
    out, formats = Path(out), model.encoder.export_formats
    if to not in formats:
        raise ValueError(f"this encoder has no counterpart in {to}: export it --to {' or '.join(formats)}")
    lines = FORMATS[to](model, out)
    processor_of(checkpoint, config).save_pretrained(out)
    return [f"{out}: {lines[0]}", *lines[1:]]


def export_whole(checkpoint: str, config: MIMConfig, out: Path) -> list[str]:
    """As `export`, to `OFFICIAL`."""
    model = load_checkpoint(MIMForPreTraining, checkpoint, config)
    lines = to_official(model.float(), out)
    processor_of(checkpoint, config).save_pretrained(out)
    return [f"{out}: {lines[0]}", *lines[1:]]


def processor_of(checkpoint: str, config: MIMConfig) -> Any:
    """The image processor of a checkpoint: its own, which knows the images that it was trained on, if there is one."""
    try:
        return AutoImageProcessor.from_pretrained(resolve(checkpoint))
    except (OSError, ValueError):
        return processor_for(config)
