"""Histograms of oriented gradients as targets (MaskFeat, 2112.09133)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid, choose, divide, image_size
from .options import pair
from .target_base import DISTANCES, VISIBLE_NOTE, Target


ANGLES_FROM = ("vertical", "horizontal")


def oriented_gradients(
    pixel_values: Tensor, cell: Grid, orientations: int = 9, window: bool = False, angle_from: str = "vertical"
) -> Tensor:
    """(batch, channels, height, width) -> (batch, channels, orientations, height / cell, width / cell), float32.

    Sobel gradients with mirrored borders; unsigned directions in equal bins, their angles measured from the vertical
    axis as in the released code or from the horizontal one; with `window`, magnitudes weighted by a Gaussian of 2 x 2
    cells tiled over the image; summed over cells; scaled to Euclidean norm 1 over the orientations of a cell (a cell
    without gradient stays 0).
    """
    pixels = pixel_values.float()
    padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    # Differences before smoothing: at the mirrored borders they are then exactly 0, and no rounding picks the bin.
    across, down = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    magnitude = torch.hypot(across, down)
    angle = torch.atan2(across, down) if angle_from == "vertical" else torch.atan2(down, across)
    bins = angle.mul(orientations / math.pi).floor().long() % orientations
    if window:
        magnitude = magnitude * tiled_gaussian(cell, image_size(pixels), pixels.device)
    histogram = magnitude.new_zeros(*magnitude.shape[:2], orientations, *magnitude.shape[2:])
    histogram.scatter_(2, bins[:, :, None], magnitude[:, :, None])
    cells = F.avg_pool2d(histogram.flatten(0, 2)[:, None], cell).view(*histogram.shape[:3], -1)
    cells = F.normalize(cells, dim=2)
    return cells.unflatten(3, (pixels.shape[2] // cell[0], pixels.shape[3] // cell[1]))


def tiled_gaussian(cell: Grid, size: Grid, device=None) -> Tensor:
    """A Gaussian over 2 x 2 cells (standard deviation: one cell; sum 1), tiled over `size` pixels: (height, width)."""
    waves = []
    for step, length in zip(cell, size):
        offset = torch.arange(2 * step, device=device) - (2 * step - 1) / 2
        wave = torch.exp(-0.5 * (offset / step) ** 2)
        waves.append((wave / wave.sum()).repeat(-(-length // (2 * step)))[:length])
    return waves[0][:, None] * waves[1]


GLYPH = 8  # pixels, the least side of a cell in a picture: below, no direction can be seen


class HOGTarget(Target):
    """HOG of each hidden patch (MaskFeat, 2112.09133, section 3.2): channels x orientations x cells.

    Options:
        cell_size: pixels, an int or a pair; must divide the patch. None: 8 where that divides it, else half a
            patch, or a whole one of odd length.
        orientations: bins of unsigned direction.
        window: whether magnitudes are weighted by a tiled Gaussian. The released configurations for images have none.
        angle_from: vertical, as released (the bins are those of the transposed image), or horizontal.
        loss: mse, l1 or smooth_l1 (beta 2).
    """

    needs_image_only = True
    image_note = f"{VISIBLE_NOTE} Each cell shows the directions of its edges; the brighter a line, the more of them."

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        cell_size: int | tuple[int, int] | None = None,
        orientations: int = 9,
        window: bool = False,
        angle_from: str = "vertical",
        loss: str = "mse",
    ):
        super().__init__()
        size = pair(config.image_size)
        patch = divide(size, encoder.target_grid(*size))
        height, width = (8 if length % 8 == 0 else length // (1 if length % 2 else 2) for length in patch)
        self.cell = (height, width) if cell_size is None else pair(cell_size)
        if any(length % step for length, step in zip(patch, self.cell)):
            raise ValueError(f"cell_size {self.cell[0]}x{self.cell[1]} does not divide the patch {patch[0]}x{patch[1]}")
        self.orientations, self.window = orientations, window
        self.angle_from = choose("angle_from", angle_from, ANGLES_FROM)
        self.distance = DISTANCES[choose("loss of target 'hog'", loss, DISTANCES)]
        self.cells = divide(patch, self.cell)
        self.outputs = {"patches": config.num_channels * orientations * math.prod(self.cells)}

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        histogram = oriented_gradients(pixel_values, self.cell, self.orientations, self.window, self.angle_from)
        batch, channels = histogram.shape[:2]
        patches = histogram.view(
            batch, channels, self.orientations, grid[0], self.cells[0], grid[1], self.cells[1]
        ).permute(0, 3, 5, 1, 2, 4, 6)
        return {"patches": patches.reshape(batch, grid[0] * grid[1], -1)}

    def to_image(self, values, pixel_values, grid, bool_masked_pos=None) -> Tensor:
        """Glyphs: in each cell a line along every edge's direction, as bright as its share; mean over channels.
        The picture is enlarged by a whole factor where that is needed for cells of `GLYPH` pixels."""
        batch, (rows, cols) = values.shape[0], self.cells
        cells = values.float().clamp(0, 1).view(batch, *grid, -1, self.orientations, rows, cols).mean(3)
        cells = cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, self.orientations, grid[0] * rows, grid[1] * cols)
        scale = max(1, -(-GLYPH // min(self.cell)))
        # Drawn twice as large and averaged back: smooth lines.
        fine = (2 * scale * self.cell[0], 2 * scale * self.cell[1])
        glyphs = F.avg_pool2d(edge_glyphs(fine, self.orientations, self.angle_from, values.device)[:, None], 2)[:, 0]
        height, width = (scale * length for length in pixel_values.shape[2:])
        return torch.einsum("bohw,oyx->bhywx", cells, glyphs).reshape(batch, 1, height, width).clamp(0, 1)


def edge_glyphs(size: Grid, orientations: int, angle_from: str = "vertical", device=None) -> Tensor:
    """(orientations, height, width) in [0, 1]: a line through the centre across each bin's mean gradient direction."""
    y, x = (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2 for n in size)
    angles = (torch.arange(orientations, device=device) + 0.5) * math.pi / orientations
    across, down = angles.cos()[:, None, None], angles.sin()[:, None, None]
    if angle_from == "vertical":
        across, down = down, across
    distance = (x[None, None] * across + y[None, :, None] * down).abs()
    inside = (x[None, None] ** 2 + y[None, :, None] ** 2) <= (min(size) / 2) ** 2
    return (1.25 - distance).clamp(0, 1) * inside
