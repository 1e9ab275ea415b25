"""The figures of the report as PNG files, for slides and papers: one per measurement."""

import textwrap
from pathlib import Path

from hf_mim.analysis.figures import DASH, PALETTE, Axis, Style, values_of, y_words


MARKS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D"}
SIDE = (4.2, 3.0)  # inches, of one chart
LETTERS = 44  # of the title, above one chart
DPI = 150


def draw_pngs(folder: Path, results: dict, styles: dict[str, Style]) -> list[Path]:
    """Writes `<measurement>.png` with its curves and heat maps, for every measurement that has some."""
    written = []
    names = dict.fromkeys(name for entry in results["encoders"].values() for name in entry["results"])
    for name in names:
        entries = {label: entry["results"].get(name, {}) for label, entry in results["encoders"].items()}
        path = folder / f"{name}.png"
        if draw(path, entries, results["between"].get(name, {}), styles):
            written.append(path)
    return written


def draw(path: Path, entries: dict[str, dict], between: dict, styles: dict[str, Style]) -> bool:
    """Whether there was anything to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = list(dict.fromkeys(name for entry in entries.values() for name in entry.get("curves", {})))
    heatmaps = [
        (f"{label}\n{heatmap['title']}" if label else heatmap["title"], heatmap)
        for label, entry in [*entries.items(), ("", between)]
        for heatmap in entry.get("heatmaps", {}).values()
    ]
    count = len(curves) + len(heatmaps)
    if not count:
        return False
    cols = min(3, count)
    rows = -(-count // cols)
    # No pyplot: it would ask for a display.
    figure = Figure(figsize=(SIDE[0] * cols, SIDE[1] * rows + 0.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(rows, cols, squeeze=False).flatten()
    for axes, name in zip(all_axes, curves):
        draw_curves(
            axes, {label: e["curves"][name] for label, e in entries.items() if name in e.get("curves", {})}, styles
        )
    for axes, (title, heatmap) in zip(all_axes[len(curves) :], heatmaps):
        draw_heatmap(figure, axes, title, heatmap)
    for axes in all_axes[count:]:
        axes.set_axis_off()
    lines = {line.get_label(): line for axes in all_axes for line in axes.get_lines()}
    if lines:
        figure.legend(
            lines.values(), map(plain, lines), loc="outside lower center", ncols=min(4, len(lines)), frameon=False
        )
    images = next((entry["images"] for entry in entries.values() if "images" in entry), 0)
    title = next((entry["title"] for entry in entries.values() if "title" in entry), "")
    words = f"{title}: {images:,} images, bands are 95 % confidence intervals"
    figure.suptitle(plain(textwrap.fill(words, LETTERS * cols)), fontsize="medium")
    figure.savefig(path)
    return True


def plain(words: str) -> str:
    """Text that matplotlib does not read as a formula, nor a legend as a line to leave out."""
    words = words.replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words


def draw_curves(axes, curves: dict[str, dict], styles: dict[str, Style]) -> None:
    for label, curve in curves.items():
        style = styles[label]
        colour = PALETTE[style.colour][0]
        dash = (0, tuple(float(length) / 2 for length in DASH.split())) if style.untrained else "-"
        face = "white" if style.untrained else colour
        mean = [float("nan") if value is None else value for value in curve["mean"]]
        (line,) = axes.plot(
            curve["x"], mean, color=colour, linestyle=dash, marker=MARKS[style.marker], markersize=4, mfc=face
        )
        line.set_label(label)
        if curve["low"] and curve["high"]:
            axes.fill_between(
                curve["x"], *(no_none(curve[edge]) for edge in ("low", "high")), color=colour, alpha=0.18, lw=0
            )
    first = next(iter(curves.values()))
    axes.set_title(plain(first["title"]), fontsize="small", loc="left")
    axes.set(xlabel=plain(first["x_label"]), ylabel=plain(textwrap.fill(y_words(first), 30)))
    if Axis(values_of(curves) or [0.0, 1.0], 0, 1).log:
        axes.set_yscale("log")
    if all(x == int(x) for curve in curves.values() for x in curve["x"]):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def no_none(values: list) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def draw_heatmap(figure, axes, title: str, heatmap: dict) -> None:
    values = [no_none(row) for row in heatmap["values"]]
    shown = axes.imshow(values, origin="lower", cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_title(plain(title), fontsize="small", loc="left")
    axes.set(xlabel=plain(heatmap["x_label"]), ylabel=plain(heatmap["y_label"]))
    for axis, names in ((axes.xaxis, heatmap["x"]), (axes.yaxis, heatmap["y"])):
        every = -(-len(names) // 9)
        axis.set_ticks(range(0, len(names), every), [str(name) for name in names[::every]])
    figure.colorbar(shown, ax=axes)
