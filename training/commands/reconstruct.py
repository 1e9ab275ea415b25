"""The command `reconstruct`: a checkpoint fills in the hidden parts of one image."""

from pathlib import Path

import torch

from hf_mim.modeling.options import pair
from hf_mim.modeling.resizing import fit_whole
from hf_mim.training.checkpoint import load_model
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import ImageBatch, MIMCollator
from hf_mim.training.data.decoding import Decoder, Undecodable
from hf_mim.training.data.files import EXTENSIONS
from hf_mim.training.data.transforms import sample_rng
from hf_mim.training.errors import DataError, FolderError
from hf_mim.training.output_folder import check_new_file
from hf_mim.training.plots import pictures


def reconstruct_file(
    checkpoint: str, image: Path, out: Path, seed: int = 0, force: bool = False, bands: list[int] | None = None
) -> None:
    """Writes the picture of one image: as it is, what the model sees of it, and what it makes of the rest.

    Args:
        checkpoint: a folder, or an id on the Hub.
        image: any file that training reads; it becomes what the model's evaluation would see of it.
        out: the picture to write; its ending says the format.
        seed: of the mask.
        force: replace a file that is there already; never the image itself.
        bands: the channels to show, one or three; None is the choice of the checkpoint.

    Raises:
        CheckpointError, DataError: the checkpoint or the image cannot be read.
        FolderError, OSError: `out` exists already, is the image, or cannot be written.
    """
    if not image.is_file():
        raise DataError(f"there is no image {image}", str(image))
    if out.suffix.lower() not in EXTENSIONS:
        raise FolderError(f"{out} must end in one of {', '.join(sorted(EXTENSIONS))}", str(out))
    if out.exists() and out.samefile(image):
        raise FolderError(f"{out} is the image itself: choose another --out", str(out))
    check_new_file(out, force)
    model = load_model(checkpoint, {} if bands is None else {"display_bands": bands}).eval()
    size = pair(model.config.image_size)
    try:
        pixels = torch.from_numpy(Decoder(model.config, DataArguments())(str(image)))[None]
    except Undecodable as error:
        raise DataError(f"{image} cannot be read as an image: {error}", str(image)) from None
    batch = ImageBatch(fit_whole(pixels, size, model.config.eval_crop), [sample_rng(seed, 0, 0)])
    inputs = MIMCollator(model.config, model.mask_grid(*size))([batch])
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside what should have been predicted, where that needs no teacher, which may be far away or lost.
    shown = model.reconstruct(**inputs, with_target=model.target.needs_image_only)
    pictures.draw_reconstructions(shown).save(out)
