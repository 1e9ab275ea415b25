"""From `report.json` to a page that a person wants to read: `report.html`, one file that needs no network."""

import json
from pathlib import Path

import jinja2

from hf_mim.analysis import figures
from hf_mim.analysis.figures import Style, interval, say
from hf_mim.analysis.figures_png import draw_pngs


# The first table, in this order: measurement, curves (the last value counts) or scalars, name, column, what it means.
HEADLINES = (
    ("health", "scalars", "effective_rank", "effective rank", "in how many directions the features of images vary"),
    ("token_diversity", "curves", "residual", "token diversity", "how much tokens of an image differ, last block"),
    ("consistency", "scalars", "image_accuracy", "images right", "class of the nearest prototype, mean token"),
    ("consistency", "scalars", "token_accuracy_plain", "tokens right", "the same for every single token"),
    ("attention_flow", "curves", "cls_cls", "[cls] to itself", "share of its attention, last block"),
    ("attention_flow", "curves", "patch_self", "patch to itself", "share of its attention, last block"),
    ("fourier", "curves", "highest", "high frequencies", "log amplitude against frequency zero, last block"),
    ("interaction", "scalars", "middle", "middle interactions", "strength at the middle orders, against the mean"),
)
MOST_ROWS = 14  # of a chart of intervals; more numbers are read better in the table


def write_report(folder: Path, results: dict) -> Path:
    """Writes `report.html` and a PNG of every measurement's figures into a folder.

    Args:
        folder: with the example images that `results` names.
        results: as `run.analyze` writes them to `report.json`; every text in them may come from anywhere.

    Returns:
        the page.
    """
    folder = Path(folder)
    page = render(folder, results)
    unfinished = folder / "report.unfinished"
    unfinished.write_text(page, encoding="utf-8")
    draw_pngs(folder, results, figures.styles_of(results["encoders"]))
    path = folder / "report.html"
    unfinished.replace(path)
    return path


def render(folder: Path, results: dict) -> str:
    encoders, styles = results["encoders"], figures.styles_of(results["encoders"])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_mim.analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"say": say, "integer": lambda number: f"{number:,}"}
    trained = [label for label in encoders if not styles[label].untrained]
    return environment.get_template("report.html").render(
        results=results,
        trained=trained,
        palette=figures.PALETTE,
        legend=[(label, figures.line_sample(style), style) for label, style in styles.items()],
        columns=headline_columns(encoders),
        rows=[headline_row(label, encoders, styles) for label in by_twin(encoders)],
        sections=[section(folder, name, results, styles) for name in measurement_names(results)],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    )


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


# ---- the first table -----------------------------------------------------------------------------------------------
def headline(entry: dict, measurement: str, kind: str, name: str) -> dict | None:
    """-> {"value", "low", "high", "unit"} of an encoder; None where it has none."""
    found = entry["results"].get(measurement, {}).get(kind, {}).get(name)
    if found is None or kind == "scalars":
        return found
    low, high = (found[edge][-1] if found[edge] else None for edge in ("low", "high"))
    return {"value": found["mean"][-1], "low": low, "high": high, "unit": found["unit"]}


def headline_columns(encoders: dict) -> list[tuple[str, str, str]]:
    """(title, what it means, unit) of every headline that at least one encoder has."""
    columns = []
    for measurement, kind, name, title, meaning in HEADLINES:
        found = [headline(entry, measurement, kind, name) for entry in encoders.values()]
        known = [entry for entry in found if entry is not None]
        if known:
            units = {entry["unit"] for entry in known}
            columns.append((title, meaning, units.pop() if len(units) == 1 else ""))
    return columns


def headline_row(label: str, encoders: dict, styles: dict[str, Style]) -> dict:
    entry, titles, cells = encoders[label], {column[0] for column in headline_columns(encoders)}, []
    for measurement, kind, name, title, _ in HEADLINES:
        if title in titles:
            found = headline(entry, measurement, kind, name) or {"value": None, "low": None, "high": None}
            margin = (
                None if found["low"] is None else max(found["high"] - found["value"], found["value"] - found["low"])
            )
            cells.append((say(found["value"]), None if margin is None else say(margin)))
    return {
        "label": label,
        "sample": figures.line_sample(styles[label]),
        "entry": entry,
        "cells": cells,
    }


# ---- a measurement -------------------------------------------------------------------------------------------------
def section(folder: Path, name: str, results: dict, styles: dict[str, Style]) -> dict:
    """What the template shows of a measurement."""
    entries = {label: entry["results"][name] for label, entry in results["encoders"].items()}
    present = {label: entry for label, entry in entries.items() if "absent" not in entry}
    both = [*present.values(), results["between"].get(name, {})]
    return {
        "name": name,
        "title": next(iter(entries.values()))["title"],
        "normal": next((entry["normal"] for entry in present.values()), ""),
        "images": next((entry["images"] for entry in present.values()), 0),
        "summaries": [
            (label, figures.line_sample(styles[label]), entry.get("summary") or entry["absent"])
            for label, entry in entries.items()
        ],
        "together": results["between"].get(name, {}).get("summary", ""),
        "charts": charts(present, results["between"].get(name, {}), styles),
        "heatmaps": [
            {"title": heading(label, heatmap["title"]), "svg": figures.heat_chart(heatmap)}
            for label, entry in zip([*present, ""], both)
            for heatmap in entry.get("heatmaps", {}).values()
        ],
        "maps": maps(folder, results["examples"], present, styles),
        "notes": notes(present),
        "numbers": numbers(present),
    }


def heading(label: str, title: str) -> str:
    return f"{label}: {title}" if label else title


def charts(present: dict[str, dict], between: dict, styles: dict[str, Style]) -> list[dict]:
    """The line charts, and charts of the numbers that have intervals: {"title", "svg", "note"}."""
    drawn = []
    for name in dict.fromkeys(name for entry in present.values() for name in entry.get("curves", {})):
        curves = {label: entry["curves"][name] for label, entry in present.items() if name in entry["curves"]}
        title = next(iter(curves.values()))["title"]
        banded = any(curve["low"] for curve in curves.values())
        note = "" if banded else "without an interval: one number for all images"
        drawn.append({"title": title, "svg": figures.line_chart(title, curves, styles), "note": note, "tall": False})
    groups: dict[str, dict] = {}
    for label, entry in present.items():
        for scalar in entry.get("scalars", {}).values():
            if scalar["low"] is not None:
                groups.setdefault(scalar["unit"], {}).setdefault(scalar["title"], {})[label] = scalar
    for unit, rows in groups.items():
        if 2 <= len(rows) <= MOST_ROWS:
            svg = figures.interval_chart("of all numbers", rows, styles, unit)
            drawn.append({"title": "Numbers with their intervals", "svg": svg, "note": "", "tall": len(rows) > 4})
    scalars = between.get("scalars", {})
    if 0 < len(scalars) <= MOST_ROWS:
        rows = {scalar["title"]: {"": scalar} for scalar in scalars.values()}
        plain = {"": Style(len(figures.PALETTE) - 2, "circle", False)}
        svg = figures.interval_chart("between encoders", rows, plain, next(iter(scalars.values()))["unit"])
        drawn.append({"title": "Between encoders", "svg": svg, "note": "", "tall": len(rows) > 4})
    return drawn


def maps(folder: Path, examples: list[str], present: dict[str, dict], styles: dict[str, Style]) -> list[dict]:
    """Maps over the example images: per kind the last block of every encoder, and all blocks of each."""
    files = [folder / name for name in examples]
    pictures = [figures.data_uri(path.read_bytes()) for path in files if path.is_file()]
    shown = []
    for kind in dict.fromkeys(kind for entry in present.values() for kind in entry.get("maps", {})):
        found = {label: entry["maps"][kind] for label, entry in present.items() if kind in entry.get("maps", {})}
        rows = []
        for label, entry in found.items():
            uris = [[figures.map_uri(block) for block in image] for image in entry["images"]]
            last = [blocks[-1] for blocks in uris]
            rows.append({"label": label, "sample": figures.line_sample(styles[label]), "last": last, "blocks": uris})
        shown.append({"title": next(iter(found.values()))["title"], "pictures": pictures, "rows": rows})
    return shown


def notes(present: dict[str, dict]) -> list[tuple[str, str]]:
    """What is normal for single numbers: (title, sentence)."""
    found = {}
    for entry in present.values():
        for scalar in entry.get("scalars", {}).values():
            if scalar["normal"]:
                found.setdefault(scalar["title"], scalar["normal"])
    return list(found.items())


def numbers(present: dict[str, dict]) -> dict:
    """Every number of the section as a table: {"head", "rows"}, one column per encoder."""
    rows: dict[tuple, dict[str, str]] = {}
    for label, entry in present.items():
        for scalar in entry.get("scalars", {}).values():
            key = (scalar["title"], "", scalar["unit"])
            rows.setdefault(key, {})[label] = interval(scalar["value"], scalar["low"], scalar["high"])
        for curve in entry.get("curves", {}).values():
            for i, x in enumerate(curve["x"]):
                low, high = (curve[edge][i] if curve[edge] else None for edge in ("low", "high"))
                key = (curve["title"], f"{curve['x_label']} {say(x)}", curve["unit"])
                rows.setdefault(key, {})[label] = interval(curve["mean"][i], low, high)
    return {
        "head": ["quantity", "where", "unit", *present],
        "rows": [[*key, *(values.get(label, "–") for label in present)] for key, values in rows.items()],
    }


def main() -> None:
    """Makes the page again from a folder's `report.json`: `python -m hf_mim.analysis.report FOLDER`."""
    import sys

    folder = Path(sys.argv[1])
    print(write_report(folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
