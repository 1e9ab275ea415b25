"""What training looked like: a grid of reconstructions, and the curve of the loss."""

import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor


COLUMNS = {
    "original": "original",
    "masked": "what the model sees",
    "prediction": "prediction",
    "combined": "prediction with the visible patches",
}
EXAMPLES = 10
SIDE = 128  # least height and width of a tile in the grid, pixels; smaller images are enlarged by a whole factor
MOST = 256  # larger ones are shrunk to this
GAP, FONT = 6, 14


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


def to_tiles(images: Tensor) -> list[PIL.Image.Image]:
    """(batch, 1 or 3, height, width) in [0, 1] -> pictures with sides of at least `SIDE`, and not far above `MOST`."""
    height, width = images.shape[-2:]
    factor = -(-SIDE // min(height, width))
    tiles = []
    for image in (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy():
        tile = PIL.Image.fromarray(image.transpose(1, 2, 0).repeat(4 - len(image), 2)[..., :3])
        if factor > 1:
            tile = tile.resize((width * factor, height * factor), PIL.Image.Resampling.NEAREST)
        elif max(height, width) > MOST:
            tile.thumbnail((MOST, MOST), PIL.Image.Resampling.LANCZOS)
        tiles.append(tile)
    return tiles


def _wrap(text: str, font, width: float) -> str:
    letters = max(4, int(width / (font.getlength("abcdefghij klmnopqrst") / 21)))
    return textwrap.fill(text, letters)


def draw_reconstructions(reconstruction, blocks: int = 2) -> PIL.Image.Image:
    """The grid: one row per image, `COLUMNS` side by side with the extra pictures in their middle, in `blocks` blocks
    next to each other.

    Args:
        reconstruction: of `MIMForPreTraining.reconstruct`.
    """
    extra, names = reconstruction.extra or {}, list(COLUMNS)
    shown = [(COLUMNS[name], reconstruction[name]) for name in names[:2]] + list(extra.items())
    shown += [(COLUMNS[name], reconstruction[name]) for name in names[2:]]
    tiles = [to_tiles(images) for _, images in shown]
    count, (width, height) = len(tiles[0]), tiles[0][0].size
    blocks = min(blocks, count)
    rows, font = -(-count // blocks), PIL.ImageFont.load_default(FONT)
    block_width = len(tiles) * (width + GAP) + 3 * GAP
    captions = [_wrap(caption, font, width) for caption, _ in shown]
    top = (FONT + 5) * max(caption.count("\n") + 1 for caption in captions) + 2 * GAP
    total = blocks * block_width - GAP
    note = _wrap(reconstruction.note or "", font, total - 6 * GAP)
    bottom = top + rows * (height + GAP)
    below = (FONT + 5) * (note.count("\n") + 1) + GAP
    canvas = PIL.Image.new("RGB", (total, bottom + below + GAP), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for block in range(blocks):
        for column, caption in enumerate(captions):
            x = block * block_width + 2 * GAP + column * (width + GAP)
            anchor = (x + width / 2, top - GAP)
            draw.multiline_text(anchor, caption, "black", font, anchor="md", align="center")
            for row, tile in enumerate(tiles[column][block * rows : (block + 1) * rows]):
                canvas.paste(tile, (x, top + row * (height + GAP)))
    draw.multiline_text((2 * GAP, bottom + GAP), note, "black", font)
    return canvas


def draw_loss(history: list[dict], path: Path) -> None:
    """Writes the curve of the loss: as logged, and its running mean over a twentieth of the run.

    Args:
        history: the Trainer's `state.log_history`; entries without "loss" are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = [(entry["step"], entry["loss"], entry.get("learning_rate")) for entry in history if "loss" in entry]
    steps, losses, rates = (np.array(column, dtype=float) for column in zip(*logged, strict=True))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")  # no pyplot: it would ask for a display
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="loss, as logged")
    axes.plot(steps, running_mean(losses, len(losses) // 20), color="tab:blue", linewidth=2, label="loss, running mean")
    axes.set(xlabel="optimizer step", ylabel="loss on the training images")
    # The first steps are far above the rest and would flatten the part that matters.
    settled = losses[len(losses) // 20 :]
    span = np.ptp(settled) or abs(settled[0]) or 1
    axes.set_ylim(settled.min() - 0.05 * span, min(losses.max(), settled.max() + 0.5 * span) + 0.05 * span)
    axes.grid(alpha=0.3)
    other = axes.twinx()
    other.plot(steps, rates, color="tab:gray", linestyle=":", label="learning rate")
    other.set(ylabel="learning rate", ylim=(0, None))
    lines = axes.get_lines() + other.get_lines()
    axes.legend(lines, [line.get_label() for line in lines], loc="upper right")
    figure.savefig(path)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of up to `window` values around each, fewer at both ends; same length as `values`."""
    half, total = window // 2, np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))  # symmetric, so that the ends have no lag
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
