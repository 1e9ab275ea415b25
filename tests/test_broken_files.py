"""Any file can be broken: images of every kind with bytes changed or cut, configs with anything in any field, recipes
that would take years to look through. What is wrong is one line, soon."""

import contextlib
import io
import json
import os
import random
import shutil
import time

import numpy as np
import PIL.Image
import pytest
from helpers import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_mim import MIMForPreTraining
from hf_mim.doctor.checks import doctor
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, load_model
from hf_mim.training.common.errors import CheckpointError, DataError, RecipeError
from hf_mim.training.data import decoding
from hf_mim.training.data.decoding import Undecodable, decode, read_file
from hf_mim.training.data.files import list_place
from hf_mim.training.data.masks import BadMask, decode_mask


SECONDS = 10  # for any refusal


# ---- images --------------------------------------------------------------------------------------------------------
def files() -> dict[str, bytes]:
    """A small image in each format."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    written = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        with io.BytesIO() as file:
            PIL.Image.fromarray(pixels).save(file, kind)
            written[kind] = file.getvalue()
    with io.BytesIO() as file:
        np.save(file, pixels)
        written["NPY"] = file.getvalue()
    return written


FILES = files()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(FILES)), st.data())
def test_changed_bytes_give_an_image_or_a_bad_one_and_nothing_else(kind, data):
    content = bytearray(FILES[kind])
    places = st.integers(0, min(len(content) - 1, 400))  # headers, mostly
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        content[place] = value
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    for read in (lambda: decode(content, 3), lambda: decode_mask(content)):
        try:
            assert 0 not in read().shape
        except (DataError, BadMask) as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), MemoryError(), AssertionError("a\nb")])
def test_whatever_a_decoder_raises_is_a_bad_image(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(decoding, "read_values", fail)
    with pytest.raises(Undecodable, match="cannot decode an image: "):
        decode(FILES["PNG"], 3)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0)])
def test_an_image_without_pixels_is_a_bad_one(shape):
    with io.BytesIO() as file:
        np.save(file, np.zeros(shape, np.uint8))
        with pytest.raises(Undecodable, match="has no pixels"):
            decode(file.getvalue(), 3)


def test_pipes_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "good.png").write_bytes(FILES["PNG"])
    assert list_place(str(tmp_path)).files == [str(tmp_path / "good.png")]
    for place in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(Undecodable, match="not a regular file"):
            decode(str(place), 3)
        with pytest.raises(BadMask, match="not a regular file"):
            decode_mask(str(place))
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "nothing.png")


# ---- checkpoints ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    MIMForPreTraining(tiny_config()).save_pretrained(folder)
    return folder


def places(fields: dict, path: tuple = ()):
    for key, value in fields.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(folder, checkpoint, path, value):
    """A copy of a checkpoint with another value in its config."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder, copy_function=os.link)
    config = inner = json.loads((checkpoint / "config.json").read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


VALUES = (10**9, 10**30, -1, 0, "x", None, True, 1e308, [], {}, ["x"], [10**9, 10**9], {"a": {"b": 1}})


def test_any_value_in_any_field_of_a_config_loads_or_is_one_line(checkpoint, tmp_path):
    """A sample that follows from the seed; all of them take minutes."""
    numbers = random.Random(0)
    fields = [*places(json.loads((checkpoint / "config.json").read_text())), ("num_labels",), ("id2label",)]
    for path, value in [(path, numbers.choice(VALUES)) for path in fields]:
        started = time.monotonic()
        for load in (load_encoder, load_model):
            try:
                load(changed(tmp_path / "model", checkpoint, path, value))
            except (ValueError, OSError) as error:
                assert len(str(error)) < 2000, (path, value)
        assert time.monotonic() - started < 2 * SECONDS, (path, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("encoder_config", "num_hidden_layers"), 10**9),
        (("decoder_config", "num_hidden_layers"), 10**9),
        (("encoder_config", "hidden_size"), 10**9),
        (("image_size",), 10**9),
        (("num_labels",), 10**9),
        (("masks_per_image",), 10**9),
        (("id2label",), {str(i): "x" for i in range(200_000)}),
        (("encoder_config", "patch_size"), [10**7, 10**7]),
    ],
)
def test_a_config_that_asks_for_years_is_refused_at_once(checkpoint, tmp_path, path, value):
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="cannot load .*: (the config|id2label) ") as caught:
        load_model(changed(tmp_path / "model", checkpoint, path, value))
    assert time.monotonic() - started < SECONDS and len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_deep_nesting_in_a_config(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    for text in ('{"a":' * 200_000, '{"model_type": "mim", "a": ' + "[" * 100 + "]" * 100 + "}", "[]", "3", "{", ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError):
            load_encoder(str(folder))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_weights_that_are_cut_short_are_one_line_and_a_finding_of_doctor(checkpoint, tmp_path, capsys, share):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])
    for load in (load_encoder, load_model):
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)
    assert doctor(str(folder)) == 1
    printed = capsys.readouterr().out
    assert "checkpoint" in printed and "fault" in printed and "1 fault found" in printed


# ---- recipes -------------------------------------------------------------------------------------------------------
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
HOSTILE = {
    "bomb": BOMB,
    "itself": "model: &a {b: *a}",
    "deep": "model: " + "[" * 5000,
    "long": "model: {a: " + "x" * 10**7 + "}",
    "number": "model: {image_size: " + "9" * 10_000 + "}",
    "date": "model: {image_size: !!timestamp x}",
    "object": "model: !!python/object/apply:os.system [true]",
    "control": "model: \x00",
    "list": "- 1",
    "keys": "model: {[1, 2]: 3}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_recipes_that_would_take_years(tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(HOSTILE[name])
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        recipes.resolve(str(tmp_path / "recipe.yaml"))
    assert time.monotonic() - started < SECONDS
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_aliases_may_be_used():
    assert recipes.parse_yaml("a: &a {x: 1}\nb: *a", "") == {"a": {"x": 1}, "b": {"x": 1}}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(max_examples=40, deadline=None)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)))
def test_what_is_saved_is_read_again(value):
    assert recipes.parse_yaml(recipes.dump_yaml({"a": value}), "") == {"a": value}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_as_a_recipe_or_an_override_is_a_recipe_error_at_most(text):
    for read in (lambda: recipes.parse_yaml(text, ""), lambda: recipes.check_names([text], "probe", ("probe", "data"))):
        with contextlib.suppress(RecipeError):
            read()
