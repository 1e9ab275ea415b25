"""The pages of the site that nobody writes, each made from the one place that says it: recipes from their YAML,
options and reference from docstrings, contributing and changes from the files at the root. Needs no torch.

Pages ask for lists by comments: `<!-- recipes of 2111.06377 -->`, `<!-- results: mae; simmim -->`,
`<!-- pages: methods -->`.
"""

import ast
import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hf_mim.training import recipe
from hf_mim.training.recipe import recipe_files


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Files outside docs/ that are pages of the site too.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
REFERENCE = {
    "models": ("Models", ["hf_mim.modeling.configuration_mim.MIMConfig", "hf_mim.modeling.modeling_mim"]),
    "commands": (
        "Commands from Python",
        [
            "hf_mim.training.commands.pretrain.pretrain",
            "hf_mim.training.commands.finetune.finetune",
            "hf_mim.training.commands.probe.probe",
            "hf_mim.training.commands.dense.probe_dense",
            "hf_mim.analysis.run.analyze",
            "hf_mim.doctor.checks.doctor",
            "hf_mim.training.commands.reconstruct.reconstruct_file",
            "hf_mim.training.commands.teacher.describe_teacher",
            "hf_mim.training.commands.teacher.fit_codebook",
            "hf_mim.conversion.convert.convert",
            "hf_mim.conversion.export.export",
            "hf_mim.hub.push.push",
            "hf_mim.hub.push.write_card",
        ],
    ),
    "loading": (
        "Loading and recipes",
        [
            "hf_mim.training.checkpoint",
            "hf_mim.training.recipe.read_words",
            "hf_mim.training.recipe.list_recipes",
            "hf_mim.training.common.errors",
        ],
    ),
    "contracts": (
        "Parts of your own",
        [
            "hf_mim.modeling.encoder_base.Encoder",
            "hf_mim.modeling.encoder_base.EncoderOutput",
            "hf_mim.modeling.masking",
            "hf_mim.modeling.decoder_base.Decoder",
            "hf_mim.modeling.target_base.Target",
            "hf_mim.modeling.pooler_base.Pooler",
            "hf_mim.analysis.measurement",
        ],
    ),
    "morphing": (
        "Token morphing and frequency losses",
        ["hf_mim.modeling.morphing", "hf_mim.modeling.target_frequency"],
    ),
    "trainer": ("Trainer and data", ["hf_mim.training.trainer.trainer.MIMTrainer", "hf_mim.training.data.batches"]),
    "evaluation": (
        "Evaluation",
        [
            "hf_mim.training.evaluation.frozen",
            "hf_mim.training.evaluation.readouts",
            "hf_mim.training.evaluation.metrics",
        ],
    ),
}


@cache
def made() -> dict[str, str]:
    """{address in the site: Markdown} of all pages that are made here."""
    return {**recipe_pages(), **option_pages(), **reference_pages(), **message_pages(), **root_pages()}


@cache
def list_recipes() -> list[dict[str, str]]:
    return recipe.list_recipes()


# ---- recipes -------------------------------------------------------------------------------------------------------
def recipe_pages() -> dict[str, str]:
    entries = list_recipes()
    return {"recipes/index.md": recipe_index(entries)} | {
        f"recipes/{entry['name']}.md": recipe_page(entry) for entry in entries
    }


def recipe_index(entries: list[dict[str, str]]) -> str:
    lines = [
        "# Recipes",
        "",
        "A recipe is one YAML file. `hf-mim recipes` lists them, and every value can be changed on the",
    ]
    lines += ["command line: see [Training](../training.md) and [Fine-tuning](../finetuning.md).", ""]
    for runs in dict.fromkeys(entry["runs"] for entry in entries):
        lines += [f"## hf-mim {runs}", "", "| recipe | description | paper |", "|---|---|---|"]
        for entry in entries:
            if entry["runs"] == runs:
                paper = with_arxiv(entry.get("paper", "").partition(" ")[0])
                lines.append(f"| [`{entry['name']}`]({entry['name']}.md) | {entry['title']} | {paper} |")
        lines.append("")
    return "\n".join(lines)


def recipe_page(entry: dict[str, str]) -> str:
    """The header as text, the rest as it stands in the file."""
    header, body = split_recipe(recipe_files()[entry["name"]].read_text(encoding="utf-8"))
    lines = [f"# {entry['name']}", "", entry["title"], ""]
    lines += [f"**{key}.** {with_arxiv(text)}\n" for key, text in facts(entry).items()]
    return "\n".join([*lines, *remarks(header), "```yaml", body.strip(), "```", ""])


def facts(entry: dict[str, str]) -> dict[str, str]:
    command = {"Command": f"`{entry['command']}`"} if "command" in entry else {}
    return command | {key.capitalize(): entry[key] for key in ("paper", "cost", "result") if key in entry}


def split_recipe(text: str) -> tuple[list[str], str]:
    """-> the lines of the header without their marks, and the YAML."""
    lines = text.splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.lstrip("#").strip() for line in lines[:count]], "\n".join(lines[count:])


def remarks(header: list[str]) -> list[str]:
    """What a header says after its entries, as a paragraph for each that begins a line with a capital and a colon."""
    blank = [i for i, line in enumerate(header) if not line]
    return (
        [
            "",
            *(
                re.sub(r"(model|training|finetune|data)\.[\w.]+(=\S+)?", r"`\g<0>`", line)
                for line in header[blank[1] :]
            ),
            "",
        ]
        if len(blank) > 1
        else []
    )


def with_arxiv(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


# ---- options -------------------------------------------------------------------------------------------------------
def option_pages() -> dict[str, str]:
    """A page for each section of a recipe, and one for each kind of part."""
    from hf_mim.reference import options

    made = {}
    for name in options.SECTIONS | options.COMMAND_SECTIONS:
        made[f"options/{name}.md"] = option_page(f"Section {name}", [options.section(name)])
    for kind in options.PARTS:
        made[f"options/{kind}.md"] = option_page(
            f"Parts: {kind}", [options.part(kind, n) for n in options.names_of(kind)]
        )
    return made


def option_page(title: str, groups: list) -> str:
    from hf_mim.reference import options

    lines = ["---", "hide: [toc]", "---", "", f"# {title}", ""]
    for group in groups:
        if group.choose:
            lines += [f"## {group.name.partition('.')[2]}", "", f"`{group.choose}`", ""]
        lines += [f"{cell(group.summary[:1].upper() + group.summary[1:]).rstrip('.')}.", ""]
        if group.options:
            lines += [f"Set by `{group.prefix}KEY=VALUE`.", ""]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, option in group.options.items():
            kind, default = options.type_title(option), options.default_title(option)
            lines.append(f"| `{name}` | {cell(kind)} | `{cell(default)}` | {cell(option.meaning)} |")
        lines += ["", f"And {group.further}.", ""] if group.further else [""]
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


# ---- reference -----------------------------------------------------------------------------------------------------
def reference_pages() -> dict[str, str]:
    return {
        f"reference/{name}.md": f"# {title}\n\n" + "\n\n".join(f"::: {place}" for place in places) + "\n"
        for name, (title, places) in REFERENCE.items()
    }


# ---- messages ------------------------------------------------------------------------------------------------------
def message_pages() -> dict[str, str]:
    """Every message of an error in the source, by the file that raises it, values as dots."""
    lines = ["# Messages", "", "Every error that hf_mim raises with a message of its own, by the file that raises it;"]
    lines += [
        "… stands for values. Causes and remedies of the common ones: [Troubleshooting](../troubleshooting.md).",
        "",
    ]
    for folder in ("modeling", "training", "hf_mim"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not set(path.relative_to(ROOT).parts[1:-1]) & {"modeling", "training", "model_cards"}:
                found = dict.fromkeys(messages_in(path))
                if found:
                    lines += [f"## {path.relative_to(ROOT).as_posix()}", "", *(f"- {text}" for text in found), ""]
    return {"reference/messages.md": "\n".join(lines)}


def messages_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = " ".join(text_of(node.exc.args[0]).split())
            if text.count(" ") > 2 and "AssertionError" not in ast.unparse(node.exc.func):
                yield html.escape(text, quote=False).replace("*", "\\*").replace("_", "\\_").replace("[", "\\[")


def text_of(node: ast.expr) -> str:
    """A text of the source with dots for what is put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def root_pages() -> dict[str, str]:
    """The files at the root."""
    texts = {uri: (ROOT / name).read_text(encoding="utf-8") for name, uri in ROOT_PAGES.items()}
    return {uri: with_site_links(text, uri, ROOT) for uri, text in texts.items()}


# ---- what pages ask for --------------------------------------------------------------------------------------------
def with_lists(text: str, uri: str) -> str:
    """Puts lists in the place of the comments that ask for them."""
    text = re.sub(r"<!-- recipes of ([\d. ]+) -->", lambda match: recipes_of(match[1].split(), uri), text)
    text = re.sub(r"<!-- results: (.*?) -->", lambda match: results_of(match[1].split("; ")), text)
    return re.sub(r"<!-- pages: (\w+) -->", lambda match: pages_in(match[1]), text)


def recipes_of(papers: list[str], uri: str) -> str:
    up = "../" * uri.count("/")
    return "\n".join(
        f"- [`{entry['name']}`]({up}recipes/{entry['name']}.md): {entry['title']}"
        for entry in list_recipes()
        if any(f"arXiv:{paper}" in entry.get("paper", "") for paper in papers)
    )


def pages_in(folder: str) -> str:
    """A list of the other pages of a folder, with their titles and first sentences."""
    lines = []
    for path in sorted((DOCS / folder).glob("*.md")):
        if path.name != "index.md":
            title, paragraph = path.read_text(encoding="utf-8").split("\n\n")[:2]
            sentence = re.split(r"(?<=[.])\s(?=[A-Z])|(?<=:)\s", re.sub(r"\]\(.*?\)|\[", "", paragraph))[0]
            lines.append(f"- [{title.removeprefix('# ')}]({path.name}): {' '.join(sentence.split()).rstrip(':')}")
    return "\n".join(lines)


def results_of(methods: list[str]) -> str:
    """The rows of these methods and their variants ("dtm": "dtm, random merging") in the tables by student of
    docs/results.md and, of methods that it lacks, of docs/earlier_results.md; beside the untrained encoder and raw
    pixels.

    Raises:
        ValueError: a method has no row.
    """
    head, rows, missing = list[str](), list[list[str]](), set(methods)
    for page in ("results.md", "earlier_results.md"):
        wanted = set(missing)
        for student, cells in student_tables((DOCS / page).read_text(encoding="utf-8")):
            named = [row for row in cells[1:] if re.split("[,+]", row[0])[0] in wanted]
            missing -= {re.split("[,+]", row[0])[0] for row in named}
            others = [row for row in cells[1:] if row[0] in ("untrained", "raw pixels")]
            head = head or ["student", *cells[0][:5]]
            rows += [[student, *row[:5]] for row in named + others if named]
    if missing:
        raise ValueError(f"docs/results.md and docs/earlier_results.md have no row {', '.join(sorted(missing))}")
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def student_tables(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """The student, and the cells of the header and of every row: method, four scores, and more."""
    pattern = r"^### Student ([\w-]+): .*?\n\n(\|.*?)(?:\n\n|\n?\Z)"
    for student, table in re.findall(pattern, text, re.DOTALL | re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        yield student, [lines[0], *lines[2:]]


def with_formulas(text: str) -> str:
    """Every `$$formula$$` in LaTeX as MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def block(match: re.Match) -> str:
        return f'\n<div class="formula">{convert(match[1].strip(), display="block")}</div>\n'

    return re.sub(r"^\$\$(.+?)\$\$$", block, text, flags=re.DOTALL | re.MULTILINE)


def with_site_links(text: str, uri: str, folder: Path) -> str:
    """Links as the page `uri` of the site has them; of links to what the site does not have, the title alone.

    Args:
        folder: in which the page's file lies.
    """

    def link(match: re.Match) -> str:
        title, path, anchor = match.groups()
        target = (folder / path).resolve()
        if target.parent == ROOT and target.name in ROOT_PAGES:
            place = ROOT_PAGES[target.name]
        elif target.suffix == ".yaml" and target.is_relative_to(ROOT / "training/recipes"):
            place = f"recipes/{target.stem}.md"
        elif target.is_relative_to(DOCS) and target.is_file():
            place = target.relative_to(DOCS).as_posix()
        else:
            return title if target.exists() else match[0]
        return f"[{title}]({'../' * uri.count('/')}{place}{anchor or ''})"

    return re.sub(r"\[([^\]]*)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", link, text)


# ---- navigation ----------------------------------------------------------------------------------------------------
def named_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav] if nav.endswith(".md") else []
    parts = nav.values() if isinstance(nav, dict) else nav
    return [name for part in parts for name in named_in(part)]


def groups(docs: Path, named: set[str]) -> dict[str, list[str]]:
    """{name in `nav`: the pages that it stands for}"""
    others = sorted(path.name for path in docs.glob("*.md") if path.name not in named)
    methods = sorted(f"methods/{path.name}" for path in docs.glob("methods/*.md"))
    found = {"guides": others, "methods": [name for name in methods if name not in named]}
    for uri in made():
        folder, _, _ = uri.rpartition("/")
        found.setdefault(folder, []).append(uri)
    return found


def expand(nav: object, groups: dict[str, list[str]]) -> object:
    if isinstance(nav, dict):
        return {
            title: expand([part] if isinstance(part, str) and part in groups else part, groups)
            for title, part in nav.items()
        }
    if isinstance(nav, str):
        return nav
    expanded: list[object] = []
    for part in nav:
        if part == "options" or part == "reference":
            expanded.append({part.capitalize(): groups.get(part, [])})
        elif isinstance(part, str) and part in groups:
            expanded += groups[part]
        else:
            expanded.append(expand(part, groups))
    return expanded
