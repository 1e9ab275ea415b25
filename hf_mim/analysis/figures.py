"""The figures of the report as SVG: drawn for a page whose style sheet gives the colours, so that they follow light and
dark. Every text that comes from outside is escaped here."""

import base64
import io
import math
from dataclasses import dataclass
from html import escape

import numpy as np
import PIL.Image
from markupsafe import Markup


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
MARKERS = ("circle", "square", "triangle", "diamond")
DASH = "6 4"  # of untrained encoders
WIDTH, HEIGHT = 360, 230  # of a chart, in units that are about a pixel on a telephone
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 28, 40
LOG_FROM = 300  # the ratio of the largest and the smallest positive value from which an axis is logarithmic


@dataclass(frozen=True)
class Style:
    """How an encoder looks in every figure: the colour and the marker of its own, dashed where it is untrained."""

    colour: int
    marker: str
    untrained: bool


def styles_of(encoders: dict[str, dict]) -> dict[str, Style]:
    """A style per label; an untrained encoder has the colour of the first encoder that it is the twin of."""
    trained = [label for label, entry in encoders.items() if not entry["untrained"]]
    order = {label: i for i, label in enumerate(trained)}
    for label, entry in encoders.items():
        if entry["untrained"]:
            owners = [order[owner] for owner in trained if encoders[owner]["twin"] == label]
            order[label] = min(owners, default=len(trained))
    return {
        label: Style(at % len(PALETTE), MARKERS[at // len(PALETTE) % len(MARKERS)], encoders[label]["untrained"])
        for label, at in order.items()
    }


def say(value: float | None) -> str:
    """A number for people, about three digits."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if value == int(value):
        return f"{value:.0f}"
    if size < 0.001:
        return f"{value:.1e}"
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    return say(value) if low is None or high is None else f"{say(value)} ({say(low)} to {say(high)})"


# ---- axes ----------------------------------------------------------------------------------------------------------
def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about `most`, and at least two where they differ; `whole` numbers only."""
    span = high - low
    if not span > 0:
        return [low]
    rough = max(span / most, 1.0) if whole else span / most
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Axis:
    """From values to places between `start` and `end`."""

    def __init__(self, values: list[float], start: float, end: float, whole: bool = False):
        low, high = min(values), max(values)
        positive = [value for value in values if value > 0]
        self.log = len(positive) == len(values) and high / low > LOG_FROM and not whole
        self.start, self.end = start, end
        if self.log:
            self.low, self.high = math.log10(low), math.log10(high)
            exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
            self.ticks = [10.0**e for e in exponents if self.low - 1e-9 <= e <= self.high + 1e-9]
            return
        if not whole:
            span = high - low or abs(high) or 1.0
            if 0 <= low < 0.6 * span:
                low = 0.0
            else:
                low -= 0.06 * span
            high += 0.06 * span if values[0] or max(values) > min(values) else 1.0
        self.low, self.high = low, high if high > low else low + 1
        blocks = whole and all(value == int(value) for value in values)
        self.ticks = ticks(self.low, self.high, 8 if blocks else 5, blocks)

    def __call__(self, value: float) -> float:
        place = (math.log10(max(value, 1e-300)) if self.log else value) - self.low
        return round(self.start + (self.end - self.start) * place / (self.high - self.low or 1), 1)


def tick_words(tick: float) -> str:
    return f"{tick:.0e}" if tick and (abs(tick) >= 1e5 or abs(tick) < 1e-4) else f"{tick:g}"


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(words)}</text>'


def svg(width: float, height: float, parts: list[str], alt: str) -> Markup:
    inside = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}" '
        f'xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    )


def marker(x: float, y: float, style: Style, title: str = "") -> str:
    shapes = {
        "circle": f'<circle cx="{x:g}" cy="{y:g}" r="2.8"',
        "square": f'<rect x="{x - 2.6:g}" y="{y - 2.6:g}" width="5.2" height="5.2"',
        "triangle": f'<path d="M{x:g} {y - 3.4:g}l3.2 5.6h-6.4z"',
        "diamond": f'<path d="M{x:g} {y - 3.8:g}l3.4 3.8l-3.4 3.8l-3.4 -3.8z"',
    }
    kind = "open" if style.untrained else "full"
    inside = f"<title>{escape(title)}</title>" if title else ""
    tag = shapes[style.marker].split(" ", 1)[0][1:]
    return f'{shapes[style.marker]} class="c{style.colour} {kind}">{inside}</{tag}>'


def line_sample(style: Style) -> Markup:
    """A short line with its marker, for legends."""
    dash = f' stroke-dasharray="{DASH}"' if style.untrained else ""
    line = f'<path d="M1 6H29" class="c{style.colour} line"{dash}/>'
    return Markup(
        f'<svg class="sample" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">{line}'
        f"{marker(15, 6, style)}</svg>"
    )


# ---- charts --------------------------------------------------------------------------------------------------------
def line_chart(title: str, curves: dict[str, dict], styles: dict[str, Style]) -> Markup:
    """Curves of several encoders, with bands where they have a confidence interval.

    Args:
        curves: {label: a curve as of `measurement.py`}.
    """
    first = next(iter(curves.values()))
    across = Axis([x for curve in curves.values() for x in curve["x"]], LEFT, WIDTH - RIGHT, whole=True)
    up = Axis(values_of(curves) or [0.0, 1.0], HEIGHT - BOTTOM, TOP)
    words = y_words(first) + (", logarithmic" if up.log else "")
    parts = frame(across, up, first["x_label"], words)
    # Untrained first: the trained ones are what is looked at, and lie above.
    order = sorted(curves, key=lambda label: not styles[label].untrained)
    parts += [band(curves[label], across, up, styles[label]) for label in order]
    parts += [line(label, curves[label], across, up, styles[label]) for label in order]
    spoken = "; ".join(f"{label}: {trend(curve)}" for label, curve in curves.items())
    return svg(WIDTH, HEIGHT, parts, f"Line chart, {title}, by {first['x_label']}. {spoken}")


def values_of(curves: dict[str, dict]) -> list[float]:
    """Everything that has to fit on the axis."""
    return [v for c in curves.values() for name in ("mean", "low", "high") for v in c[name] or [] if v is not None]


def y_words(curve: dict) -> str:
    """The words of its axis, with the unit where they do not say it."""
    unit = curve["unit"]
    return curve["y_label"] + (f" ({unit})" if unit and unit not in curve["y_label"] else "")


def trend(curve: dict) -> str:
    seen = [value for value in curve["mean"] if value is not None]
    return f"from {say(seen[0])} to {say(seen[-1])}" if seen else "no values"


def frame(across: Axis, up: Axis, x_label: str, y_label: str) -> list[str]:
    parts = [
        text(2, 12, y_label, "start", "label"),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, kind="label"),
    ]
    for tick in up.ticks:
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:g}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(text(LEFT - 6, y + 3.5, tick_words(tick), "end"))
    parts.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" class="axis"/>')
    return parts + [text(across(tick), HEIGHT - BOTTOM + 14, tick_words(tick)) for tick in across.ticks]


def points(xs: list, ys: list, across: Axis, up: Axis) -> list[tuple[float, float]]:
    return [(across(x), up(y)) for x, y in zip(xs, ys) if y is not None]


def path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


def band(curve: dict, across: Axis, up: Axis, style: Style) -> str:
    if not curve["low"] or not curve["high"]:
        return ""
    places = points(curve["x"], curve["low"], across, up) + points(curve["x"], curve["high"], across, up)[::-1]
    return f'<path d="{path(places)}Z" class="c{style.colour} band"/>' if len(places) > 2 else ""


def line(label: str, curve: dict, across: Axis, up: Axis, style: Style) -> str:
    places = points(curve["x"], curve["mean"], across, up)
    if not places:
        return ""
    dash = f' stroke-dasharray="{DASH}"' if style.untrained else ""
    low, high = (curve[name] or [None] * len(curve["x"]) for name in ("low", "high"))
    known = [entry for entry in zip(curve["x"], curve["mean"], low, high) if entry[1] is not None]
    titles = [f"{label}, {curve['x_label']} {say(x)}: {interval(*rest)}" for x, *rest in known]
    markers = "".join(marker(x, y, style, title) for (x, y), title in zip(places, titles))
    return f'<path d="{path(places)}" class="c{style.colour} line"{dash}/>{markers}'


def interval_chart(title: str, rows: dict[str, dict[str, dict]], styles: dict[str, Style], unit: str) -> Markup:
    """Numbers with their intervals: a line per number, a marker per encoder.

    Args:
        rows: {the number's name: {label: a scalar as of `measurement.py`}}.
    """
    step, top = 9.0, 4.0
    found = [s for row in rows.values() for s in row.values() if s["value"] is not None]
    edges = [s[name] for s in found for name in ("value", "low", "high") if s[name] is not None]
    across = Axis(edges, 12, WIDTH - 12)
    parts, y, before = [], top, ""
    for name, row in rows.items():
        # Numbers called "a, x" and "a, y" share the heading "a".
        group, _, own = name.rpartition(", ")
        if group != before and group:
            y += 18
            parts.append(text(12, y, shorten(group, 58), "start", "label"))
        before = group
        y += 14 if group else 18
        parts.append(text(12, y, shorten(own, 58), "start", "" if group else "label"))
        y += 3
        for label, scalar in row.items():
            y += step
            if scalar["value"] is not None:
                parts.append(point(label, name, scalar, across, y - step / 2, styles[label]))
    parts = [f'<path d="M{across(t):g} {top:g}V{y + 6:g}" class="grid"/>' for t in across.ticks] + parts
    parts += [text(across(t), y + 20, tick_words(t)) for t in across.ticks]
    parts.append(text(WIDTH / 2, y + 37, unit, kind="label"))
    spoken = "; ".join(
        f"{name}: " + ", ".join(f"{label} {say(s['value'])}" for label, s in row.items()) for name, row in rows.items()
    )
    return svg(WIDTH, y + 42, parts, f"Chart of numbers with intervals, {title}. {spoken}")


def point(label: str, name: str, scalar: dict, across: Axis, y: float, style: Style) -> str:
    words = f"{label}, {name}: {interval(scalar['value'], scalar['low'], scalar['high'])}".removeprefix(", ")
    bar = ""
    if scalar["low"] is not None:
        bar = f'<path d="M{across(scalar["low"]):g} {y:g}H{across(scalar["high"]):g}" class="c{style.colour} line"/>'
    return bar + marker(across(scalar["value"]), y, style, words)


# ---- pictures of numbers -------------------------------------------------------------------------------------------
def colours_of(values, low: float, high: float) -> PIL.Image.Image:
    """Numbers (rows, columns) as viridis from `low` to `high`; what is no number is grey."""
    from matplotlib import colormaps

    table = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    shares = np.clip((table - low) / (high - low if high > low else 1.0), 0, 1)
    colours = (colormaps["viridis"](np.nan_to_num(shares))[..., :3] * 255).round().astype(np.uint8)
    colours[np.isnan(table)] = 128
    return PIL.Image.fromarray(colours)


def data_uri(image: PIL.Image.Image | bytes) -> str:
    if not isinstance(image, bytes):
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def heat_chart(heatmap: dict) -> Markup:
    """A table of numbers in [0, 1] as colours, with a scale."""
    values, size, left, top = heatmap["values"], 210, 46, 24
    rows, cols = len(values), len(values[0])
    known = [v for row in values for v in row if v is not None]
    low, high = min([0.0, *known]), max([1.0, *known])
    uri, cell_x, cell_y = data_uri(colours_of(values[::-1], low, high)), size / cols, size / rows
    parts = [text(2, 12, shorten(heatmap["y_label"], 52), "start", "label")]
    parts.append(text(left + size / 2, top + size + 32, shorten(heatmap["x_label"], 44), kind="label"))
    parts.append(
        f'<image href="{uri}" x="{left}" y="{top}" width="{size}" height="{size}" preserveAspectRatio="none" '
        'class="pixels"/>'
    )
    for i in spaced(cols, 9):
        parts.append(text(left + cell_x * (i + 0.5), top + size + 14, tick_words(heatmap["x"][i])))
    for i in spaced(rows, 9):
        parts.append(text(left - 6, top + size - cell_y * (i + 0.5) + 3.5, tick_words(heatmap["y"][i]), "end"))
    scale = data_uri(colours_of([[v] for v in np.linspace(high, low, 64)], low, high))
    at = left + size + 16
    parts.append(f'<image href="{scale}" x="{at}" y="{top}" width="12" height="{size}" preserveAspectRatio="none"/>')
    parts += [text(at + 18, top + 8, tick_words(round(high, 2)), "start")]
    parts += [text(at + 18, top + size, tick_words(round(low, 2)), "start")]
    corner = f"from {say(values[0][0])} between the first layers to {say(values[-1][-1])} between the last"
    return svg(WIDTH - 30, top + size + 38, parts, f"Heat map, {heatmap['title']}: {corner}")


def spaced(count: int, most: int) -> range:
    return range(0, count, -(-count // most))


def shorten(words: str, letters: int) -> str:
    return words if len(words) <= letters else words[: letters - 1] + "…"


def map_uri(values: list[list[float]]) -> str:
    """A map of where something is, as a picture scaled from zero to its own largest value."""
    return data_uri(colours_of(values, 0.0, max(max(row) for row in values)))
