"""A checkpoint's encoder and pooler as ONNX, by the exporter of transformers."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import pair
from hf_mim.training.common.choices import ONNX_RUN, check_packages


LARGEST_DIFFERENCE = 1e-4
OUTPUTS = ("last_hidden_state", "pooler_output")


def to_onnx(model: MIMModel, out: Path) -> list[str]:
    """Writes `model.onnx` and `model.onnx.data`, for any number of images and, where the network allows it, of any
    size, and compares them with the model in onnxruntime. `export.json` is for `transformers.exporters.ExportedModel`.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed, or the outputs of the two differ.
    """
    check_packages("ONNX", ONNX_RUN, "onnx")
    # The plain attention is written out in operators that every runtime has.
    model.set_attn_implementation("eager")
    size = pair(model.config.image_size)
    rows, cols = model.encoder.token_grid(*size)
    step = size[0] // rows, size[1] // cols
    images = [torch.randn(count, model.config.num_channels, *size) for count in (2, 3)]
    other = torch.randn(1, model.config.num_channels, size[0] + step[0], size[1] + 2 * step[1])
    if model.encoder.traces_any_size:
        dynamic, note = dynamic_sizes(step), "any number of images of any size that the model takes"
        images.append(other)
    else:
        dynamic = {0: torch.export.Dim("batch")}
        note = f"any number of images of {size[0]}x{size[1]} pixels: positions in tables are for one size in ONNX"
    exported = trace(model, images[0], dynamic)
    exported.config = None  # a config.json of ours would ask for hf_mim where the graph is loaded
    exported.save_pretrained(out)
    difference = compare(model, out / "model.onnx", images)
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"the exported model differs by {difference:.1e} in onnxruntime")
    return [
        f"model.onnx, its weights in model.onnx.data, input pixel_values, outputs {' and '.join(OUTPUTS)}",
        note,
        f"outputs in onnxruntime differ by {difference:.0e} at most",
    ]


def dynamic_sizes(step: tuple[int, int]) -> dict:
    return {0: torch.export.Dim("batch"), 2: step[0] * torch.export.Dim("rows"), 3: step[1] * torch.export.Dim("cols")}


def trace(model: MIMModel, images: Tensor, dynamic: dict):
    """-> the `ExportedModel` of transformers. Silent: what the exporters say is about themselves."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers.exporters")]
    levels = [logger.level for logger in loggers]
    config = OnnxConfig(dynamic=True, dynamic_shapes={"pixel_values": dynamic})
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return OnnxExporter().export(model, {"pixel_values": images}, config)
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def compare(model: MIMModel, path: Path, batches: list[Tensor]) -> float:
    """The largest difference of any output on these images, relative to its largest value where that is above 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for images in batches:
        with torch.no_grad():
            wanted = model(images)
        for name, theirs in zip(OUTPUTS, session.run(list(OUTPUTS), {"pixel_values": images.numpy()})):
            ours, theirs = wanted[name], torch.from_numpy(theirs)
            if ours.shape != theirs.shape:
                return float("inf")
            largest = max(largest, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)))
    return largest
