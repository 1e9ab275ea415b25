"""Data: every form that images come in, randomness that depends on nothing but (seed, epoch, index), and pixels."""

import io
import itertools

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.training.data import transforms
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.decoding import decode
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.processors import processor_for
from hf_mim.training.data.sample import look_at
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import choose_splits
from hf_mim.training.data.streaming import StreamedImages


def picture(seed: int, size=(20, 24), mode="RGB") -> PIL.Image.Image:
    """A smooth random image: antialiased resampling of white noise would test only rounding."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize(size[::-1], PIL.Image.Resampling.BICUBIC).convert(mode)


def config(size=16, channels=3, **options) -> MIMConfig:
    encoder = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return MIMConfig(image_size=size, num_channels=channels, encoder_config=encoder, **options)


def rows(count=12, sizes=((20, 24),), mode="RGB", labels=True) -> datasets.Dataset:
    columns = {"image": [picture(i, sizes[i % len(sizes)], mode) for i in range(count)]}
    features = {"image": datasets.Image()}
    if labels:
        columns["label"], features["label"] = [i % 3 for i in range(count)], datasets.ClassLabel(num_classes=3)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def folder(root, names, mode="RGB"):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i, mode=mode).save(root / name)
    return str(root)


# ---- where images come from ----------------------------------------------------------------------------------------
def test_the_shipped_data_is_the_default_and_grey_is_repeated():
    splits = load_splits(DataArguments(max_train_images=50), config(16, 1))
    assert len(splits.train) == 50 and len(splits.test) == 3000 and splits.note == "split test"
    assert splits.test.labels.bincount().tolist() == [300] * 10
    three = MIMDataset(open_dataset(DataArguments())["test"].select([0]), config(16, 3), DataArguments(), False)
    image = three[0].images[0]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_a_folder_with_train_and_test_of_class_folders(tmp_path):
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "val") for kind in ("cat", "dog") for i in range(3)]
    splits = load_splits(DataArguments(dataset=folder(tmp_path, names)), config())
    assert (len(splits.train), len(splits.test), splits.note) == (6, 6, "split val")
    assert splits.train.classes == ["cat", "dog"]
    assert splits.train.labels.tolist() == splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_class_folders_without_splits_hold_out_a_tenth(tmp_path):
    # `train` is a class here, since there are other folders beside it.
    names = [f"{kind}/{i:02}.jpg" for kind in ("bus", "train") for i in range(20)]
    splits = load_splits(DataArguments(dataset=folder(tmp_path, names)), config())
    assert (len(splits.train), len(splits.test)) == (36, 4)
    assert splits.train.classes == ["bus", "train"]
    paths = [{file["path"] for file in dataset.files[:]["image"]} for dataset in (splits.train, splits.test)]
    assert not paths[0] & paths[1]


def test_nested_images_without_classes_are_unlabelled(tmp_path):
    splits = load_splits(DataArguments(dataset=folder(tmp_path, ["a.png", "b/c.JPG", "b/d/e.webp"])), config())
    assert len(splits.train) == 3 and splits.test is None and splits.note == "no labels"
    assert splits.train[1].images.shape == (1, 3, 16, 16)


def test_parquet_files_become_splits_by_name(tmp_path):
    (tmp_path / "data").mkdir()
    rows(10).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    rows(10).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    rows(4).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    splits = load_splits(DataArguments(dataset=str(tmp_path)), config())
    assert (len(splits.train), len(splits.test)) == (20, 4)
    one = load_splits(DataArguments(dataset=str(tmp_path / "data" / "test-00000-of-00001.parquet")), config())
    assert len(one.train) == 4


def test_columns_are_found_or_named():
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {
        "id": datasets.Value("string"),
        "photo": plain,
        "kind": datasets.ClassLabel(names=["a"]),
        "sharpness": datasets.Value("float32"),
    }
    assert find_columns(features, DataArguments()) == ("photo", "kind")
    assert find_columns(features, DataArguments(label_column="id")) == ("photo", "id")
    with pytest.raises(ValueError, match="did you mean 'photo'"):
        find_columns(features, DataArguments(image_column="photos"))
    with pytest.raises(ValueError, match=r"no column holds images; the columns are id"):
        find_columns({"id": datasets.Value("string")}, DataArguments())


def test_text_labels_mean_the_same_in_every_split(tmp_path):
    def table(labels):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        columns = {"image": [picture(i) for i in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    table(["b", "c", "a"]).to_parquet(tmp_path / "train.parquet")
    table(["c", "b"]).to_parquet(tmp_path / "test.parquet")
    splits = load_splits(DataArguments(dataset=str(tmp_path)), config())
    assert splits.train.labels.tolist() == [1, 2, 0] and splits.test.labels.tolist() == [2, 1]


def test_what_is_not_there_is_said_clearly(tmp_path):
    with pytest.raises(ValueError, match="no file or folder ./nowhere"):
        load_splits(DataArguments(dataset="./nowhere"), config())
    with pytest.raises(ValueError, match="no folder .nobody/nothing. here|not found, locally or on"):
        load_splits(DataArguments(dataset="nobody/nothing"), config())
    with pytest.raises(ValueError, match="there are no images in"):
        load_splits(DataArguments(dataset=str(tmp_path)), config())
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="not a parquet, arrow or tar file"):
        load_splits(DataArguments(dataset=str(tmp_path / "notes.txt")), config())
    datasets.Dataset.from_dict({"text": ["no image"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column holds images; the columns are text"):
        load_splits(DataArguments(dataset=str(tmp_path)), config())
    (tmp_path / "train.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="cannot read .*train.parquet as parquet"):
        load_splits(DataArguments(dataset=str(tmp_path)), config())


def test_splits_are_named_or_found():
    some = dict.fromkeys(("train", "validation", "extra"))
    assert choose_splits(some, DataArguments()) == ("train", "validation")
    assert choose_splits(some, DataArguments(split="extra", eval_split="train")) == ("extra", "train")
    with pytest.raises(ValueError, match=r"unknown data.split 'trian': did you mean 'train'"):
        choose_splits(some, DataArguments(split="trian"))
    with pytest.raises(ValueError, match="which split"):
        choose_splits(dict.fromkeys(("a", "b")), DataArguments())


# ---- pixels --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_common_modes_become_grey_or_rgb(mode, channels):
    image = picture(0, mode="L" if mode == "LA" else mode).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    wanted = image.convert("RGB" if channels == 3 else "L") if mode != "CMYK" else image.convert("RGB").convert("L")
    if mode == "CMYK" and channels == 3:
        wanted = image.convert("RGB")
    pixels = decode({"bytes": buffer.getvalue(), "path": None}, channels)
    assert pixels.shape == (channels, 20, 24) and pixels.dtype == np.uint8
    expected = np.asarray(wanted).reshape(20, 24, channels).transpose(2, 0, 1)
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # P and RGBA reach grey through RGB


def test_channels_that_do_not_fit_name_both_numbers():
    with pytest.raises(ValueError, match="3 channels, but the model is configured for num_channels=5"):
        MIMDataset(rows(2), config(16, 5), DataArguments())
    assert MIMDataset(rows(2, mode="L"), config(16, 5), DataArguments()).images.shape[1] == 5


def test_a_photo_taken_sideways_is_turned(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "a.jpg", exif=exif)
    assert decode(str(tmp_path / "a.jpg"), 3).shape == (3, 24, 20)


def test_what_cannot_be_decoded_is_named():
    with pytest.raises(ValueError, match=r"broken\.png is not a recognised image file"):
        decode({"bytes": b"no image", "path": "broken.png"}, 3)
    with pytest.raises(ValueError, match=r"holds float32 from 0.0 to 2.0; say in data.value_range"):
        decode(PIL.Image.fromarray(np.float32([[0, 2]])), 1)


@pytest.mark.parametrize(("size", "channels"), [(16, 3), ((24, 16), 3), (16, 1), (64, 3)])
def test_evaluation_sees_what_the_saved_processor_gives(size, channels):
    cfg = config(size, channels)
    images = [picture(i, (20 + i, 24), "RGB" if channels == 3 else "L") for i in range(4)]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    seen = MIMCollator(cfg)(MIMDataset(table, cfg, DataArguments(), train=False).__getitems__(range(4)))["pixel_values"]
    sample, _ = look_at(table, cfg, DataArguments())
    given = processor_for(cfg, sample)(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, given, rtol=0, atol=1e-6)


def test_images_in_memory_and_decoded_each_time_are_the_same():
    data = DataArguments(crop_scale=[0.2, 1.0])
    memory, disk = (
        MIMDataset(rows(), config(), DataArguments(crop_scale=[0.2, 1.0], memory_limit_mb=mb)) for mb in (64, 0)
    )
    assert memory.images is not None and disk.images is None
    a, b = (dataset.__getitems__([3, 1, 2])[0].images for dataset in (memory, disk))
    assert (a.int() - b.int()).abs().max() <= 1
    assert MIMDataset(rows(sizes=((20, 24), (24, 20))), config(), data).images is None


@pytest.mark.parametrize("size", [(28, 28), (13, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_of_a_batch_are_those_of_pillow_and_torchvision(size, interpolation):
    pictures = [picture(i, (28, 33)) for i in range(40)]
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures])
    uniforms = np.random.default_rng(0).random((40, transforms.UNIFORMS))
    boxes = transforms.crop_boxes(uniforms, np.tile((28, 33), (40, 1)), size, [0.05, 1.0])
    batch = transforms.crop_batch(images, boxes, size, interpolation)
    pairs = zip(images, boxes, strict=True)
    single = torch.stack([transforms.resize(image, size, box, interpolation) for image, box in pairs])
    # torchvision's weights have 8 bits, so that it may be off by one level in each of its two passes.
    assert (batch.int() - single.int()).abs().max() <= 2
    for image, (top, left, height, width), ours in zip(pictures, boxes.tolist(), batch, strict=True):
        crop = image.crop((left, top, left + width, top + height))
        pillow = np.asarray(crop.resize(size[::-1], PIL.Image.Resampling[interpolation.upper()])).transpose(2, 0, 1)
        # Bilinear weights make exact halves, which either program may round up or down in each pass.
        levels = 1 if interpolation == "bicubic" else 2
        assert np.abs(pillow.astype(int) - ours.int().numpy()).max() <= levels


def test_crop_boxes_are_distributed_like_torchvisions():
    height, width, count = 40, 60, 4000
    uniforms = np.random.default_rng(1).random((count, transforms.UNIFORMS))
    ours = transforms.crop_boxes(uniforms, np.tile((height, width), (count, 1)), (16, 16), [0.2, 1.0])
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    torch.manual_seed(0)
    theirs_of = RandomResizedCrop(16, scale=(0.2, 1.0), ratio=transforms.CROP_RATIO)
    image = torch.zeros(3, height, width)
    theirs = np.array([list(theirs_of.make_params([image]).values())[:4] for _ in range(count)])
    for column in range(4):  # top, left, height, width: means and spreads within sampling error
        a, b = ours[:, column].astype(float), theirs[:, column].astype(float)
        assert abs(a.mean() - b.mean()) < 5 * a.std() * (2 / count) ** 0.5
        assert abs(a.std() - b.std()) < 0.05 * a.std() + 0.1


def test_a_crop_that_never_fits_is_the_largest_centred_one():
    uniforms = np.full((1, transforms.UNIFORMS), 0.999)
    box = transforms.crop_boxes(uniforms, np.array([[10, 100]]), (16, 16), [1.0, 1.0])[0]
    assert box.tolist() == [0, (100 - 13) // 2, 10, 13]


# ---- randomness ----------------------------------------------------------------------------------------------------
def batches(dataset, order, **options):
    loader = torch.utils.data.DataLoader(dataset, sampler=order, collate_fn=MIMCollator(config(), (2, 2)), **options)
    found = [(batch["pixel_values"], batch["bool_masked_pos"]) for batch in loader]
    return {i: (x, m) for i, x, m in zip(order, *(torch.cat(c) for c in zip(*found, strict=True)), strict=True)}


def test_the_collator_is_what_makes_masks():
    batch = MIMCollator(config())(MIMDataset(rows(2), config(), DataArguments()).__getitems__([0, 1]))
    assert list(batch) == ["pixel_values"] and batch["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("limit", [64, 0])
def test_a_sample_depends_on_seed_epoch_and_index_alone(limit):
    def make(seed):
        return MIMDataset(rows(), config(), DataArguments(crop_scale=[0.2, 1.0], memory_limit_mb=limit), seed=seed)

    first = batches(make(5), range(12), batch_size=4)
    again = batches(make(5), [7, 3, 11, 0], batch_size=3, num_workers=2)
    for i, (pixels, mask) in again.items():
        assert torch.equal(pixels, first[i][0]) and torch.equal(mask, first[i][1])
    other = batches(make(6), range(12), batch_size=4)
    assert sum(not torch.equal(other[i][0], first[i][0]) for i in range(12)) > 10


def test_masks_do_not_depend_on_whether_images_are_cropped():
    cropped = MIMDataset(rows(), config(), DataArguments(crop_scale=[0.2, 1.0]))
    whole = MIMDataset(rows(), config(), DataArguments(horizontal_flip=False))
    masks = [MIMCollator(config(), (2, 2))(d.__getitems__(range(12)))["bool_masked_pos"] for d in (cropped, whole)]
    assert torch.equal(*masks) and len({tuple(mask.tolist()) for mask in masks[0]}) > 1


def test_the_epoch_reaches_workers_that_are_kept():
    dataset = MIMDataset(rows(), config(), DataArguments(crop_scale=[0.2, 1.0]), seed=1)
    options = {"batch_size": 6, "collate_fn": MIMCollator(config(), (2, 2))}
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, persistent_workers=True, **options)
    before = None
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        kept = torch.cat([batch["pixel_values"] for batch in loader])
        single = MIMDataset(rows(), config(), DataArguments(crop_scale=[0.2, 1.0]), seed=1)
        single.set_epoch(epoch)
        here = torch.cat([batch["pixel_values"] for batch in torch.utils.data.DataLoader(single, **options)])
        assert torch.equal(kept, here)
        assert before is None or not torch.equal(here, before)
        before = here


def test_half_of_the_images_are_mirrored():
    table = datasets.Dataset.from_dict({"image": [picture(0)] * 200}).cast_column("image", datasets.Image())
    whole = MIMDataset(table, config(), DataArguments(), train=False)[0].images[0]
    images = MIMDataset(table, config(), DataArguments()).__getitems__(range(200))[0].images
    same = sum(torch.equal(image, whole) for image in images)
    mirrored = sum(torch.equal(image, whole.flip(-1)) for image in images)
    assert same + mirrored == 200 and 70 < mirrored < 130


def test_a_stream_gives_what_the_data_set_gives():
    data = DataArguments(crop_scale=[0.2, 1.0], shuffle_buffer=0)
    stream = StreamedImages(rows().to_iterable_dataset(), config(), data, seed=3)
    dataset = MIMDataset(rows(), config(), data, seed=3)
    collate = MIMCollator(config(), (2, 2))
    streamed, fetched = collate(list(itertools.islice(stream, 12))), collate(dataset.__getitems__(range(12)))
    assert torch.equal(streamed["bool_masked_pos"], fetched["bool_masked_pos"])
    assert (streamed["pixel_values"] - fetched["pixel_values"]).abs().max() < 1.1 / 255 / min(config().image_std)


def test_the_collator_masks_finished_pixel_values_too():
    torch.manual_seed(0)
    features = [{"pixel_values": torch.full((3, 16, 16), float(i))} for i in range(6)]
    batch = MIMCollator(config(masking_config={"ratio": 0.5}), (2, 2))(features)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch["bool_masked_pos"].sum(1).tolist() == [2] * 6


@pytest.mark.parametrize("shape, size, levels", [((44, 48), 24, 0), ((90, 100), (72, 80), 2)])
def test_crops_on_the_device_are_those_of_the_loader(shape, size, levels):
    """Above `SMALL` the loader resamples by torchvision, whose weights have 8 bits: see the test of Pillow's crops."""
    many = rows(8, sizes=(shape,))
    options, batches = {"crop_scale": [0.2, 1.0], "memory_limit_mb": 64}, []
    for on_device in (False, True):
        dataset = MIMDataset(many, config(size), DataArguments(crop_on_device=on_device, **options), seed=3)
        dataset.set_epoch(2)
        raw = MIMCollator(config(size), normalized=False)(dataset.__getitems__(list(range(8))))
        assert ("crops" in raw) == on_device
        batches.append((raw, MIMCollator(config(size))(dataset.__getitems__(list(range(8))))))
    (loader, finished), (whole, same) = batches
    assert whole["pixel_values"].shape[-2:] == shape and 0 < whole["crops"][:, 4].sum() < 8
    cropped = transforms.crop_and_flip(whole["pixel_values"], whole["crops"], pair(size))
    difference = (cropped.int() - loader["pixel_values"].int()).abs()
    assert difference.max() <= levels and difference.float().mean() < 0.1
    one_level = 1 / (255 * min(config().image_std))
    assert (finished["pixel_values"] - same["pixel_values"]).abs().max() <= (levels + 0.01) * one_level
    assert finished.keys() == same.keys()


def test_crops_on_the_device_need_images_of_one_size():
    with pytest.raises(ValueError, match="data.crop_on_device needs images of one size"):
        MIMDataset(rows(sizes=((20, 24), (24, 20))), config(), DataArguments(crop_on_device=True, crop_scale=[0.2, 1]))
    with pytest.raises(ValueError, match="leave out data.streaming"):
        DataArguments(crop_on_device=True, streaming=True)
