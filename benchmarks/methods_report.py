"""Tables and figure of benchmarks/methods.py, from the scores of its cells."""

from pathlib import Path

import numpy as np
from measure import markdown_table, over_seeds, write_section


SCORES = {"knn": "k-NN", "linear_1": "linear, 1 %", "linear_10": "linear, 10 %", "linear_100": "linear, all"}
ALL_SCORES = {**SCORES, "finetuned": "fine-tuned"}
NAMES = {"vit": "ViT", "resnet": "ResNet-18"}
COLOURS = {"untrained": "tab:gray", "raw pixels": "tab:gray"}  # what is no method
# What a paper says is better than what, on which student.
CLAIMS = {
    "vit": [
        ("mae", "untrained"),
        ("mae", "raw pixels"),
        ("img2vec", "mae"),
        ("img2vec, spread by a half", "img2vec"),
        ("img2vec", "img2vec, a quarter blended"),
        ("img2vec", "img2vec, half blended"),
        ("img2vec", "img2vec, three quarters blended"),
        ("img2vec", "img2vec, wholly blended"),
        ("dtm", "token-wise"),
        ("dtm", "dtm, random merging"),
        ("dtm", "dtm, fixed schedule"),
        ("moving average, dtm", "moving average, token-wise"),
        ("a2mim, vit", "a2mim, vit, no final norm"),
    ],
    "resnet": [
        ("mean fill, no token", "zero fill, no token"),
        ("mean fill, token", "mean fill, no token"),
        ("a2mim", "mean fill, token"),
        ("a2mim", "untrained"),
        ("a2mim", "raw pixels"),
    ],
}
Table = dict[str, dict[str, list[dict]]]  # student -> method -> the cells of its seeds


def report(students: Table) -> str:
    """Everything as markdown."""
    machines = {cell["machine"] for methods in students.values() for cells in methods.values() for cell in cells}
    parts = [
        f"{' '.join(sorted(machines))} Processor seconds are those of training and scoring; a teacher's maps are "
        "computed once and kept, so that only the run that came first has their cost."
    ]
    for student, methods in students.items():
        parts += [f"### Student {NAMES[student]}: accuracy of the frozen encoder, percent", score_table(methods)]
    parts += ["### Differences, seed by seed", claim_table(students)]
    parts += ["### What the targets are like", target_table(students)]
    parts += ["### Hidden pixels", pixel_table(students)]
    return "\n\n".join(parts)


def of(cells: list[dict], *keys: str, digits: int = 1) -> str:
    """Mean and standard deviation over the seeds of one figure, or "" where there is none."""
    values = []
    for cell in cells:
        for key in keys:
            cell = None if cell is None else cell.get(key)
        if cell is not None:
            values.append(cell)
    return over_seeds(values, digits)


def score_table(methods: dict[str, list[dict]]) -> str:
    keys = {**SCORES, "finetuned": "fine-tuned"}
    keys = {
        key: title for key, title in keys.items() if any(key in cell for cells in methods.values() for cell in cells)
    }
    rows = [
        [method, *(of(cells, key) for key in keys), of(cells, "seconds", digits=0), len(cells)]
        for method, cells in methods.items()
        if cells
    ]
    return markdown_table(["method", *keys.values(), "processor seconds", "seeds"], rows)


def claim_table(students: Table) -> str:
    """Of each pair of `CLAIMS`: the mean difference, its deviation over the seeds, and the sign in each seed."""
    rows = []
    for student, methods in students.items():
        for better, other in CLAIMS[student]:
            others = {cell["seed"]: cell for cell in methods.get(other, [])}
            pairs = [(cell, others[cell["seed"]]) for cell in methods.get(better, []) if cell["seed"] in others]
            if pairs:
                scores = [[(a[key], b[key]) for a, b in pairs if key in a and key in b] for key in ALL_SCORES]
                cells = [difference(score) for score in scores]
                rows.append([NAMES[student], f"{better} less {other}", *cells])
    return markdown_table(["student", "difference", *ALL_SCORES.values()], rows)


def difference(pairs: list[tuple[float, float]]) -> str:
    """ "+1.2 ± 0.3 (+++)" of the two scores of each seed, or "" where there are none."""
    if not pairs:
        return ""
    values = [first - second for first, second in pairs]
    signs = "".join("+" if value > 0 else "-" if value < 0 else "0" for value in values)
    return f"{over_seeds(values, sign=True)} ({signs})"


def target_table(students: Table) -> str:
    """Of the methods whose target is no image: how the targets vary, beside what the student learned."""
    rows = []
    for student, methods in students.items():
        for method, cells in methods.items():
            if any("target" in cell for cell in cells):
                row = [of(cells, "target_std", digits=2)]
                row += [of(cells, "target", key, digits=2) for key in ("raw", "centred")]
                row += [of(cells, "diversity", key, digits=2) for key in ("raw", "centred")]
                rows.append([NAMES[student], method, *row, of(cells, "linear_100")])
    header = ["student", "method", "deviation of the target", "its token diversity", "centred"]
    return markdown_table([*header, "the student's", "centred", "linear, all"], rows)


def pixel_table(students: Table) -> str:
    """Of everything that predicts pixels."""
    rows = []
    for student, methods in students.items():
        for method, cells in methods.items():
            if any("hidden_l1" in cell for cell in cells):
                row = [of(cells, "hidden_l1", digits=4), of(cells, "high_error", digits=5), of(cells, "loss", digits=4)]
                rows.append([NAMES[student], method, *row, len(cells)])
    header = ["student", "method", "hidden pixels: mean error", "energy of its high frequencies", "last training loss"]
    return markdown_table([*header, "seeds"], rows)


def write_page(page: Path, text: str, students: Table) -> None:
    """Puts the tables between markers of the page, whose other words stay, and the figure beside it."""
    picture = page.with_suffix(".png")
    page.parent.mkdir(parents=True, exist_ok=True)
    drawn = any(cells for methods in students.values() for cells in methods.values())
    if drawn:
        draw(students, picture)
        text = f"![accuracy of every method, one dot per seed]({picture.name})\n\n{text}"
    write_section(page, "methods", text)


def draw(students: Table, path: Path) -> None:
    """A row of panels per student, a panel per score: a dot per seed and a bar at the mean of each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = {name: {m: cells for m, cells in methods.items() if cells} for name, methods in students.items()}
    there = {name: methods for name, methods in there.items() if methods}
    heights = [len(methods) for methods in there.values()]
    figure = Figure(figsize=(14, 1.2 + 0.3 * sum(heights) + 0.6 * len(heights)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(there), len(SCORES), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (student, methods) in zip(panels, there.items()):
        for axes, (key, title) in zip(row, SCORES.items()):
            for place, (method, cells) in enumerate(methods.items()):
                values, colour = [cell[key] for cell in cells], COLOURS.get(method, "tab:blue")
                axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=5)
                axes.plot(np.mean(values), place, "|", color=colour, markersize=13, markeredgewidth=2)
            if "untrained" in methods:
                start = np.mean([cell[key] for cell in methods["untrained"]])
                axes.axvline(start, color="tab:gray", linestyle=":", linewidth=1)
            axes.set_yticks(range(len(methods)), methods if axes is row[0] else [""] * len(methods))
            axes.set(ylim=(len(methods) - 0.5, -0.5), title=f"{NAMES[student]}: {title}")
            axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("accuracy of the frozen encoder, percent; dotted: untrained", fontsize=10)
    figure.savefig(path)
