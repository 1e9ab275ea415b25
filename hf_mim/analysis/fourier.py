"""Which spatial frequencies the tokens hold, block by block (A2MIM, 2205.13943, section 3; after 2202.06709)."""

import math

import torch
from torch import Tensor

from hf_mim.analysis.measurement import Averages, Layer, Measurement, Setting
from hf_mim.analysis.numbers import readable
from hf_mim.modeling.encoder_base import Grid


EPS = 1e-6


def diagonal_frequencies(grid: Grid) -> list[tuple[int, int]]:
    """The bins (row, column) of a 2-D FFT from the centre to the corner of its spectrum, the highest frequency."""
    shorter = min(grid)
    steps = range(shorter // 2 + 1)
    return [(round(k * grid[0] / shorter), round(k * grid[1] / shorter)) for k in steps]


def diagonal_waves(grid: Grid, device=None) -> Tensor:
    """(2 * frequencies, rows * cols) float32: cosines and sines that take a map's Fourier coefficients on the half
    diagonal. A handful of the coefficients is all that is asked for: this is far cheaper than an FFT."""
    rows, cols = (torch.arange(side, dtype=torch.float64) / side for side in grid)
    frequencies = diagonal_frequencies(grid)
    phases = torch.stack([(2 * math.pi * (u * rows[:, None] + v * cols)).flatten() for u, v in frequencies])
    return torch.cat([phases.cos(), phases.sin()]).float().to(device)


def relative_log_amplitude(tokens: Tensor, waves: Tensor) -> Tensor:
    """(batch, rows * cols, dim) -> (batch, frequencies): ln(|F| + 1e-6) less that of frequency zero, means over dim."""
    real, imaginary = (waves.to(tokens.dtype) @ tokens).chunk(2, dim=1)
    logs = (torch.hypot(real, imaginary) + EPS).log().mean(dim=2)
    return logs - logs[:, :1]


class Fourier(Measurement):
    """The logarithm of the tokens' Fourier amplitude on the half diagonal of the spectrum, from frequency zero to the
    highest, less its value at zero: mean over images and channels of ln(|F| + 1e-6). Curves: the value at the highest
    frequency per block, and all frequencies after the last block. The highest is 1.0 pi on a grid with even sides (the
    released code labels so the bin before), (n - 1) / n pi on one of n odd. Also the spatial variance of the tokens,
    mean over channels.

    [cls] and registers are left out.
    """

    title = "Fourier spectrum and spatial variance"
    normal = (
        "Self-attention is a low-pass filter: the amplitude at the highest frequency falls with depth, by some nats; "
        "convolutions raise it. Masked image modeling keeps more of it in late blocks than training with labels. A "
        "sign of trouble is an amplitude far below the untrained encoder's while the variance goes to zero (the tokens "
        "become one), or a spectrum as flat as noise."
    )

    def __init__(self, model, setting: Setting):
        super().__init__(model, setting)
        self.averages, self.count = Averages(), 0
        self.waves: dict[Grid, Tensor] = {}
        self.final = torch.zeros(0, 0)  # (batch, frequencies) after the last block
        if min(setting.grid) < 2:
            self.absent = f"This encoder ends in {setting.grid[0]}x{setting.grid[1]} tokens, which have no frequencies."

    def layer(self, index: int, layer: Layer) -> None:
        if min(layer.grid) < 2:
            return
        if layer.grid not in self.waves:
            self.waves[layer.grid] = diagonal_waves(layer.grid, layer.tokens.device)
        relative = relative_log_amplitude(layer.tokens, self.waves[layer.grid])
        self.averages.add("highest", index, relative[:, -1])
        variance = layer.centred_norms.square().mean(dim=1) / layer.tokens.shape[2]
        self.averages.add("variance", index, variance)
        self.final = relative

    def update(self, seen) -> None:
        self.count += len(seen.pixel_values)
        for i, values in enumerate(self.final.T):
            self.averages.add("half_diagonal", i, values)

    def result(self) -> dict:
        shorter = min(self.setting.grid)
        frequencies = [2 * k / shorter for k in range(shorter // 2 + 1)]
        last = max(self.averages.sums["highest"])
        first, final = (self.averages.mean("highest", index) for index in (0, last))
        average, words = self.averages, "log amplitude at the highest frequency, relative to frequency 0"
        return {
            "title": self.title,
            "summary": f"The log amplitude at {frequencies[-1]:.2g} pi, relative to frequency zero, is "
            f"{readable(first)} before the first block and {readable(final)} after the last; the spatial variance "
            f"goes from {readable(average.mean('variance', 0))} to {readable(average.mean('variance', last))}.",
            "normal": self.normal,
            "images": self.count,
            "curves": {
                "highest": average.curve("highest", words, "relative log amplitude", "nats"),
                "half_diagonal": average.curve(
                    "half_diagonal",
                    "relative log amplitude after the last block",
                    "relative log amplitude",
                    "nats",
                    "frequency, in pi",
                    frequencies,
                ),
                "variance": average.curve("variance", "spatial variance of the tokens", "variance"),
            },
        }
