"""hf_mim beside the numbers of the authors' own programs (tests/fixtures/reference: random weights, official outputs).

A case is `NAME.safetensors` with `input.*` and `expected.*`; `NAME.weights.safetensors` is the official state dict,
which is converted as a user converts an official file.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hf_mim import MIMForPreTraining
from hf_mim.conversion import convert
from hf_mim.modeling.encoder_base import unpatchify


REFERENCE = Path(__file__).parent / "fixtures" / "reference"
EXACT = {"rtol": 1e-5, "atol": 1e-5}
BATCH_NORM = {"rtol": 1e-5, "atol": 2e-5}  # in training, statistics are sums over many places


def read(path: Path) -> dict[str, torch.Tensor]:
    """Its tensors, those in half precision as float32: they are exact."""
    tensors = load_file(path).items()
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in tensors}


def case(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """-> inputs and expected outputs by name."""
    tensors = read(REFERENCE / f"{name}.safetensors")
    parts = (
        {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        for part in ("input", "expected")
    )
    return tuple(parts)


def official_file(name: str, folder: Path) -> Path:
    """The case's weights as the official program saves them."""
    with safe_open(REFERENCE / f"{name}.weights.safetensors", "pt") as file:
        container = file.metadata()["container"]
    path = folder / f"{name}.pth"
    torch.save({container: read(REFERENCE / f"{name}.weights.safetensors")}, path)
    return path


def converted(name: str, folder: Path, model_class=MIMForPreTraining, **hints):
    convert(str(official_file(name, folder)), folder / "ours", **hints)
    return model_class.from_pretrained(folder / "ours").eval()


@pytest.mark.parametrize("name", ["spark_resnet", "spark_convnext"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@torch.no_grad()
def test_spark_with_its_decoder(name, mode, tmp_path):
    inputs, expected = case(name)
    model = converted(name, tmp_path, image_size=64).train(mode == "train")
    tolerance = BATCH_NORM if mode == "train" else EXACT
    entering = []
    for part in model.decoder.inputs:
        part.register_forward_hook(lambda module, arguments, out: entering.append(out))
    out = model(inputs["pixels"], ~inputs["active"].flatten(1))
    image = unpatchify(out.logits, (2, 2), 64, 64)
    for i, step in enumerate((1, 1, 2, 4)):
        mine = entering[i][..., ::step, ::step]
        torch.testing.assert_close(mine, expected[f"decoder_input_{mode}_{i}"], **tolerance)
    torch.testing.assert_close(image[..., ::4, ::4], expected[f"reconstruction_{mode}_every_fourth"], **tolerance)
    torch.testing.assert_close(out.loss, expected[f"loss_{mode}"], rtol=1e-5, atol=0)
    if mode == "train" and name == "spark_resnet":
        mean = model.decoder.inputs[0].norm.running_mean
        torch.testing.assert_close(mean, expected["running_mean_after_train.densify_0"], **BATCH_NORM)
