"""The figures of the report, drawn by matplotlib: as SVG for the page, whose style sheet gives the colours so that they
follow light and dark, and as PNG for slides and papers."""

import base64
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import numpy as np
import PIL.Image
from markupsafe import Markup
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_mim.analysis.lettering import LINE, SIZE, fold, width_of
from hf_mim.analysis.numbers import SHARE, readable, with_interval


# Blue, orange, green, mauve and ink, which people with any colour vision tell apart; on a white page and on a dark one.
# More encoders than colours differ by their markers.
PALETTE = (
    ("#1f5fb4", "#6ea8f5"),
    ("#d0480c", "#f08a45"),
    ("#009c74", "#2ee6a0"),
    ("#b57fb9", "#cfa3bf"),
    ("#2a2836", "#eceaff"),
)
NEUTRAL = 4  # of the colours, for what belongs to no single encoder
INK, SOFT, GRID, CARD = "#1c1d20", "#5c6068", "#e9eaec", "#fefefe"
# What matplotlib writes, and the variables of the page's style sheet that take their place.
VARIABLES = {light: f"var(--c{i})" for i, (light, _) in enumerate(PALETTE)}
VARIABLES |= {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)", CARD: "var(--card)"}
MARKERS = ("o", "s", "^", "D")
DASH = (0, (4, 2.5))  # of untrained encoders
INNER = 280.0  # points that the words above and below a chart may be wide
WIDTH, HEIGHT = 360, 230  # of a chart, in points, which are about pixels on a telephone
LOG_FROM = 300  # the ratio of the largest and the smallest positive value from which an axis is logarithmic
STYLE: dict[Any, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "hf_mim", "text.parse_math": False, "font.size": 12},
    **{"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT},
    **{"axes.facecolor": "none", "figure.facecolor": "none", "grid.color": GRID, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0},
}
# Points in a chart of intervals: a heading, a label, a bar, what follows a row.
GROUP, LABEL, BAR, GAP = 21.0, 18.0, 11.0, 4.0


@dataclass(frozen=True)
class Style:
    """How an encoder looks in every figure: the colour and the marker of its own, dashed where it is untrained."""

    colour: int
    marker: str
    untrained: bool

    @property
    def line(self) -> dict:
        """As matplotlib's options."""
        colour = PALETTE[self.colour][0]
        face = CARD if self.untrained else colour
        look = {"color": colour, "marker": self.marker, "markersize": 5, "markerfacecolor": face}
        return {**look, "linestyle": DASH if self.untrained else "-", "linewidth": 2, "clip_on": False}

    @property
    def point(self) -> dict:
        return {**self.line, "linestyle": ""}


@dataclass
class Drawing:
    """A chart before it is drawn.

    height: in points.
    draw: onto axes; returns {id of an artist: its tooltip}.
    description: of what it shows, for those who do not see it.
    margins: in points: left, right, top and bottom of the axes.
    """

    height: float
    draw: Callable[[Axes], dict[str, str]]
    description: str
    margins: tuple[float, float, float, float] = (56, 12, 24, 42)

    def draw_at(self, figure: Figure, x: float, y: float) -> dict[str, str]:
        """Draws it into a figure, its upper left corner `x`, `y` points from the figure's own; returns as `draw`. The
        labels of the y axis get the room that they need."""
        width, height = (72 * side for side in figure.get_size_inches())
        left, right, top, bottom = self.margins
        inner = self.height - top - bottom
        axes = figure.add_axes((0, 1 - (y + top + inner) / height, 1, inner / height))
        titles = self.draw(axes)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        left = max(left, 1.15 * max(map(width_of, labels), default=0) + 8)  # a browser has letters of its own
        place = axes.get_position()
        axes.set_position(((x + left) / width, place.y0, (WIDTH - left - right) / width, place.height))
        return titles


def styles_of(encoders: dict[str, dict]) -> dict[str, Style]:
    """A style per label; an untrained encoder has the colour of the first encoder that it is the twin of."""
    trained = [label for label, entry in encoders.items() if not entry["untrained"]]
    order = {label: i for i, label in enumerate(trained)}
    for label, entry in encoders.items():
        if entry["untrained"]:
            owners = [order[owner] for owner in trained if encoders[owner]["twin"] == label]
            order[label] = min(owners, default=len(trained))
    return {
        label: Style(i % len(PALETTE), MARKERS[i // len(PALETTE) % len(MARKERS)], encoders[label]["untrained"])
        for label, i in order.items()
    }


# ---- output --------------------------------------------------------------------------------------------------------
def to_svg(drawing: Drawing) -> Markup:
    """For a page: no outside reference, no style of its own, colours by variables, tooltips; everything escaped."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, drawing.height / 72))
        titles = drawing.draw_at(figure, 0, 0)
        return inline(figure, titles, f'role="img" aria-label="{escape(drawing.description)}"')


def inline(figure: Figure, titles: dict[str, str], attributes: str) -> Markup:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    body = re.search(r"<svg[^>]*>(.*)</svg>", text, re.DOTALL)
    assert box is not None and body is not None  # this is what matplotlib writes
    inside = re.sub(r"<(metadata|style|clipPath)\b.*?</\1>|<!--.*?-->", "", body[1], flags=re.DOTALL)
    inside = re.sub(r' clip-path="[^"]*"', "", inside)  # nothing is drawn outside its axes
    for name, title in titles.items():
        inside = inside.replace(f'<g id="{name}">', f"<g><title>{escape(title)}</title>")
    # Ids of groups would be there once for every figure; those of markers, which are used, name what they look like.
    inside = re.sub(r'<g id="[^"]*">', "<g>", inside).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        inside = inside.replace(colour, variable)
    return Markup(f'<svg viewBox="{box[1]}" {attributes} xmlns="http://www.w3.org/2000/svg">{inside.strip()}</svg>')


def draw_sheet(drawings: dict[str, Drawing], styles: dict[str, Style]) -> Figure:
    """Charts with their titles side by side, and a legend below."""
    cols = min(3, len(drawings))
    titled = [(fold(title, WIDTH - 16, "bold"), drawing) for title, drawing in drawings.items()]
    rows = [titled[i : i + cols] for i in range(0, len(titled), cols)]
    heads = [LINE * max(len(title) for title, _ in row) + 7 for row in rows]
    heights = [head + max(drawing.height for _, drawing in row) for head, row in zip(heads, rows)]
    labels = {"\n".join(fold(label, WIDTH - 60)): style for label, style in styles.items()}
    legend = -(-len(labels) // cols) * (LINE * max(1 + label.count("\n") for label in labels) + 5) + 8
    with rc_context(STYLE):
        size = (WIDTH * cols, sum(heights) + legend)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=150, facecolor="white")
        for i, row in enumerate(rows):
            top = sum(heights[:i])
            for j, (title, drawing) in enumerate(row):
                drawing.draw_at(figure, WIDTH * j, top + heads[i])
                at = (WIDTH * j + 4) / size[0], 1 - (top + 4) / size[1]
                figure.text(*at, "\n".join(title), weight="bold", fontsize=SIZE, va="top", linespacing=LINE / SIZE)
        lines = [Line2D([], [], label=label, **style.line) for label, style in labels.items()]
        figure.legend(handles=lines, loc="lower left", ncols=cols, frameon=False)
    return figure


@cache
def line_sample(style: Style) -> Markup:
    """A short line with its marker, for legends."""
    with rc_context(STYLE):
        figure = Figure(figsize=(30 / 72, 12 / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.plot([0.04, 0.5, 0.96], [0.5] * 3, markevery=[1], **style.line)
        return inline(figure, {}, 'class="sample" width="30" height="12" aria-hidden="true"')


def fitted(
    height: float,
    draw: Callable[[Axes], dict[str, str]],
    description: str,
    above: list[str],
    below: list[str],
    margins: tuple[float, float, float, float] = (56, 12, 24, 42),
) -> Drawing:
    """A chart that is as much higher as the lines above and below it need, beyond one of each."""
    left, right, top, bottom = margins
    top, bottom = top + LINE * (len(above) - 1), bottom + LINE * (len(below) - 1)
    return Drawing(height + top + bottom - margins[2] - margins[3], draw, description, (left, right, top, bottom))


# ---- charts --------------------------------------------------------------------------------------------------------
def line_chart(title: str, curves: dict[str, dict], styles: dict[str, Style]) -> Drawing:
    """Curves of several encoders, with bands where they have a confidence interval.

    Args:
        curves: {label: a curve as of `measurement.py`}.
    """
    first = next(iter(curves.values()))
    values = [v for c in curves.values() for name in ("mean", "low", "high") for v in c[name] or [] if v is not None]
    below = fold(first["x_label"], INNER)
    above = fold(y_label(first) + ", logarithmic", INNER)  # as much as it may become

    def draw(axes: Axes) -> dict[str, str]:
        whole = all(x == int(x) for curve in curves.values() for x in curve["x"])
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=whole, min_n_ticks=1))
        axes.set_xlabel("\n".join(below))
        axes.grid(axis="y")
        log = scale_values(axes, values, first["unit"])
        title = "\n".join(fold(y_label(first) + (", logarithmic" if log else ""), INNER))
        axes.set_title(title, loc="left", fontsize=SIZE)
        titles: dict[str, str] = {}
        # Untrained first: the trained ones are what is looked at, and lie above.
        for label in sorted(curves, key=lambda label: not styles[label].untrained):
            titles |= draw_curve(axes, label, curves[label], styles[label])
        return titles

    spoken = "; ".join(f"{label}: {trend(curve)}" for label, curve in curves.items())
    return fitted(HEIGHT, draw, f"Line chart, {title}, by {first['x_label']}. {spoken}", above, below)


def scale_values(axes: Axes, values: list[float], unit: str) -> bool:
    """Sets the limits of the y axis, from zero where the values come near it. -> whether it is logarithmic."""
    if unit == SHARE:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %"))
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low > LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.minorticks_off()
        return True
    axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    margin = 0.06 * (high - low or abs(high) or 1.0)
    axes.set_ylim(0.0 if 0 <= low < 10 * margin else low - margin, high + margin)
    return False


def draw_curve(axes: Axes, label: str, curve: dict, style: Style) -> dict[str, str]:
    """-> the tooltips of its points."""
    x, mean = curve["x"], as_numbers(curve["mean"])
    low, high = (curve[edge] or [None] * len(x) for edge in ("low", "high"))
    colour = PALETTE[style.colour][0]
    if curve["low"] and curve["high"]:
        axes.fill_between(x, as_numbers(low), as_numbers(high), color=colour, alpha=0.18, linewidth=0, clip_on=False)
    axes.plot(x, mean, **{**style.line, "marker": ""}, gid=f"line-{escape(label)}")
    titles = {}
    for i, value in enumerate(curve["mean"]):
        if value is not None:
            name = f"point-{len(axes.lines)}"
            axes.plot(x[i], mean[i], **style.point, gid=name)
            interval = with_interval(value, low[i], high[i], curve["unit"])
            titles[name] = f"{label}, {curve['x_label']} {readable(x[i])}: {interval}"
    return titles


def y_label(curve: dict) -> str:
    """The words of its axis, with the unit where they do not say it."""
    unit = curve["unit"]
    return curve["y_label"] + (f" ({unit})" if unit not in ("", SHARE) and unit not in curve["y_label"] else "")


def trend(curve: dict) -> str:
    values = [readable(value, curve["unit"]) for value in curve["mean"] if value is not None]
    return f"from {values[0]} to {values[-1]}" if values else "no values"


def as_numbers(values: list) -> list[float]:
    return [math.nan if value is None else value for value in values]


def interval_chart(title: str, rows: dict[str, dict[str, dict]], styles: dict[str, Style], unit: str) -> Drawing:
    """Numbers with their intervals: a label per number, and below it a bar per encoder.

    Args:
        rows: {the number's name: {label: a scalar as of `measurement.py`}}.
    """
    # Numbers called "a, x" and "a, y" share the heading "a".
    groups = [name.rpartition(", ")[0] for name in rows]
    headings = [group if i == 0 or group != groups[i - 1] else "" for i, group in enumerate(groups)]
    names = [fold(name.rpartition(", ")[2], INNER) for name in rows]
    tops = [fold(heading, INNER, "bold") if heading else [] for heading in headings]
    inner = sum(
        (GROUP + LINE * (len(top) - 1) if top else 0) + LABEL + LINE * (len(name) - 1) + BAR * len(row) + GAP
        for top, name, row in zip(tops, names, rows.values())
    )

    def draw(axes: Axes) -> dict[str, str]:
        titles: dict[str, str] = {}
        y = 0.0
        axes.set(ylim=(inner, 0), yticks=[], xlabel=shorten("" if unit == SHARE else unit, 56))
        axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
        if unit == SHARE:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %"))
        axes.grid(axis="x")
        for top, lines, (name, row) in zip(tops, names, rows.items()):
            if top:
                y += GROUP + LINE * (len(top) - 1)
                write(axes, y, top, "bold")
            y += LABEL + LINE * (len(lines) - 1)
            write(axes, y, lines)
            for label, scalar in row.items():
                titles |= draw_interval(axes, y + BAR / 2, label, name, scalar, styles[label])
                y += BAR
            y += GAP
        return titles

    spoken = "; ".join(
        f"{name}: " + ", ".join(f"{label} {readable(s['value'], unit)}" for label, s in row.items())
        for name, row in rows.items()
    )
    return Drawing(inner + 48, draw, f"Chart of numbers with intervals, {title}. {spoken}", (12, 12, 6, 42))


def write(axes: Axes, y: float, lines: list[str], weight: str = "normal") -> None:
    """Lines of text from the left edge, the last a little above `y`; the grid does not run through them."""
    box = {"facecolor": CARD, "edgecolor": "none", "pad": 1}
    text, place = "\n".join(lines), axes.get_yaxis_transform()
    line = axes.text(0, y - 3, text, transform=place, va="bottom", weight=weight, linespacing=LINE / SIZE)
    line.set(bbox=box, in_layout=False)


def draw_interval(axes: Axes, y: float, label: str, name: str, scalar: dict, style: Style) -> dict[str, str]:
    """-> its tooltip."""
    if scalar["value"] is None:
        return {}
    if scalar["low"] is not None:
        axes.plot([scalar["low"], scalar["high"]], [y, y], color=PALETTE[style.colour][0], linewidth=2)
    mark = f"point-{len(axes.lines)}"
    axes.plot(scalar["value"], y, **style.point, gid=mark)
    interval = with_interval(scalar["value"], scalar["low"], scalar["high"], scalar["unit"])
    return {mark: f"{label}, {name}: {interval}".removeprefix(", ")}


def heat_chart(heatmap: dict) -> Drawing:
    """A table of numbers in [0, 1] as colours, with a scale."""
    values = np.array([as_numbers(row) for row in heatmap["values"]])
    known = values[np.isfinite(values)].tolist()
    low, high = min([0.0, *known]), max([1.0, *known])
    colours = colormaps["viridis"].with_extremes(bad="#808080")
    above, below = fold(heatmap["y_label"], WIDTH - 60), fold(heatmap["x_label"], WIDTH - 120)

    def draw(axes: Axes) -> dict[str, str]:
        look = {"cmap": colours, "vmin": low, "vmax": high, "origin": "lower", "interpolation": "none"}
        axes.imshow(values, aspect="auto", clip_on=False, **look)
        axes.set_title("\n".join(above), loc="left", fontsize=SIZE)
        axes.set_xlabel("\n".join(below))
        for axis, names in ((axes.xaxis, heatmap["x"]), (axes.yaxis, heatmap["y"])):
            shown = range(0, len(names), -(-len(names) // 9))
            axis.set_ticks(shown, [f"{names[i]:g}" for i in shown])
        scale = axes.inset_axes((1.06, 0, 0.05, 1))
        scale.imshow(
            np.linspace(low, high, 64)[:, None], aspect="auto", clip_on=False, extent=(0, 1, low, high), **look
        )
        scale.set(xticks=[], yticks=[round(low, 2), round(high, 2)])
        scale.yaxis.tick_right()
        axes.spines[:].set_visible(False)
        scale.spines[:].set_visible(False)
        return {}

    corners = (readable(values[i, i].item() if np.isfinite(values[i, i]) else None) for i in (0, -1))
    first, last = corners
    spoken = f"from {first} between the first layers to {last} between the last"
    description = f"Heat map, {heatmap['title']}: {spoken}"
    return fitted(WIDTH - 56, draw, description, above, below, (50.0, 70.0, 24.0, 42.0))


# ---- pictures of numbers -------------------------------------------------------------------------------------------
def colours_of(values, low: float, high: float) -> PIL.Image.Image:
    """Numbers (rows, columns) as viridis from `low` to `high`."""
    shares = np.clip((np.array(values, dtype=float) - low) / (high - low if high > low else 1.0), 0, 1)
    return PIL.Image.fromarray((colormaps["viridis"](shares)[..., :3] * 255).round().astype(np.uint8))


def data_uri(image: PIL.Image.Image | bytes) -> str:
    if not isinstance(image, bytes):
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def shorten(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def map_uri(values: list[list[float]]) -> str:
    """A map of where something is, as a picture scaled from zero to its own largest value."""
    return data_uri(colours_of(values, 0.0, max(max(row) for row in values)))
