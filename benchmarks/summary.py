"""The table at the top of docs/benchmarks.md, from what the scripts found.

    python benchmarks/summary.py [--out docs/benchmarks.md]

Every script that is given a page puts its section there (`publish`), and beside the page, in a folder of its name, the
rows for this table as JSON. So one script can be run again alone, and the table follows.
"""

import json
import time
from pathlib import Path

from measure import judge, machine, markdown_table, parser, spread, write_section, write_whole


STARTED = time.monotonic()
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEADER = ["comparison", "ours, median", "peer's", "ratio (quartiles)", "goal", ""]


def file_of(page: str | Path, name: str) -> Path:
    """Where the rows of a section are kept."""
    return Path(page).with_suffix("") / f"{name.replace(' ', '-')}.json"


def publish(page: str | Path | None, name: str, text: str, rows: list[dict], where: str | None = None) -> None:
    """Puts a section and its rows into the page, unless that is None, and prints it.

    Args:
        where: machine and versions; None is those of this process.
    """
    if page:
        keep(page, name, text, rows, where)
    print(text, flush=True)


def keep(page: str | Path, name: str, text: str, rows: list[dict], where: str | None) -> None:
    write_section(page, name, text)
    found = {"machine": where or machine(), "seconds": round(time.monotonic() - STARTED), "rows": rows}
    file = file_of(page, name)
    file.parent.mkdir(exist_ok=True)
    write_whole(file, json.dumps(found, indent=1) + "\n")
    write_section(page, "summary", table(page))


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}".strip() if abs(value) >= 100 else f"{value:.3g} {unit}".strip()


def cells(entry: dict) -> list[str]:
    ratio, (_, wanted, verdict) = entry["ratio"], judge(entry)
    if isinstance(ratio, list | tuple):
        shown = spread(ratio, 1 if ratio[1] >= 10 else 2)
    else:
        shown = "" if ratio is None else f"{ratio:.2f}"
    figures = (number(entry[name], entry["unit"]) for name in ("ours", "peer"))
    return [entry["what"], *figures, shown, wanted, verdict]


def table(page: str | Path) -> str:
    """Markdown of all rows beside a page, in the order of its sections, one table for each machine."""
    page, groups = Path(page), {}
    text = page.read_text() if page.exists() else ""
    files = sorted(page.with_suffix("").glob("*.json"), key=lambda file: place(text, file))
    for file in files:
        found = json.loads(file.read_text())
        groups.setdefault(found["machine"], []).extend(cells(entry) for entry in found["rows"])
    return "\n\n".join(f"{where}\n\n{markdown_table(HEADER, rows)}" for where, rows in groups.items() if rows)


def place(text: str, file: Path) -> tuple[int, str]:
    """Where on the page the section of a file begins; sections that are not there come last."""
    found = text.replace(" ", "-").find(f"<!---{file.stem}--->")
    return (found if found >= 0 else len(text), file.stem)


def main(argv: list[str] | None = None) -> str:
    args = parser(__doc__, out="the page, by default docs/benchmarks.md").parse_args(argv)
    page = args.out or PAGE
    shown = table(page)
    write_section(page, "summary", shown)
    print(shown)
    return shown


if __name__ == "__main__":
    main()
