"""The command `reconstruct`: a checkpoint fills in the hidden parts of images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair
from hf_mim.modeling.resizing import fit_whole
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_model
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import DataError, FolderError, RecipeError
from hf_mim.training.common.output_folder import check_new_file
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import ImageBatch, MIMCollator
from hf_mim.training.data.decoding import Decoder
from hf_mim.training.data.files import EXTENSIONS
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.report import without_evaluation
from hf_mim.training.data.transforms import sample_rng
from hf_mim.training.own_data import chosen_data, own_data
from hf_mim.training.plots import pictures


def reconstruct_examples(
    checkpoint: str,
    out: Path,
    overrides: Sequence[str] = (),
    console: Console | RunConsole | None = None,
    force: bool = False,
    bands: list[int] | None = None,
) -> None:
    """Writes the picture of some images of the run's own data, of those to test on where there are any.

    Args:
        overrides: `data.dataset=...` and the like, for other data.
        force, bands: as of `reconstruct_file`.

    Raises:
        CheckpointError, DataError: the checkpoint or the data cannot be read.
        FolderError, OSError: `out` cannot be written.
    """
    check_picture(out, force)
    console = RunConsole(console)
    base = {"data": own_data([checkpoint], chosen_data(overrides), console)}
    (data,) = recipes.read_sections(overrides, base, data=DataArguments)
    model = load_model(checkpoint, {} if bands is None else {"display_bands": bands})
    splits = load_splits(data, model.config)
    console.log("\n".join([*without_evaluation(splits.report), splits.sample.line]))
    dataset = splits.test or splits.train
    if not isinstance(dataset, MIMDataset):
        raise RecipeError("pictures of examples need data with a length: set data.streaming=false", "data.streaming")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_examples(model, dataset.without_augmentation()).save(out)


def draw_examples(model: MIMForPreTraining, dataset: MIMDataset) -> Image.Image:
    """The picture of some images of a data set; masks are those of epoch 0."""
    dataset.set_epoch(0)
    collate = MIMCollator(model.config, model.mask_grid(*pair(model.config.image_size)))
    batch = collate(dataset.__getitems__(pictures.examples(dataset)))
    model.eval()
    pixel_values, masks = (batch[name].to(model.device) for name in ("pixel_values", "bool_masked_pos"))
    return pictures.draw_reconstructions(model.reconstruct(pixel_values, masks, with_target=True))


def check_picture(out: Path, force: bool) -> None:
    """Raises:
    FolderError: the ending names no format of pictures, or there is a file that may not be replaced.
    """
    if out.suffix.lower() not in EXTENSIONS:
        raise FolderError(f"{out} must end in one of {', '.join(sorted(EXTENSIONS))}", str(out))
    check_new_file(out, force)


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
    if out.exists() and out.samefile(image):
        raise FolderError(f"{out} is the image itself: choose another --out", str(out))
    check_picture(out, force)
    model = load_model(checkpoint, {} if bands is None else {"display_bands": bands}).eval()
    size = pair(model.config.image_size)
    pixels = torch.from_numpy(Decoder(model.config, DataArguments())(str(image)))[None]
    batch = ImageBatch(fit_whole(pixels, size, model.config.eval_crop), [sample_rng(seed, 0, 0)])
    inputs = MIMCollator(model.config, model.mask_grid(*size))([batch])
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside what should have been predicted, where that needs no teacher, which may be far away or lost.
    shown = model.reconstruct(**inputs, with_target=model.target.needs_image_only)
    pictures.draw_reconstructions(shown).save(out)
