"""What a frozen teacher makes of images that come again, kept on disk."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import save_grey_vits

from hf_mim import MIMForPreTraining
from hf_mim.modeling.teachers import Teacher
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.errors import DataError, RecipeError
from hf_mim.training.trainer import teacher_cache
from hf_mim.training.trainer.teacher_cache import TeacherCache


GRID, SIZE = (7, 7), (28, 28)


@pytest.fixture
def source(tmp_path):
    return save_grey_vits(tmp_path)[0]


def make_teacher(source: str) -> Teacher:
    return Teacher(source, [0, -1], "interpolate", None, [0.5], [0.5])


def make_cache(source: str, folder, capacity: int = 10) -> TeacherCache:
    return TeacherCache(make_teacher(source), folder, SIZE, GRID, capacity)


def count_images(monkeypatch) -> list[int]:
    """How many images the teacher itself is asked for, call by call."""
    counts, compute = [], Teacher.maps
    monkeypatch.setattr(Teacher, "maps", lambda self, x, grid: counts.append(len(x)) or compute(self, x, grid))
    return counts


def test_maps_are_those_of_the_teacher_and_computed_once_per_image(source, tmp_path, monkeypatch):
    images = torch.randn(6, 1, *SIZE)
    want, counts = make_teacher(source).maps(images, GRID), count_images(monkeypatch)
    cache = make_cache(source, tmp_path / "cache")
    for indices in ([0, 1, 2, 3], [5, 1, 4, 3], [0, 0, 5, 2]):
        for found, stage in zip(cache(images[indices], GRID), want):
            assert torch.equal(found, stage[indices].half().float()) and found.dtype == torch.float32
    assert counts == [4, 2]
    again = make_cache(source, tmp_path / "cache")  # another process
    assert torch.equal(again(images, GRID)[1], want[1].half().float()) and counts == [4, 2]
    again(images.flip(3), GRID)
    assert counts == [4, 2, 6]


def test_two_processes_write_one_file(source, tmp_path, monkeypatch):
    images = torch.randn(6, 1, *SIZE)
    want, counts = make_teacher(source).maps(images, GRID)[0].half().float(), count_images(monkeypatch)
    first, second = (make_cache(source, tmp_path) for _ in range(2))
    first(images[:4], GRID)
    second(images[2:], GRID)  # it has not heard of the first one's rows, and adds what they lack
    assert torch.equal(first(images, GRID)[0], want) and torch.equal(second(images, GRID)[0], want)
    assert sum(counts) == 10 and len(make_cache(source, tmp_path).rows) == 6


def test_what_a_crash_cut_short_is_computed_again(source, tmp_path):
    images = torch.randn(4, 1, *SIZE)
    want = make_cache(source, tmp_path)(images, GRID)[0]
    file = next(tmp_path.glob("*.maps"))
    width = file.stat().st_size // 4
    with open(file, "r+b") as opened:
        opened.truncate(2 * width + 5)
    cut = make_cache(source, tmp_path)
    assert len(cut.rows) == 2 and torch.equal(cut(images, GRID)[0], want)
    assert len(make_cache(source, tmp_path).rows) == 4 and file.stat().st_size == 4 * width


def test_a_full_file_other_sizes_and_other_questions(source, tmp_path, monkeypatch):
    images = torch.randn(5, 1, *SIZE)
    cache, counts = make_cache(source, tmp_path, capacity=3), count_images(monkeypatch)
    first = cache(images, GRID)[0]
    assert torch.equal(cache(images, GRID)[0], first) and counts == [5, 2] and len(cache.rows) == 3
    assert cache(torch.randn(2, 1, 16, 16), (4, 4))[0].shape[2:] == (4, 4) and len(cache.rows) == 3
    other = Teacher(source, [-1], "interpolate", None, [0.5], [0.5])
    assert not TeacherCache(other, tmp_path, SIZE, GRID, 3).rows
    for options in ({"data": "other"}, {"bf16": True}, {"device": "cuda"}):
        assert not TeacherCache(make_teacher(source), tmp_path, SIZE, GRID, 3, **options).rows


def test_a_teacher_with_the_same_weights_and_another_config_is_another(source, tmp_path):
    images = torch.randn(2, 1, *SIZE)
    make_cache(source, tmp_path / "cache")(images, GRID)
    shutil.copytree(source, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "image_mean": [0.1]}))
    want = make_teacher(str(tmp_path / "other")).maps(images, GRID)[0].half().float()
    assert torch.equal(make_cache(str(tmp_path / "other"), tmp_path / "cache")(images, GRID)[0], want)


def test_the_precision_is_that_of_the_run_and_not_of_the_caller(source, tmp_path):
    images = torch.randn(2, 1, *SIZE)
    cache = make_cache(source, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        found = cache(images, GRID)[0]
        rounded = make_teacher(source).maps(images.clone(), GRID)[0].half().float()
    assert torch.equal(found, make_teacher(source).maps(images.clone(), GRID)[0].half().float())
    bf16 = TeacherCache(make_teacher(source), tmp_path, SIZE, GRID, 10, bf16=True)(images, GRID)[0]
    assert torch.equal(bf16, rounded) and not torch.equal(bf16, found)


def test_a_row_that_is_not_written_whole_does_not_count(source, tmp_path):
    """As on a disk that is nearly full: the part that fits is written, without an error."""
    images, cache = torch.randn(4, 1, *SIZE), make_cache(source, tmp_path)
    write = cache.maps.write
    cache.maps = SimpleNamespace(**{name: getattr(cache.maps, name) for name in ("seek", "name", "readinto")})
    cache.maps.write = lambda data: write(bytes(data)[: cache.width if len(cache.rows) < 2 else 100])
    with pytest.raises(OSError, match="No space left"):
        cache(images, GRID)
    again = make_cache(source, tmp_path)
    assert len(again.rows) == 2
    assert torch.equal(again(images, GRID)[0], make_teacher(source).maps(images, GRID)[0].half().float())


def test_what_float16_cannot_hold_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "maps", lambda self, x, grid: [torch.full((len(x), 12, *grid), 1e6)] * 2)
    with pytest.raises(RecipeError, match="not finite in float16: set training.cache_teacher=false"):
        make_cache(source, tmp_path)(torch.randn(2, 1, *SIZE), GRID)


def words(source: str, tmp_path, name: str, *more: str) -> list[str]:
    options = ["model.encoder_config.hidden_size=16", "model.encoder_config.num_hidden_layers=1"]
    options += [
        f"model.target_config={{teacher: {source}, layers: [-1], match: interpolate}}",
        "data.max_eval_images=0",
    ]
    options += ["data.max_train_images=40", "training.per_device_train_batch_size=8", "training.max_steps=15"]
    options += ["training.save_strategy=no", "training.watch_every=0", f"data.cache_dir={tmp_path / 'cache'}"]
    return [*options, f"training.output_dir={tmp_path / name}", *more]


def test_a_run_with_a_full_cache_is_the_run_with_an_empty_one(source, tmp_path, monkeypatch, capsys):
    counts, weights = count_images(monkeypatch), []
    for name in ("first", "second"):
        folder = pretrain("img2vec_small", words(source, tmp_path, name, "training.cache_teacher=true"))
        weights.append(MIMForPreTraining.from_pretrained(folder).state_dict())
        counts.append(-1)
    first, second = counts[: counts.index(-1)], counts[counts.index(-1) + 1 : -1]
    assert sum(first) >= 40 and sum(second) <= 1  # the try before training, of an empty image
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    shown = " ".join(capsys.readouterr().out.split())
    assert "for 40 images, as they are and mirrored: 0 are kept already, up to 0.00 GB more in" in shown
    assert json.loads((folder / "metrics.json").read_text())["final_loss"] > 0


@pytest.mark.parametrize(
    "word, message",
    [
        ("data.crop_scale=[0.5, 1]", "random crops are others at each epoch"),
        ("data.color_jitter=0.5", "random colours"),
        ("data.streaming=true", "streamed images"),
    ],
)
def test_what_cannot_be_kept_is_refused(source, tmp_path, word, message):
    with pytest.raises(RecipeError, match=message):
        pretrain("img2vec_small", words(source, tmp_path, "run", "training.cache_teacher=true", word), preview=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["data.streaming=true"]])
def test_without_a_teacher_it_is_said_to_have_no_effect(tmp_path, capsys, more):
    options = words("none", tmp_path, "run", "training.cache_teacher=true", "training.max_steps=1", *more)
    options = [*(word for word in options if "target_config" not in word), "model.target=pixel"]
    pretrain("img2vec_small", [*options, "model.target_config=null"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "cache_teacher has no effect: target pixel has no frozen teacher" in shown


def test_a_small_disk_is_named_before_training(source, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "free_bytes", lambda folder: 1000)
    with pytest.raises(DataError, match="where 0.0 GB are free: set data.cache_dir, or training.cache_teacher=false"):
        pretrain("img2vec_small", words(source, tmp_path, "run", "training.cache_teacher=true"))
