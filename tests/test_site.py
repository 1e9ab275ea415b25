"""The pages of the site that are made of recipes, results and docstrings, and the check of its links."""

import re
import tomllib
from pathlib import Path

import links
import pages
import pytest
import yaml

from hf_mim.modeling import parts
from hf_mim.training.recipe import read, recipe_files


ROOT = Path(__file__).resolve().parents[1]
METHODS = [path for path in sorted((ROOT / "docs/methods").glob("*.md")) if path.name != "index.md"]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def test_every_recipe_has_a_page_with_its_values():
    made = pages.made()
    for name in recipe_files():
        text = made[f"recipes/{name}.md"]
        [body] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        shown = yaml.safe_load(body)
        for section, values in read(name).items():
            assert values.keys() == shown[section].keys(), (name, section)
        assert f"]({name}.md)" in made["recipes/index.md"]
    assert (
        "83.6 percent" in made["recipes/finetune_mae.md"]
        and "finetune.layer_decay=0.75" in made["recipes/finetune_mae.md"]
    )


def test_results_are_the_rows_of_the_page_of_results():
    rows = pages.results_of(["mae"]).splitlines()
    assert rows[0].startswith("| student | method | k-NN |") and "seconds" not in rows[0]
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["mae", "untrained", "raw pixels"]
    shown = rows[2].removeprefix("| ViT ").rstrip("|").strip()
    assert shown in (ROOT / "docs/results.md").read_text(encoding="utf-8")
    students = [row.split("|")[1].strip() for row in pages.results_of(["dtm", "simmim"]).splitlines()[2:]]
    assert students.count("ViT") >= 6 and students.count("ResNet-18") >= 2  # simmim is one of the earlier runs
    with pytest.raises(ValueError, match="no row nonsense"):
        pages.results_of(["mae", "nonsense"])


def test_the_parts_of_the_index_are_those_that_there_are():
    index = (ROOT / "docs/methods/index.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `model\.(\w+)` \| (.*) \|$", index, re.MULTILINE))
    assert set(rows) == set(parts.TABLES)
    for kind, table in parts.TABLES.items():
        assert set(table) <= set(re.findall(r"`(\w+)`", rows[kind])), kind
    recipes = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", index, re.MULTILINE)))
    apart = ("_small", "finetune", "segmentation")
    assert {name for name in recipe_files() if not any(word in name for word in apart)} <= set(recipes)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_has_a_formula_a_picture_and_what_it_asks_for(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^\$\$.+\$\$$", text, re.MULTILINE)
    assert all((path.parent / picture).is_file() for picture in re.findall(r"!\[.*?\]\((.*?)\)", text))
    filled = pages.with_lists(text, f"methods/{path.name}")
    assert "<!--" not in filled
    for asked in re.findall(r"<!-- recipes of (.*?) -->", text):
        assert "](../recipes/" in pages.recipes_of([asked], "methods/x.md"), asked


def test_every_page_is_in_the_navigation_once():
    groups = pages.groups(ROOT / "docs", set(pages.named_in(NAV)))
    named = pages.named_in(pages.expand(NAV, groups))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")} | set(pages.made())
    assert sorted(named) == sorted(there)


def test_messages_are_those_of_the_source(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('def f(x):\n    raise ValueError(f"the value {x!r} must be " + "a_positive number")\n')
    assert list(pages.messages_in(file)) == ["the value … must be a\\_positive number"]
    text = pages.made()["reference/messages.md"]
    assert "## modeling/masking.py" in text and "the mask ratio must be in (0, 1), got …" in text


def test_links_to_files_of_the_repository_become_links_of_the_site():
    links_in = "[a](../CONTRIBUTING.md) [b](benchmarks) [c](data.md#values) [d](nowhere.md) [e](https://x.org/a.md)"
    text = pages.with_site_links(links_in, "training.md", ROOT / "docs")
    assert text == "[a](contributing.md) b [c](data.md#values) [d](nowhere.md) [e](https://x.org/a.md)"
    recipe = pages.with_site_links("[r](../../training/recipes/quick.yaml)", "methods/mae.md", ROOT / "docs/methods")
    assert recipe == "[r](../recipes/quick.md)"
    assert pages.with_site_links("[a](mae.md)", "methods/dtm.md", ROOT / "docs/methods") == "[a](../methods/mae.md)"


def test_broken_links_and_foreign_files_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.css").write_text("")
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="a.css"><a href="sub/b.html#there">x</a><a href="sub/b.html#gone">x</a>'
        '<a href="missing.html">x</a><img src="no.png"><script src="https://cdn.org/x.js"></script>'
        '<a href="https://x.org">x</a><a href="#top" id="top">x</a>'
    )
    (tmp_path / "sub/b.html").write_text('<h1 id="there">b</h1><a href="..">x</a><a href="../a.css">x</a>')
    assert links.find_faults(tmp_path) == [
        "index.html -> missing.html: no such file",
        "index.html -> no.png: no such file",
        "index.html -> sub/b.html#gone: no such place in it",
        "index.html loads https://cdn.org/x.js",
    ]


def test_installing_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [section] = re.findall(r"^## Extras\n(.*?)^## ", (ROOT / "docs/install.md").read_text(), re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(rows) == sorted(extras)
