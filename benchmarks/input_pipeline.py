"""From JPEG bytes to a normalised batch: ours against the PIL transforms of transformers' MAE example.

    python benchmarks/input_pipeline.py --out docs/benchmarks.md

Decode, random resized crop (bicubic, 20 to 100 percent of the area), flip, normalise, to batches of 224 px. The peer is
what examples/pytorch/image-pretraining/run_mae.py of transformers does, written again here: PIL to RGB, torchvision's
RandomResizedCrop on PIL, RandomHorizontalFlip, ToTensor, Normalize. Ours is what training runs: `MIMDataset` and
`MIMCollator`, which hand uint8 to the device, and there `normalize` into memory that is kept from batch to batch;
without and with `data.cache_decoded`. Single process, one thread, the processor is the device, and the arms take turns
batch by batch.
The images are smooth noise of about 500x375 made here; their files have about 50 kB, as photographs of this size do.
Before anything is timed, our pixels are compared with PIL's for the same crop boxes.
"""

import io
import itertools
import json
import tempfile

import datasets
import numpy as np
import PIL.Image
import torch
from measure import alternate, machine, markdown_table, paired_ratios, parser, quartiles, row, spread, verdicts
from summary import publish
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from hf_mim import MIMConfig
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator, normalize
from hf_mim.training.data.decoding import decode
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.transforms import UNIFORMS, crop_batch, crop_boxes, resize, sample_rng


SCALE = [0.2, 1.0]
SIZE = (224, 224)
# Both resample in two passes and round to uint8 after each, torch with weights of 16 bits and PIL of 22: a value that
# each pass rounds the other way comes out two levels off. That share of all values may.
ODD = 1e-5
PEER, OURS, CACHED = "PIL transforms", "hf_mim", "hf_mim, decoded cache"
# What no order of these steps can beat as long as torchvision decodes and torch resamples.
FLOOR = "decode and resample alone"


def make_jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Files of smooth random colours with a finer texture over them, 375 to 500 pixels a side."""
    rng, files = np.random.default_rng(seed), []
    for _ in range(count):
        width, height = int(rng.integers(480, 521)), int(rng.integers(360, 391))
        pixels = np.zeros((height, width, 3), np.float32)
        for coarseness, contrast in ((40, 60), (3, 18)):
            small = rng.normal(0, contrast, (height // coarseness, width // coarseness, 3)).astype(np.float32)
            layers = [
                PIL.Image.fromarray(layer).resize((width, height), PIL.Image.BICUBIC)
                for layer in small.transpose(2, 0, 1)
            ]
            pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
        buffer = io.BytesIO()
        PIL.Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return files


def make_dataset(files: list[bytes]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files]}, features=features)


def pil_transforms(config: MIMConfig, size: tuple[int, int] = SIZE) -> transforms.Compose:
    """As of transformers' run_mae.py."""
    return transforms.Compose(
        [
            transforms.Lambda(lambda image: image.convert("RGB") if image.mode != "RGB" else image),
            transforms.RandomResizedCrop(size, scale=SCALE, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=config.image_mean, std=config.image_std),
        ]
    )


def differences(files: list[bytes]) -> np.ndarray:
    """How many values differ by 0, 1, 2, ... levels of 255 between our pixels and PIL's, decoded and cropped by the
    same boxes: counts (256,)."""
    counts = np.zeros(256, np.int64)
    for i, file in enumerate(files):
        image = PIL.Image.open(io.BytesIO(file)).convert("RGB")
        uniforms = sample_rng(0, 0, i).random(UNIFORMS)[None]
        boxes = crop_boxes(uniforms, np.array([image.size[::-1]]), SIZE, SCALE)
        top, left, height, width = (int(value) for value in boxes[0])
        cropped = image.crop((left, top, left + width, top + height)).resize(SIZE[::-1], PIL.Image.BICUBIC)
        ours = crop_batch(torch.as_tensor(decode(file, 3))[None], boxes, SIZE)[0].permute(1, 2, 0).numpy()
        counts += np.bincount(np.abs(ours.astype(int) - np.asarray(cropped)).ravel(), minlength=256)
    return counts


def make_arms(files: list[bytes], batch: int, cache: str) -> dict:
    """Functions of nothing that make the next batch of `pixel_values`."""
    config, dataset = MIMConfig(image_size=SIZE[0]), make_dataset(files)
    options = {"crop_scale": SCALE, "memory_limit_mb": 0}
    peer, collate = pil_transforms(config), MIMCollator(config, normalized=False)
    kept = torch.empty(batch, 3, *SIZE)
    cached = MIMDataset(dataset, config, DataArguments(**options, cache_decoded=True, cache_dir=cache))

    def batches():  # a counter for each arm: all see the same batches in the same order
        return ([(start + i) % len(files) for i in range(batch)] for start in itertools.count(0, batch))

    def run(images):
        indices = batches()

        def step():
            uint8 = collate(images.__getitems__(next(indices)))["pixel_values"]
            return normalize(uint8, config.image_mean, config.image_std, out=kept)

        return step

    peer_indices = batches()

    def run_peer():
        rows = dataset[next(peer_indices)]["image"]
        return torch.stack([peer(PIL.Image.open(io.BytesIO(row["bytes"]))) for row in rows])

    floor_indices = batches()

    def run_floor():
        for i in next(floor_indices):
            image = torch.from_numpy(decode(files[i], 3))
            uniforms = np.full((1, UNIFORMS), 0.5)
            resize(image, SIZE, crop_boxes(uniforms, np.array([image.shape[1:]]), SIZE, SCALE)[0])

    uncached = MIMDataset(dataset, config, DataArguments(**options))
    return {PEER: run_peer, OURS: run(uncached), CACHED: run(cached), FLOOR: run_floor}


def measure(count: int, batch: int, rounds: int) -> dict:
    files = make_jpegs(count)
    counts = differences(files)
    if counts[3:].any() or counts[2] > ODD * counts.sum():
        raise RuntimeError(f"our pixels are not PIL's: {counts[:8].tolist()} values differ by 0, 1, ... levels")
    with tempfile.TemporaryDirectory() as cache:
        times = alternate(make_arms(files, batch, cache), rounds)
    return {
        "images": count,
        "kilobytes": float(np.mean([len(file) for file in files])) / 1000,
        "batch": batch,
        "rounds": rounds,
        "differences": counts[:3].tolist(),
        "images_per_second": {name: quartiles(batch / np.array(seconds)) for name, seconds in times.items()},
        "ratios": {name: paired_ratios(times, PEER, name) for name in (OURS, CACHED, FLOOR)},
    }


def report(result: dict) -> str:
    rows = [
        [name, spread(speed, 0), spread(result["ratios"][name]) if name in result["ratios"] else ""]
        for name, speed in result["images_per_second"].items()
    ]
    zero, one, two = result["differences"]
    return "\n".join(
        [
            f"{result['images']} images, {result['kilobytes']:.0f} kB each on average; batches of {result['batch']}, "
            f"{result['rounds']} rounds. Of {zero + one + two:,} values {zero:,} are PIL's, {one:,} are one level "
            f"off and {two:,} two.\n",
            markdown_table(["", "images per second and core", "times PIL's"], rows) + "\n",
            verdicts(rows_of(result)),
        ]
    )


def rows_of(result: dict) -> list[dict]:
    speeds, odd = result["images_per_second"], result["differences"][2]
    rows = [
        row(
            f"JPEG to batch, {name}: images per second over PIL's",
            speeds[name][1],
            speeds[PEER][1],
            result["ratios"][name],
            goal,
            unit="images/s",
        )
        for name, goal in ((OURS, 2.5), (CACHED, 7))
    ]
    return [*rows, row("JPEG to batch: values more than one level from PIL's", odd, None, None, 0, more=False)]


def main(argv: list[str] | None = None) -> dict:
    options = parser(__doc__, json=True, rounds=None)
    options.add_argument("--quick", action="store_true", help="few images and rounds, to see that it runs")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    count, batch, rounds = (6, 3, 2) if args.quick else (256, 32, 40)
    result = measure(count, batch, args.rounds or rounds)
    publish(args.out, "input_pipeline", f"{machine()}\n\n{report(result)}", rows_of(result))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return result


if __name__ == "__main__":
    main()
