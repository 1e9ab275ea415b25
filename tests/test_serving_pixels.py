"""What training decodes and what the saved image processor makes of the same file: the same within a level, for every
kind of file."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import tiny_config
from pixel_files import KINDS, levels, pillow, prepared, run_of
from transformers import AutoImageProcessor, ViTImageProcessor, pipeline
from transformers.image_utils import load_image

from hf_mim import MIMModel
from hf_mim.conversion.export import export
from hf_mim.modeling.image_processing_mim import MIMImageProcessor
from hf_mim.modeling.resizing import fit_whole, resized_shape
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.processors import processor_for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, (24, 16)])
def test_training_pixels_are_serving_pixels(kind, size, tmp_path):
    files, config, splits, processor = run_of(kind, tmp_path, size)
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__(range(len(files))))["pixel_values"]
    served = prepared(processor, files, config)
    level = 1 / (255 * torch.tensor(config.image_std)[:, None, None])
    assert trained.shape == served.shape and ((trained - served) / level).abs().max() <= 1.01


# ---- geometry ------------------------------------------------------------------------------------------------------
def test_the_whole_image_is_shrunk_and_cut_as_the_papers_do_it():
    assert resized_shape(300, 400, (224, 224), 0.875) == (256, 341)
    assert resized_shape(400, 300, (224, 224), 0.875) == (341, 256)
    assert resized_shape(100, 400, (96, 160), 1.0) == (96, 384) and resized_shape(400, 160, (96, 160), 1.0) == (
        400,
        160,
    )
    image = torch.from_numpy(levels(0, 3, size=(60, 80))).permute(2, 0, 1)
    pil = PIL.Image.fromarray(image.permute(1, 2, 0).numpy())
    shrunk = np.array(pil.resize((48, 36), PIL.Image.Resampling.BICUBIC))[2:34, 8:40]  # 32 / 36 of the shorter side
    ours = fit_whole(image, (32, 32), 32 / 36).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - shrunk).max() <= 1
    assert fit_whole(image, (60, 80), 0.5) is image
    squeezed = np.array(pil.resize((32, 32), PIL.Image.Resampling.BICUBIC))
    assert np.abs(fit_whole(image, (32, 32), "squeeze").permute(1, 2, 0).numpy().astype(int) - squeezed).max() <= 1
    assert torch.equal(fit_whole(image, (32, 32), "none"), fit_whole(image, (32, 32), 1.0))


@pytest.mark.parametrize("eval_crop", ["squeeze", "none", 0.8, None])
@pytest.mark.parametrize("size", [16, (12, 20)])
def test_a_processor_of_any_crop(eval_crop, size, tmp_path):
    files, config, splits, processor = run_of("colours", tmp_path, size, eval_crop=eval_crop)
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__(range(4)))["pixel_values"]
    served = prepared(processor, files, config)
    assert (trained - served).abs().max() <= 1.01 / 255 / min(config.image_std)
    assert isinstance(processor, MIMImageProcessor) == (size != 16 and eval_crop != "squeeze")


def test_sizes_that_vary_around_the_models(tmp_path):
    (tmp_path / "images").mkdir()
    for seed, size in enumerate([(16, 16), (20, 24), (16, 30)]):
        (tmp_path / "images" / f"{seed}.png").write_bytes(pillow(levels(seed, 3, size=size)))
    config = tiny_config(image_size=16)
    splits = load_splits(DataArguments(dataset=str(tmp_path / "images")), config)
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__(range(3)))["pixel_values"]
    images = [load_image(str(tmp_path / "images" / f"{seed}.png")) for seed in range(3)]
    served = processor_for(config, splits.sample)(images, return_tensors="pt")["pixel_values"]
    assert (trained - served).abs().max() <= 1.01 / 255 / min(config.image_std)


# ---- what a checkpoint is saved with -------------------------------------------------------------------------------
def test_sizes_that_the_sample_missed_count_when_the_processor_is_saved(tmp_path):
    """One image among many has the model's size, which a stock processor would resize and crop."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(60):
        (folder / f"{seed:02}.png").write_bytes(pillow(levels(seed, 3)))
    config, data = tiny_config(image_size=16), DataArguments(dataset=str(folder), memory_limit_mb=0)
    splits = load_splits(data, config)
    assert type(processor_for(config, splits.sample_seen())) is ViTImageProcessor
    looked = np.random.default_rng((0, 18)).permutation(60)[:48]
    missed = next(i for i in range(60) if i not in looked)
    (folder / f"{missed:02}.png").write_bytes(pillow(levels(0, 3, size=(16, 16))))
    splits = load_splits(data, config)
    assert type(processor_for(config, splits.sample_seen())) is ViTImageProcessor
    splits.train.__getitems__(range(60))  # an epoch
    processor = processor_for(config, splits.sample_seen())
    assert isinstance(processor, MIMImageProcessor)
    files = [folder / f"{i:02}.png" for i in (missed, 0)]
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__([missed, 0]))["pixel_values"]
    served = prepared(processor, files, config)
    assert (trained - served).abs().max() <= 1.01 / 255 / min(config.image_std)


def test_an_exported_encoder_keeps_the_processor_of_its_images(tmp_path):
    _, config, _, processor = run_of("10 bits", tmp_path)
    MIMModel(config).save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out", "transformers")
    kept = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(kept, MIMImageProcessor) and kept.value_range == processor.value_range is not None


def test_without_a_look_at_images_they_are_cropped_as_in_the_papers():
    processor = processor_for(tiny_config(image_size=224, encoder_config={"patch_size": 16}))
    assert type(processor) is ViTImageProcessor and processor.do_center_crop
    assert processor.size.shortest_edge == 256 and processor.crop_size.height == 224


def test_ordinary_checkpoints_have_a_stock_processor(tmp_path):
    *_, processor = run_of("jpeg", tmp_path)
    assert type(processor) is ViTImageProcessor and processor.do_center_crop
    assert processor.size.shortest_edge == 18 and processor.crop_size.height == 16


def test_ours_takes_arrays_and_images_too(tmp_path):
    files, _, _, processor = run_of("12 bits in a png", tmp_path)
    by_path = processor([str(file) for file in files], return_tensors="pt")["pixel_values"]
    images = processor([PIL.Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    arrays = processor([np.array(PIL.Image.open(file)) for file in files], return_tensors="pt")["pixel_values"]
    one = processor(files[0], return_tensors="pt")["pixel_values"]
    assert torch.equal(by_path, images) and torch.equal(by_path, arrays) and torch.equal(one, by_path[:1])


REMOTE = """
import sys
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith("hf_mim") for name in sys.modules)
print(processor(sys.argv[2], return_tensors="pt")["pixel_values"].double().sum().item())
"""


def test_ours_travels_as_code_and_works_in_a_pipeline(tmp_path):
    files, config, _, processor = run_of("16-bit png, three channels", tmp_path)
    MIMModel(config).save_pretrained(tmp_path / "model")
    expected = processor(str(files[0]), return_tensors="pt")["pixel_values"].double().sum().item()
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "model"), str(files[0])]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert float(out.stdout) == pytest.approx(expected, abs=1e-3)
    run = pipeline("image-feature-extraction", model=str(tmp_path / "model"))  # the plugin is imported: no trust asked
    assert isinstance(run.image_processor, MIMImageProcessor)
    assert torch.tensor(run(PIL.Image.fromarray(levels(0, 3)))).isfinite().all()
