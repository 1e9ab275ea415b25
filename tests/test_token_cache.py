"""Features on disk: what is kept, for whom it counts, and what a kill, a copy or a large data set do to it."""

import json
import os

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import NATIVE_VIT, RESNET, perturb, tiny_config

from hf_mim import MIMModel
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.evaluation import feature_store as token_cache
from hf_mim.training.evaluation.feature_store import FeatureStore, data_hash, weights_hash
from hf_mim.training.evaluation.features import (
    CachedSource,
    Features,
    ImageViews,
    PoolerChoice,
    UncachedSource,
    choose_layers,
    fill,
    missing_bytes,
    plan,
)


def row_file(folder, count=10, description=None, shape=(3, 4), dtype=torch.bfloat16) -> FeatureStore:
    return FeatureStore(folder, "tokens", description or {"weights": "a"}, count, shape, dtype)


def write(file: FeatureStore, rows: torch.Tensor) -> FeatureStore:
    file.append(rows)
    file.commit()
    file.close()
    return file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_come_back_as_they_were_written(tmp_path, dtype):
    rows, chosen = torch.randn(10, 3, 4), torch.tensor([7, 0, 7, 9])
    write(row_file(tmp_path, dtype=dtype), rows)
    again = row_file(tmp_path, dtype=dtype)
    assert again.complete and again.path.stat().st_size == 120 * dtype.itemsize
    torch.testing.assert_close(again[chosen], rows.to(dtype)[chosen], rtol=0, atol=0)


def test_what_a_kill_left_behind_the_record_does_not_count(tmp_path):
    rows = torch.randn(10, 3, 4)
    write(row_file(tmp_path), rows[:4])
    killed = row_file(tmp_path)
    killed.append(rows[4:7] + 1)  # written, and never recorded
    killed.file.sync()
    again = row_file(tmp_path)
    assert again.done == 4 and again.missing_bytes == 6 * 3 * 4 * 2
    write(again, rows[4:])
    torch.testing.assert_close(row_file(tmp_path)[torch.arange(10)], rows.bfloat16(), rtol=0, atol=0)


def test_a_file_shorter_than_its_record_is_continued_where_it_ends(tmp_path):
    rows = torch.randn(10, 3, 4)
    file = write(row_file(tmp_path), rows)
    file[torch.tensor([0])]
    os.truncate(file.path, 5 * file.width + 7)
    again = row_file(tmp_path)
    assert again.done == 5
    with pytest.raises(ValueError, match="cut short: 5 of 10 rows; run the command again"):
        again[torch.tensor([0])]
    write(again, rows[5:])
    torch.testing.assert_close(row_file(tmp_path)[torch.arange(10)], rows.bfloat16(), rtol=0, atol=0)


def test_half_a_record_starts_anew(tmp_path):
    file = write(row_file(tmp_path), torch.randn(10, 3, 4))
    file.record.write_text(file.record.read_text()[:20])
    assert row_file(tmp_path).done == 0


def test_the_cache_of_another_model_is_not_taken(tmp_path):
    one, other = row_file(tmp_path, description={"weights": "a"}), row_file(tmp_path, description={"weights": "b"})
    assert one.path != other.path
    write(one, torch.randn(10, 3, 4))
    assert row_file(tmp_path, description={"weights": "b"}).done == 0
    one.path.rename(other.path)
    one.record.rename(other.record)
    with pytest.raises(ValueError, match=r"is the cache of another run \(weights differs\): remove it"):
        row_file(tmp_path, description={"weights": "b"})


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MAPPED_MOST", 2**23)
    count, megabytes = 2**13, 2**20
    file = row_file(tmp_path, count, shape=(64, 128))  # 128 MiB, of which the disk holds nothing
    write(file, torch.zeros(1, 64, 128))
    os.truncate(file.path, count * file.width)
    file.record.write_text(json.dumps({"done": count, "bad": [], "description": file.description}))
    file = row_file(tmp_path, count, shape=(64, 128))

    def resident() -> float:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / megabytes

    start, most = resident(), 0.0
    for chosen in torch.arange(count).split(128):
        assert file[chosen].shape == (128, 64, 128)
        most = max(most, resident() - start)
    assert count * file.width / megabytes == 128 and most < 40


# ---- features of images --------------------------------------------------------------------------------------------
@pytest.fixture
def photos(tmp_path):
    """Three classes of 12 images, 16x16."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in "abc":
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                image = PIL.Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
                image.save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


def open_images(photos, config, views=1, **data) -> ImageViews:
    splits = load_splits(DataArguments(dataset=str(photos), crop_scale=[0.3, 0.9], **data), config)
    augmented = splits.train if views > 1 else None
    return ImageViews(splits.train_eval, augmented, list(range(len(splits.train_eval))), config, "train")


def make(photos, views=1, seed=0, config=None, **options) -> tuple[Features, ImageViews]:
    torch.manual_seed(seed)
    model = perturb(MIMModel(config or tiny_config(), add_pooling_layer=False)).eval()
    return Features(model, options.pop("layers", [2]), **options), open_images(photos, model.config, views)


def pixels_of(images: ImageViews, view=0) -> torch.Tensor:
    return images.fetch(view, torch.arange(len(images)))


@pytest.mark.parametrize("final_norm", [True, False])
def test_features_are_those_of_the_model(photos, final_norm):
    features, images = make(photos, layers=[1, 2], attention=True, apply_final_norm=final_norm)
    model, pixels = features.model, pixels_of(images)
    found, whole = features(pixels), model(pixels, output_hidden_states=True, output_attentions=True)
    assert set(found) == {"tokens/1", "tokens/2", "attention/1", "attention/2"}
    for layer in (1, 2):
        tokens = whole.hidden_states[layer]
        tokens = model.encoder.final_norm(tokens) if final_norm else tokens
        torch.testing.assert_close(found[f"tokens/{layer}"], tokens, rtol=1e-5, atol=1e-5)
        row = whole.attentions[layer - 1][:, :, 0]
        torch.testing.assert_close(found[f"attention/{layer}"], row, rtol=1e-5, atol=1e-6)


def test_vectors_of_poolers_are_kept_without_the_tokens(photos):
    config = tiny_config(encoder="convnet", encoder_config=RESNET, image_size=32)
    choices = [PoolerChoice("mean", "mean", {}), PoolerChoice("most", "max", {})]
    features, images = make(photos, config=config, layers=[4], poolers=choices)
    found, tokens = features(pixels_of(images)), features.model(pixels_of(images)).last_hidden_state
    assert set(found) == {"mean/4", "most/4"}
    torch.testing.assert_close(found["mean/4"], tokens.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["most/4"], tokens.amax(1), rtol=1e-5, atol=1e-5)


def test_cached_and_uncached_features_are_the_same_in_every_view(photos, tmp_path):
    features, images = make(photos, views=3)
    plans = plan(features, images, 3, tmp_path / "cache", {"weights": weights_hash(features.model)}, "model")
    assert missing_bytes(plans) == 3 * 36 * 17 * 16 * 2
    seen = []
    fill(plans, features, images, advance=seen.append)
    cached, uncached = CachedSource(plans, "cpu"), UncachedSource(features, images, 3)
    chosen = torch.tensor([30, 2, 17])
    views = [cached.fetch(view, chosen)["tokens/2"] for view in range(4)]
    for view, tokens in enumerate(views):
        # bfloat16 has eight bits: half a unit in the last place.
        torch.testing.assert_close(tokens, uncached.fetch(view, chosen)["tokens/2"], rtol=2**-8, atol=1e-6)
    assert sum(seen) == 3 * 36 and missing_bytes(plans) == 0
    assert torch.equal(views[0], views[3]) and not torch.allclose(views[0], views[1], atol=0.1)


def test_what_was_encoded_before_an_interruption_is_not_encoded_again(photos, tmp_path, monkeypatch):
    features, images = make(photos)
    monkeypatch.setattr("hf_mim.training.evaluation.features.BATCH", 8)
    expected, done, encode = features(pixels_of(images))["tokens/2"].bfloat16(), [], features.__call__

    class Interrupted(Features):
        def __call__(self, pixel_values):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(len(pixel_values))
            return encode(pixel_values)

    def plans():
        return plan(features, images, 1, tmp_path / "cache", {}, "model")

    with pytest.raises(KeyboardInterrupt):
        fill(plans(), Interrupted(features.model, [2]), images)
    assert done == [8, 8, 8] and missing_bytes(plans()) == 12 * 17 * 16 * 2
    seen, again = [], plans()
    fill(again, features, images, advance=seen.append)
    assert sum(seen) == 12
    torch.testing.assert_close(again[0]["tokens/2"][torch.arange(36)], expected, rtol=2**-7, atol=1e-5)


def test_the_key_covers_weights_data_transforms_and_layer(photos, tmp_path):
    def key(views=1, view=0, model=None, **options):
        features, images = make(photos, views, **options)
        said = model or {"weights": weights_hash(features.model)}
        files = plan(features, images, views, tmp_path / "cache", said, "m")[view]
        return next(iter(files.values())).path.name

    one = key()
    assert key() == one and key(views=2) == one
    others = {key(seed=1), key(views=2, view=1), key(views=3, view=2), key(layers=[1]), key(apply_final_norm=False)}
    PIL.Image.new("RGB", (16, 16)).save(photos / "train" / "a" / "0.png")  # another picture in the same place
    others.add(key())
    assert len(others | {one}) == 7


def test_hashes_say_what_is_equal(photos):
    config = tiny_config()
    torch.manual_seed(0)
    one = MIMModel(config, add_pooling_layer=False)
    torch.manual_seed(0)
    assert weights_hash(MIMModel(config, add_pooling_layer=False)) == weights_hash(one)
    before = weights_hash(one)
    with torch.no_grad():
        one.encoder.final_norm.bias[3] += 1e-6
    assert weights_hash(one) != before
    whole = open_images(photos, config).whole
    assert data_hash(whole) == data_hash(open_images(photos, config).whole)


def test_a_broken_image_keeps_the_label_of_the_one_that_stands_for_it(photos, tmp_path):
    order = sorted(path for path in (photos / "train").rglob("*.png"))
    (photos / "train" / "a" / order[11].name).write_bytes(b"broken")  # the last of class a: one of b follows

    def labels(fetch: bool):
        features, images = make(photos, config=tiny_config())
        images.whole.images = None  # as where they do not fit into memory: found when they are fetched
        images.whole.bad.flags[:] = False
        plans = plan(features, images, 1, tmp_path / "cache", {}, "model")
        assert missing_bytes(plans) == 0 or fetch
        fill(plans, features, images)
        return images.labels

    first = labels(fetch=True)
    assert first[11] == 1 and torch.equal(labels(fetch=False), first)  # read from the record: nothing is decoded


def test_layers_are_counted_from_either_end_and_checked():
    vit = MIMModel(tiny_config(), add_pooling_layer=False).encoder
    assert choose_layers(vit, [-1]) == [2] and choose_layers(vit, [0, 2, -1, -3]) == [0, 2]
    with pytest.raises(ValueError, match="there is no layer 3; choose from -3 to 2"):
        choose_layers(vit, [3])
    with pytest.raises(ValueError, match="layer 0, the embedding, has no attention"):
        choose_layers(vit, [0], attention=True)
    native = MIMModel(tiny_config(encoder="native", encoder_config=NATIVE_VIT), add_pooling_layer=False).encoder
    assert choose_layers(native, [-2]) == [1]
    resnet = tiny_config(encoder="convnet", encoder_config=RESNET, image_size=32)
    with pytest.raises(ValueError, match=r"probe.layers must be \[-1\]"):
        choose_layers(MIMModel(resnet, add_pooling_layer=False).encoder, [-1, -2])
