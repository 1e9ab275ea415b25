"""What `hf-mim options` says of keys and parts is what they are, and every one of them is explained."""

import ast
import dataclasses
import inspect
from importlib import import_module

import pytest

from hf_mim import cli
from hf_mim.reference import completion, options
from hf_mim.reference.examples import EXAMPLES
from hf_mim.training.common import recipe_keys, source


GROUPS = {group.name: group for group in options.groups()}
SECTIONS = recipe_keys.SECTIONS | recipe_keys.COMMAND_SECTIONS
PARTS = [(kind, name) for kind in options.PARTS for name in options.names_of(kind)]


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_every_key_is_explained(group):
    assert group.summary
    for name, option in group.options.items():
        assert option.meaning.strip() and options.type_title(option), f"{group.name}: {name} is not explained"


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_the_options_of_a_part_are_those_of_its_class(kind, name):
    module, table = options.PARTS[kind]
    entry = getattr(import_module(module), table)[name]
    keywords = [p for p in inspect.signature(entry).parameters.values() if p.kind is p.KEYWORD_ONLY]
    read = options.part(kind, name).options
    assert [p.name for p in keywords] == list(read)
    for parameter in keywords:
        default = read[parameter.name].default
        if not default.isupper():  # the name of a constant
            assert ast.literal_eval(default) == parameter.default


@pytest.mark.parametrize("kind", options.PARTS)
def test_the_parts_are_those_of_the_dict(kind):
    module, table = options.PARTS[kind]
    assert options.names_of(kind) == list(getattr(import_module(module), table))


@pytest.mark.parametrize("section", SECTIONS)
def test_the_defaults_of_a_section_are_those_of_its_classes(section):
    fields = {}
    for module, name in SECTIONS[section]:
        fields |= {field.name: field for field in dataclasses.fields(getattr(import_module(module), name))}
    compared = 0
    for key, option in options.section(section).options.items():
        try:
            default = ast.literal_eval(option.default)
        except ValueError:  # a name or a call
            continue
        if key in options.START_MEANINGS:  # no fields of a class
            continue
        assert fields[key].default == default, key
        compared += 1
    assert compared > len(GROUPS[section].options) / 2


def test_meanings_are_read_from_every_kind_of_docstring():
    text = """A title.

    Args:
        one: first line
            and second.
        two, three: of both.

        > A heading

        four (`str` or [`X`], *optional*, defaults to `"a: b"`):
            as transformers has it.
        five(`float`): close.

    Raises:
        ValueError: no option.
    """
    assert source.meanings_in(text) == {
        "one": "first line and second.",
        "two": "of both.",
        "three": "of both.",
        "four": "as transformers has it.",
        "five": "close.",
    }


def test_find_takes_a_section_a_kind_a_part_and_a_key():
    assert [group.name for group in options.find("data")] == ["data"]
    masks = ["masking.random", "masking.block", "masking.inverse_block"]
    assert [group.name for group in options.find("masking")][:3] == masks
    for word in ("hog", "target.hog", "model.target=hog"):
        assert [group.name for group in options.find(word)] == ["target.hog"]
    assert [list(group.options) for group in options.find("data.crop_scale")] == [["crop_scale"]]
    assert [group.name for group in options.find("masking_config.ratio")] == masks
    with pytest.raises(ValueError, match="did you mean 'target'"):
        options.find("traget")


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ((), "target"),
        (("target.hog",), "model.target_config.orientations  a whole number  [9]"),
        (("data.dataset",), "data.dataset  text or null  [null]"),
        (("training",), "training.num_train_epochs  a number  [3.0]"),
        (("native",), "every field of the wrapped model's own config"),
    ],
)
def test_the_command_prints_them(capsys, words, printed):
    assert cli.main(["options", *words]) == 0
    assert printed in capsys.readouterr().out


def test_a_recipe_is_printed_as_it_is(capsys):
    assert cli.main(["recipes", "mae"]) == 0
    assert capsys.readouterr().out == cli_recipe("mae")


def cli_recipe(name: str) -> str:
    from hf_mim.training.recipe import find

    return find(name).read_text(encoding="utf-8")


def test_every_command_has_three_examples_in_its_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    commands = cli.typer.main.get_command(cli.app).commands
    assert {*EXAMPLES} == {"hf-mim", *commands}
    for name in commands:
        assert cli.main([name, "-h"]) == 0
        printed = capsys.readouterr().out
        assert len(set(EXAMPLES[name])) == 3
        for line in EXAMPLES[name]:
            assert line in printed and line.startswith(f"hf-mim {name}"), line


def test_the_shell_completes_recipes_keys_and_parts():
    assert completion.complete_words("ma") == [
        "mae",
        "mae_small",
        "maskdistill",
        "maskdistill_small",
        "maskfeat",
        "maskfeat_small",
    ]
    assert completion.complete_words("da") == ["data2vec", "data2vec_small", "data."]
    assert completion.complete_words("data.crop") == ["data.crop_scale=", "data.crop_on_device="]
    assert completion.complete_words("model.target=h") == ["model.target=hog"]
    assert completion.complete_words("nothing.") == completion.complete_words("data.dataset=x") == []
    assert completion.complete_option("target.h") == ["target.hog"]
    assert "quick" in completion.complete_recipe("")


def test_the_shell_is_given_a_script_that_asks_the_command(capsys, monkeypatch):
    monkeypatch.setenv("_HF_MIM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "hf-mim pretrain model.target=ho")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit, match="0"):
        cli.main([])
    assert "model.target=hog" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    import hf_mim

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-mim {hf_mim.__version__}\n"
