"""From `report.json` to a page that a person wants to read: `report.html`, one file that needs no network."""

import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib import rc_context

from hf_mim.analysis import figures
from hf_mim.analysis.figures import Drawing, Style
from hf_mim.analysis.numbers import SHARE, margin_beside, readable, with_interval
from hf_mim.training.plots.charts import check_figures, save_figure


# The first table, in this order: measurement, curves (the last value counts) or scalars, name, column, what it means.
HEADLINES = (
    ("health", "scalars", "effective_rank", "effective rank", "directions in which features of images vary"),
    ("token_diversity", "curves", "residual", "token diversity", "how much tokens of an image differ, last block"),
    ("consistency", "scalars", "image_accuracy", "images right", "by the nearest class prototype"),
    ("consistency", "scalars", "token_accuracy_plain", "tokens right", "every token by itself"),
    ("attention_flow", "curves", "cls_cls", "[cls] to itself", "of its attention, last block"),
    ("attention_flow", "curves", "patch_self", "patch to itself", "of its attention, last block"),
    ("fourier", "curves", "highest", "high frequencies", "log amplitude, last block"),
    ("interaction", "scalars", "middle", "middle interactions", "times the mean of all orders"),
)
# The curves that are shown at once where a measurement has many; the others fold out.
FIRST = {"attention_flow": ("cls_cls", "cls_entropy", "patch_self", "patch_entropy", "cls_patch", "patch_magnitude")}
MAX_FIRST = 6  # figures of a measurement that are shown at once
MAX_SENTENCES = 4  # sentences on encoders that are shown at once; of more, those on untrained ones fold out
MAX_ROWS = 14  # of a chart of intervals; more numbers are read better in the table


@dataclass
class Chart:
    """A figure of the page: its title, a note below it, and the class of its element."""

    title: str
    drawing: Drawing
    note: str
    kind: str = ""

    @property
    def svg(self) -> Markup:
        return figures.to_svg(self.drawing)


def write_report(folder: Path, results: dict, formats: str = "png") -> Path:
    """Writes `report.html` and a PNG of every measurement's figures into a folder.

    Args:
        folder: with the example images that `results` names.
        results: as `run.analyze` writes them to `report.json`; every text in them may come from anywhere.
        formats: `svg` or `pdf` writes the figures in that format too.

    Returns:
        the page.
    """
    folder, styles = Path(folder), figures.styles_of(results["encoders"])
    drawings = {name: charts(name, *entries_of(name, results), styles) for name in measurement_names(results)}
    unfinished = folder / "report.unfinished"
    unfinished.write_text(render(folder, results, styles, drawings), encoding="utf-8")
    for name, drawn in drawings.items():
        if drawn:
            sheet = figures.draw_sheet({chart.title: chart.drawing for chart in drawn}, styles)
            with rc_context(figures.STYLE):  # ticks are made when a figure is saved
                save_figure(sheet, folder / f"{name}.png", formats)
    path = folder / "report.html"
    unfinished.replace(path)
    return path


def render(folder: Path, results: dict, styles: dict[str, Style], drawings: dict[str, list[Chart]]) -> str:
    encoders = results["encoders"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_mim.analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"integer": lambda number: f"{number:,}", "size": size_words}
    trained = [label for label in encoders if not styles[label].untrained]
    return environment.get_template("report.html").render(
        results=results,
        trained=trained,
        palette=figures.PALETTE,
        legend=[(label, figures.line_sample(style), style) for label, style in styles.items()],
        columns=headline_columns(encoders),
        rows=[headline_row(label, encoders, styles) for label in by_twin(encoders)],
        sections=[section(folder, name, results, styles, drawn) for name, drawn in drawings.items()],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    )


def size_words(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 5e4 else f"{parameters / 1e3:.1f} thousand"


def by_twin(encoders: dict) -> list[str]:
    """Labels, every untrained encoder after the last one that it is the twin of."""
    order, left = [], {label for label, entry in encoders.items() if entry["untrained"]}
    trained = [label for label in encoders if label not in left]
    for i, label in enumerate(trained):
        order.append(label)
        twin = encoders[label]["twin"]
        if twin in left and all(encoders[other]["twin"] != twin for other in trained[i + 1 :]):
            order.append(twin)
            left.discard(twin)
    return order + sorted(left)


def measurement_names(results: dict) -> list[str]:
    names = dict.fromkeys(name for entry in results["encoders"].values() for name in entry["results"])
    return list(names)


def entries_of(name: str, results: dict) -> tuple[dict[str, dict], dict]:
    """-> a measurement's results by encoder, as far as they are not absent, and what it says of all together."""
    entries = {label: entry["results"].get(name, {"absent": ""}) for label, entry in results["encoders"].items()}
    present = {label: entry for label, entry in entries.items() if "absent" not in entry}
    return present, results["between"].get(name, {})


# ---- the first table -----------------------------------------------------------------------------------------------
def headline(entry: dict, measurement: str, kind: str, name: str) -> dict | None:
    """-> {"value", "low", "high", "unit"} of an encoder; None where it has none."""
    result = entry["results"].get(measurement, {}).get(kind, {}).get(name)
    if result is None or kind == "scalars":
        return result
    low, high = (result[edge][-1] if result[edge] else None for edge in ("low", "high"))
    return {"value": result["mean"][-1], "low": low, "high": high, "unit": result["unit"]}


def headline_columns(encoders: dict) -> list[tuple[str, str]]:
    """(title, what it means) of every headline that at least one encoder has."""
    return [
        (title, meaning)
        for *where, title, meaning in HEADLINES
        if any(headline(entry, *where) is not None for entry in encoders.values())
    ]


def headline_row(label: str, encoders: dict, styles: dict[str, Style]) -> dict:
    entry, titles, cells = encoders[label], {title for title, _ in headline_columns(encoders)}, []
    for *where, title, _ in HEADLINES:
        if title in titles:
            cells.append(headline_cell(headline(entry, *where)))
    return {
        "label": label,
        "sample": figures.line_sample(styles[label]),
        "entry": entry,
        "cells": cells,
    }


def headline_cell(scalar: dict | None) -> tuple[str, str | None]:
    """-> a number in words, shares in percent, and half of its interval."""
    if scalar is None or scalar["value"] is None:
        return "–", None
    value, margin = scalar["value"], None
    if scalar["low"] is not None and scalar["high"] is not None:
        margin = max(scalar["high"] - value, value - scalar["low"])
    text = readable(value, scalar["unit"])
    return text, None if margin is None else margin_beside(text, margin, scalar["unit"])


# ---- a measurement -------------------------------------------------------------------------------------------------
def section(folder: Path, name: str, results: dict, styles: dict[str, Style], drawn: list[Chart]) -> dict:
    """What the template shows of a measurement."""
    entries = {label: entry["results"][name] for label, entry in results["encoders"].items()}
    present, between = entries_of(name, results)
    first = len(FIRST.get(name, ())) or MAX_FIRST
    sentences = {
        label: (label, figures.line_sample(styles[label]), entry.get("summary") or entry["absent"])
        for label, entry in entries.items()
    }
    folded = len(sentences) > MAX_SENTENCES
    return {
        "name": name,
        "title": next(iter(entries.values()))["title"],
        "normal": next((entry["normal"] for entry in present.values()), ""),
        "images": next((entry["images"] for entry in present.values()), 0),
        "summaries": [line for label, line in sentences.items() if not folded or not styles[label].untrained],
        "folded": [line for label, line in sentences.items() if folded and styles[label].untrained],
        "together": between.get("summary", ""),
        "charts": drawn[:first],
        "more": drawn[first:],
        "maps": maps(folder, results["examples"], present, styles),
        "notes": notes(present),
        "numbers": numbers(present),
    }


def charts(name: str, present: dict[str, dict], between: dict, styles: dict[str, Style]) -> list[Chart]:
    """The figures of a measurement, those to show at once first."""
    drawn = []
    names = dict.fromkeys(curve for entry in present.values() for curve in entry.get("curves", {}))
    for curve in sorted(names, key=lambda curve: curve not in FIRST.get(name, names)):
        curves = {label: entry["curves"][curve] for label, entry in present.items() if curve in entry["curves"]}
        title = next(iter(curves.values()))["title"]
        banded = any(curve["low"] for curve in curves.values())
        note = "shaded: 95 % confidence" if banded else "one number for all of them"
        drawn.append(Chart(capital(title), figures.line_chart(title, curves, styles), note, "line"))
    return drawn + interval_charts(present, between, styles) + heat_charts(present, between)


def interval_charts(present: dict[str, dict], between: dict, styles: dict[str, Style]) -> list[Chart]:
    """Charts of the numbers that have intervals, one per unit, and one of the numbers between encoders."""
    units: dict[str, dict] = {}
    for label, entry in present.items():
        for scalar in entry.get("scalars", {}).values():
            if scalar["low"] is not None:
                units.setdefault(scalar["unit"], {}).setdefault(scalar["title"], {})[label] = scalar
    titles = {"": "Numbers", SHARE: "Shares"}
    shown = [(titles.get(unit, capital(unit)), rows, styles, unit) for unit, rows in units.items()]
    pairs = between.get("scalars", {}).values()
    plain = {"": Style(figures.NEUTRAL, figures.MARKERS[0], False)}
    shown.append(
        ("Between encoders", {s["title"]: {"": s} for s in pairs}, plain, next((s["unit"] for s in pairs), ""))
    )
    note = "bars: 95 % confidence"
    return [
        Chart(title, figures.interval_chart(title, rows, look, unit), note, "tall" if len(rows) > 4 else "")
        for title, rows, look, unit in shown
        if 2 <= len(rows) <= MAX_ROWS
    ]


def heat_charts(present: dict[str, dict], between: dict) -> list[Chart]:
    note = "0: nothing in common, 1: the same up to rotation and scale"
    return [
        Chart(f"{label}: {heatmap['title']}" if label else capital(heatmap["title"]), figures.heat_chart(heatmap), note)
        for label, entry in [*present.items(), ("", between)]
        for heatmap in entry.get("heatmaps", {}).values()
    ]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def maps(folder: Path, examples: list[str], present: dict[str, dict], styles: dict[str, Style]) -> list[dict]:
    """Maps over the example images: per kind the last block of every encoder, and all blocks of each."""
    files = [folder / name for name in examples]
    pictures = [figures.data_uri(path.read_bytes()) for path in files if path.is_file()]
    shown = []
    for kind in dict.fromkeys(kind for entry in present.values() for kind in entry.get("maps", {})):
        entries = {label: entry["maps"][kind] for label, entry in present.items() if kind in entry.get("maps", {})}
        rows = []
        for label, entry in entries.items():
            uris = [[figures.map_uri(block) for block in image] for image in entry["images"]]
            last = [blocks[-1] for blocks in uris]
            rows.append({"label": label, "sample": figures.line_sample(styles[label]), "last": last, "blocks": uris})
        shown.append({"title": capital(next(iter(entries.values()))["title"]), "pictures": pictures, "rows": rows})
    return shown


def notes(present: dict[str, dict]) -> list[tuple[str, str]]:
    """What is normal for single numbers: (title, sentence)."""
    sentences: dict[str, str] = {}
    for entry in present.values():
        for scalar in entry.get("scalars", {}).values():
            if scalar["normal"]:
                sentences.setdefault(scalar["title"], scalar["normal"])
    return list(sentences.items())


def shown_unit(unit: str) -> str:
    """Shares are shown in percent, which stands with the number."""
    return "" if unit == SHARE else unit


def numbers(present: dict[str, dict]) -> dict:
    """Every number of the section as a table: {"head", "rows"}, one column per encoder."""
    rows: dict[tuple, dict[str, str]] = {}
    for label, entry in present.items():
        for scalar in entry.get("scalars", {}).values():
            key = (scalar["title"], "", shown_unit(scalar["unit"]))
            value = with_interval(scalar["value"], scalar["low"], scalar["high"], scalar["unit"])
            rows.setdefault(key, {})[label] = value
        for curve in entry.get("curves", {}).values():
            for i, x in enumerate(curve["x"]):
                low, high = (curve[edge][i] if curve[edge] else None for edge in ("low", "high"))
                key = (curve["title"], f"{curve['x_label']} {readable(x)}", shown_unit(curve["unit"]))
                rows.setdefault(key, {})[label] = with_interval(curve["mean"][i], low, high, curve["unit"])
    return {
        "head": ["quantity", "where", "unit", *present],
        "rows": [[*key, *(values.get(label, "–") for label in present)] for key, values in rows.items()],
    }


def main() -> None:
    """Makes the page again from a folder's `report.json`: `python -m hf_mim.analysis.report FOLDER [svg or pdf]`."""
    import sys

    folder, formats = Path(sys.argv[1]), (sys.argv[2:] or ["png"])[0]
    check_figures("format", formats)
    print(write_report(folder, json.loads((folder / "report.json").read_text(encoding="utf-8")), formats))


if __name__ == "__main__":
    main()
