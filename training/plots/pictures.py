"""Images, and what a model makes of them: reconstructions, masks, and where poolers look."""

import colorsys

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor

from hf_mim.training.data.masks import IGNORE
from hf_mim.training.plots.grid import FONT, draw_grid, to_tile


COLUMNS = {
    "original": "original",
    "masked": "what the model sees",
    "prediction": "prediction",
    "combined": "prediction with the visible patches",
}
EXAMPLES = 10
OPACITY = 0.6  # of what is laid over an image
NAMED = 24  # classes that the legend has room for
ATTENTION_NOTE = (
    "Bright: patches that count most for the pooler's vector (its weights, the mean over heads or queries), from zero "
    "to the picture's largest; the number is that largest weight as a multiple of an even share."
)


def examples(dataset, count: int = EXAMPLES) -> list[int]:
    """Positions of `count` images to show, the classes in turn where there are labels."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return list(range(min(count, len(dataset))))
    labels = labels.numpy()
    # How many of its class come before it: the first of every class, then the second of every class, and so on.
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return np.lexsort((labels, rank))[:count].tolist()


def to_pixels(images: Tensor) -> list[np.ndarray]:
    """(batch, 1 or 3, height, width) in [0, 1] -> (height, width, 3), uint8, each."""
    levels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy())


def to_tiles(images: Tensor) -> list[PIL.Image.Image]:
    """(batch, 1 or 3, height, width) in [0, 1]"""
    return [to_tile(pixels) for pixels in to_pixels(images)]


# ---- reconstructions -----------------------------------------------------------------------------------------------
def draw_reconstructions(reconstruction, blocks: int = 2) -> PIL.Image.Image:
    """`COLUMNS` side by side, with the extra pictures in their middle; where nothing is hidden, without what the model
    sees and what it leaves visible, which are the original and the prediction.

    Args:
        reconstruction: of `MIMForPreTraining.reconstruct`.
    """
    count = 2 if reconstruction.bool_masked_pos.any() else 1
    columns = {COLUMNS[name]: reconstruction[name] for name in ("original", "masked")[:count]}
    columns |= reconstruction.extra or {}
    columns |= {COLUMNS[name]: reconstruction[name] for name in ("prediction", "combined")[:count]}
    tiles = {caption: to_tiles(images) for caption, images in columns.items()}
    return draw_grid(tiles, blocks, note=reconstruction.note or "")


# ---- masks ---------------------------------------------------------------------------------------------------------
def colours(classes: int) -> np.ndarray:
    """(classes, 3), uint8: the first, most often a background, is black; the others differ in hue and lightness."""
    golden = 0.61803398875  # hues that follow each other by this share of the circle stay apart for any number
    hues = [colorsys.hsv_to_rgb(i * golden % 1, (1.0, 0.65)[i % 2], (1.0, 0.85)[i // 2 % 2]) for i in range(classes)]
    hues[0] = (0.0, 0.0, 0.0)
    return np.rint(255 * np.array(hues)).astype(np.uint8)


def overlay(image: np.ndarray, ids: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 with the classes of `ids` (height, width) laid over it; pixels of no class stay bare."""
    known = (ids != IGNORE)[..., None]
    mixed = (1 - OPACITY) * image + OPACITY * palette[np.where(known[..., 0], ids, 0)]
    return np.where(known, np.rint(mixed), image).astype(np.uint8)


def draw_masks(
    images: list[np.ndarray],
    masks: list[np.ndarray],
    predictions: dict[str, list[np.ndarray]],
    classes: list[str],
    blocks: int = 2,
) -> PIL.Image.Image:
    """One row per image: the image, its mask, and every prediction, each laid over the image.

    Args:
        images: (channels, height, width), uint8, of any sizes; of other than 3 channels the first is shown.
        masks: (height, width), class ids; 255 is none.
        predictions: {caption: maps like `masks`}.
        classes: names by id, for the legend; only classes that occur are named.
    """
    palette, maps = colours(len(classes)), {"true": masks, **predictions}
    shown = [(image if len(image) == 3 else image[[0, 0, 0]]).transpose(1, 2, 0) for image in images]
    tiles = {"image": [to_tile(image) for image in shown]}
    for caption, column in maps.items():
        tiles[caption] = [to_tile(overlay(image, ids, palette)) for image, ids in zip(shown, column, strict=True)]
    present = sorted({int(i) for column in maps.values() for ids in column for i in np.unique(ids)} - {IGNORE})
    return draw_grid(tiles, blocks, [(classes[i], tuple(palette[i].tolist())) for i in present[:NAMED]])


# ---- attention -----------------------------------------------------------------------------------------------------
def draw_attention(images: Tensor, weights: dict[str, Tensor]) -> PIL.Image.Image:
    """One row per image: the image, and the weights of each pooler laid over it in grey.

    Args:
        images: (count, 1 or 3, height, width) in [0, 1].
        weights: {caption: (count, rows, cols)}, which sum to one for every image.
    """
    columns, grey = {"image": to_tiles(images)}, to_pixels(images.mean(dim=1, keepdim=True))
    for caption, maps in weights.items():
        columns[caption] = [heat_tile(image, heat.numpy()) for image, heat in zip(grey, maps, strict=True)]
    return draw_grid(columns, blocks=1, note=ATTENTION_NOTE)


def heat_tile(image: np.ndarray, heat: np.ndarray) -> PIL.Image.Image:
    """(height, width, 3) uint8 with `heat` (rows, cols) laid over it, and its largest value, times its size."""
    from matplotlib import colormaps

    levels = colormaps["magma"](heat / max(heat.max(), 1e-12), bytes=True)[..., :3]
    colour = PIL.Image.fromarray(levels).resize((image.shape[1], image.shape[0]), PIL.Image.Resampling.NEAREST)
    tile = to_tile(np.rint((1 - OPACITY) * image + OPACITY * np.asarray(colour)).astype(np.uint8))
    font, draw = PIL.ImageFont.load_default(FONT), PIL.ImageDraw.Draw(tile)
    draw.text((4, 2), f"x {heat.max() * heat.size:.1f}", "white", font, stroke_width=1, stroke_fill="black")
    return tile
