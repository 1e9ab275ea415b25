"""A checkpoint's encoder and pooler as ONNX."""

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_mim.modeling.configuration_mim import pair
from hf_mim.modeling.modeling_mim import MIMModel


PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_DIFFERENCE = 1e-4
FILE = "model.onnx"


class Outputs(nn.Module):
    """The tokens and the pooled vector, as a tuple."""

    def __init__(self, model: MIMModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(pixel_values)
        return out.last_hidden_state, out.pooler_output


def to_onnx(model: MIMModel, out: Path) -> list[str]:
    """Writes `model.onnx`, for any number of images and, where the network allows it, of any size, and compares it
    with the model in onnxruntime.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed, or the outputs of the two differ.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(f"ONNX needs {', '.join(absent)}: pip install 'hf-mim[onnx]'")
    out.mkdir(parents=True, exist_ok=True)
    # The plain attention is written out in operators that every runtime has.
    model.set_attn_implementation("eager")
    size = pair(model.config.image_size)
    step = tuple(length // cells for length, cells in zip(size, model.encoder.token_grid(*size)))
    images = [torch.randn(count, model.config.num_channels, *size) for count in (2, 3)]
    other = torch.randn(1, model.config.num_channels, size[0] + step[0], size[1] + 2 * step[1])
    if size_can_vary(model):
        dynamic, note = dynamic_sizes(step), "any number of images of any size that the model takes"
        images.append(other)
    else:
        dynamic = {0: torch.export.Dim("batch")}
        note = f"any number of images of {size[0]}x{size[1]} pixels: positions in tables are for one size in ONNX"
    write(model, images[0], out / FILE, dynamic)
    difference = compare(model, out / FILE, images)
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"the exported model differs by {difference:.1e} in onnxruntime")
    return [
        f"{FILE}, input pixel_values, outputs last_hidden_state and pooler_output",
        note,
        f"outputs in onnxruntime differ by {difference:.0e} at most",
    ]


def size_can_vary(model: MIMModel) -> bool:
    """Whether the exported network can take images of other sizes. The exporter follows one way through the code: a
    table that is resized only where the size differs is either never resized or always."""
    if model.config.encoder == "vit":
        return not model.encoder.positions & {"learned", "relative", "shared_relative"}
    return model.config.encoder == "convnet"


def dynamic_sizes(step: tuple[int, int]) -> dict:
    return {0: torch.export.Dim("batch"), 2: step[0] * torch.export.Dim("rows"), 3: step[1] * torch.export.Dim("cols")}


def write(model: MIMModel, images: Tensor, path: Path, dynamic: dict) -> None:
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            torch.onnx.export(
                Outputs(model),
                (images,),
                path,
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["pixel_values"],
                output_names=["last_hidden_state", "pooler_output"],
                dynamic_shapes={"pixel_values": dynamic},
            )
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def compare(model: MIMModel, path: Path, batches: list[Tensor]) -> float:
    """The largest difference of any output on these images, relative to its largest value where that is above 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for images in batches:
        with torch.no_grad():
            wanted = Outputs(model)(images)
        for ours, theirs in zip(wanted, session.run(None, {"pixel_values": images.numpy()})):
            theirs = torch.from_numpy(theirs)
            if ours.shape != theirs.shape:
                return float("inf")
            largest = max(largest, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)))
    return largest
