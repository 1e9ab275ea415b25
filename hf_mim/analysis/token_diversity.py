"""How different the tokens of one image are from each other, block by block (Img2Vec, 2304.12535, whose formula is not
known here: see `token_diversity` in training/evaluation/feature_statistics.py)."""

import torch

from hf_mim.analysis.measurement import Averages, Layer, Measurement, Setting
from hf_mim.analysis.numbers import SHARE, percent, readable
from hf_mim.modeling.encoder_base import Grid
from hf_mim.training.evaluation.feature_statistics import diversity_of


CURVES = {
    "raw": ("1 - mean cosine of two tokens", "token diversity", ""),
    "centred": ("the same, less the image's mean token", "token diversity, centred", ""),
    "residual": ("norm of what differs from the mean token, over the norm of all", "rank residual", SHARE),
}


def subsample(layer: Layer, grid: Grid) -> Layer:
    """The tokens nearest to the cell centres of a coarser grid; the layer itself where it has that grid. Taken, not
    averaged: averaging would make tokens alike. None is taken twice where the grid is not coarser."""
    grid = min(grid[0], layer.grid[0]), min(grid[1], layer.grid[1])
    if grid == layer.grid:
        return layer
    rows, cols = (
        torch.tensor([(2 * i + 1) * fine // (2 * coarse) for i in range(coarse)], device=layer.tokens.device)
        for coarse, fine in zip(grid, layer.grid)
    )
    return Layer(layer.tokens[:, (rows[:, None] * layer.grid[1] + cols).flatten()], grid)


class TokenDiversity(Measurement):
    """raw, in [0, N / (N - 1)]: 1 - the mean cosine of two of the N patch tokens; 0 where all point one way. centred:
    the same of tokens less their image's mean. residual, in [0, 1]: the norm of the tokens less their mean over the
    norm of the tokens; 0 where a block leaves one vector everywhere. Means over images.

    Encoders are compared at equal N: where one has a finer grid, the tokens nearest to the cell centres of the
    smallest grid are taken.
    """

    title = "Token diversity"
    normal = (
        "Diversity usually falls with depth; masked image modeling keeps more of it in late blocks than training with "
        "labels. A sign of trouble is a rank residual near 0 in the last block: all tokens of an image are the same "
        "vector, and dense tasks have nothing to work with. Features without negative values have a low raw diversity "
        "by themselves; compare the centred one."
    )

    def __init__(self, model, setting: Setting):
        super().__init__(model, setting)
        self.averages, self.count = Averages(), 0
        rows, cols = setting.grid
        self.grid = setting.common_grid or setting.grid
        if rows * cols < 4:
            self.absent = f"This encoder ends in {rows}x{cols} tokens, which is too few to compare them."

    def layer(self, index: int, layer: Layer) -> None:
        layer = subsample(layer, self.grid)
        self.averages.add("raw", index, diversity_of(layer.tokens, layer.norms))
        self.averages.add("centred", index, diversity_of(layer.centred, layer.centred_norms))
        total = layer.norms.norm(dim=1).clamp(min=1e-12)
        self.averages.add("residual", index, layer.centred_norms.norm(dim=1) / total)

    def update(self, seen) -> None:
        self.count += len(seen.pixel_values)

    def result(self) -> dict:
        (rows, cols), whole = self.grid, self.setting.grid
        compared = f"at {rows}x{cols} tokens" + (f", taken from {whole[0]}x{whole[1]}" * (whole != (rows, cols)))
        last = max(self.averages.sums["raw"])
        raw, residual = (self.averages.mean(name, last) for name in ("raw", "residual"))
        before = self.averages.mean("raw", 0)
        return {
            "title": self.title,
            "summary": f"Compared {compared}: 1 - the mean cosine of two tokens is {readable(before)} before the first "
            f"block and {readable(raw)} after the last, where {percent(residual)} of the norm of the tokens differs "
            "from their mean.",
            "normal": self.normal,
            "images": self.count,
            "curves": {name: self.averages.curve(name, *words) for name, words in CURVES.items()},
        }
