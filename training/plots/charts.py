"""Charts, drawn by matplotlib without a display: loss, confusion matrix, accuracies with intervals, forgetting.
The PNG of each is for screens and the Hub; `figures` names a second format, for papers."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_mim.modeling.options import unknown_choice


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
MARKED = 10  # logged losses below which each is drawn as a point
NAMED = 40  # classes whose names, and
NUMBERED = 20  # classes whose counts are still legible in a confusion matrix
COLUMNS = {  # of the chart of accuracies: colours and names
    "trained": ("tab:blue", "trained encoder"),
    "untrained": ("tab:gray", "the same untrained"),
    "raw_pixels": ("tab:olive", "raw pixels"),
}


def make_axes(width: float, height: float) -> tuple["Figure", "Axes"]:
    """Empty axes of so many inches; no pyplot, which would ask for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def check_figures(key: str, figures: str) -> None:
    """Raises:
    OptionError: the option `key` names no format of `FORMATS`.
    """
    if figures not in FORMATS:
        raise unknown_choice(key, figures, FORMATS)


def save_figure(figure: "Figure", path: Path, figures: str = "png") -> None:
    """Writes a figure as the PNG file `path`, and beside it as SVG or PDF, whose text stays text."""
    from matplotlib import rc_context

    figure.savefig(path)
    if figures != "png":
        with rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
            figure.savefig(path.with_suffix(f".{figures}"))


def draw_loss(history: list[dict], path: Path, figures: str = "png") -> None:
    """Writes the curve of the loss: as logged, and its running mean over a twentieth of the run; points where there
    are too few for a line.

    Args:
        history: the Trainer's `state.log_history`; entries without "loss" are left out.
    """
    logged = [(entry["step"], entry["loss"], entry.get("learning_rate")) for entry in history if "loss" in entry]
    steps, losses, rates = (np.array(column, dtype=float) for column in zip(*logged, strict=True))
    figure, axes = make_axes(8, 4.5)
    mark = "o" if len(steps) < MARKED else ""
    axes.plot(steps, losses, marker=mark, color="tab:blue", alpha=0.35, linewidth=0.8, label="loss, as logged")
    axes.plot(steps, running_mean(losses, len(losses) // 20), color="tab:blue", linewidth=2, label="loss, running mean")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set(xlabel="optimizer step", ylabel="loss on the training images")
    # The first steps are far above the rest and would flatten the part that matters.
    settled = losses[len(losses) // 20 :]
    span = np.ptp(settled) or abs(settled[0]) or 1
    axes.set_ylim(settled.min() - 0.05 * span, min(losses.max(), settled.max() + 0.5 * span) + 0.05 * span)
    axes.grid(alpha=0.3)
    other = axes.twinx()
    other.plot(steps, rates, marker=mark, markersize=3, color="tab:gray", linestyle=":", label="learning rate")
    other.set(ylabel="learning rate", ylim=(0, None))
    lines = axes.get_lines() + other.get_lines()
    axes.legend(handles=lines, loc="upper right")
    save_figure(figure, path, figures)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of up to `window` values around each, fewer at both ends; same length as `values`."""
    half, total = window // 2, np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))  # symmetric, so that the ends have no lag
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def draw_confusion(matrix: np.ndarray, classes: list[str], path: Path, figures: str = "png") -> None:
    """Writes the picture of a confusion matrix: shares of every row in colour, counts as long as they are legible."""
    count = len(classes)
    side = min(max(5.0, 1.5 + 0.5 * count), 12.0)
    figure, axes = make_axes(side + 1, side)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the images of the row's class", shrink=0.8)
    right = 100 * matrix.diagonal().sum() / max(1, matrix.sum())
    axes.set(xlabel="predicted", ylabel="true", title=f"{matrix.sum():,} images, {right:.1f} percent right")
    if count <= NAMED:
        short = [name if len(name) <= 20 else f"{name[:19]}…" for name in classes]
        axes.set_xticks(range(count), short, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), short)
    if count <= NUMBERED:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    save_figure(figure, path, figures)


def draw_accuracies(
    rows: list[tuple[str, dict[str, dict]]], title: str, poolers: int, path: Path, figures: str = "png"
) -> None:
    """Writes the chart of a probing: every row as points with their intervals.

    Args:
        rows: a title, and {column: {"accuracy", "low", "high"}, or None}, of `COLUMNS`.
        poolers: how many rows, the first ones, are of trained poolers.
    """
    figure, axes = make_axes(8.5, 1.6 + 0.36 * len(rows))
    present = [column for column in COLUMNS if any(entries.get(column) for _, entries in rows)]
    for place, column in enumerate(present):
        points = [(i, entries[column]) for i, (_, entries) in enumerate(rows) if entries.get(column)]
        height = np.array([i for i, _ in points]) + 0.22 * (place - (len(present) - 1) / 2)
        accuracy, low, high = (np.array([point[key] for _, point in points]) for key in ("accuracy", "low", "high"))
        ends = np.stack([accuracy - low, high - accuracy]).clip(0)
        color, label = COLUMNS[column]
        axes.errorbar(accuracy, height, xerr=ends, fmt="o", ms=5, capsize=3, color=color, label=label)
    axes.axhline(poolers - 0.5, color="lightgray", linewidth=0.8)
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[f"{name} (pooler)" if i < poolers else name for i, (name, _) in enumerate(rows)],
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="accuracy on the test images, percent, with 95 percent intervals",
        title=title,
    )
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(present), frameon=False)
    save_figure(figure, path, figures)


def draw_forgetting(curves: dict[str, dict[str, list[tuple[int, float]]]], path: Path, figures: str = "png") -> None:
    """Writes what became of an encoder that was trained further: a panel for each set of images, with accuracies in
    percent on the left axis and CKA on the right one.

    Args:
        curves: {title of the images: {title of the score: [(step, value)]}}; a score without values is left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(curves), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, scores) in zip(panels, curves.items()):
        right = axes.twinx()
        for i, (name, points) in enumerate(scores.items()):
            if points:
                is_share = "CKA" in name
                style = {"color": f"C{i}", "linestyle": ":" if is_share else "-", "marker": ".", "label": name}
                (right if is_share else axes).plot(*zip(*points), **style)
        axes.set(xlabel="optimizer step", ylabel="accuracy of the frozen encoder, percent")
        axes.set_title(textwrap.fill(title, 60), fontsize=9)
        right.set(ylabel="CKA to the start", ylim=(0, 1.05))
        axes.grid(alpha=0.3)
        axes.legend(handles=[*axes.get_lines(), *right.get_lines()], loc="lower left")
    save_figure(figure, path, figures)
