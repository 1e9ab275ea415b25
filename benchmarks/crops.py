"""Crops and flips by the loader against the same batched on the device (`data.crop_on_device`).

    python benchmarks/crops.py [--device cuda] --out docs/benchmarks.md

Batches of images of one size, held in memory. The loader's path is timed on one core, the device's with the transfer of
the whole images and with waiting for the result: by the clock on a GPU, by the processor's time on a processor.
"""

import time

import numpy as np
import torch
from measure import alternate, machine, markdown_table, parser, quartiles, spread, write_section

from hf_mim.training.data.transforms import UNIFORMS, crop_and_flip, crop_batch, crop_boxes, flip_batch


SHAPES = ((1, 28), (3, 32), (3, 64), (3, 96), (3, 224))  # channels, side


def arms(channels: int, side: int, batch: int, device: torch.device) -> dict:
    """What is timed, for one batch."""
    images = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)
    uniforms = np.random.default_rng(0).random((batch, UNIFORMS))
    boxes = crop_boxes(uniforms, np.tile((side, side), (batch, 1)), (side, side), [0.2, 1.0])
    flips = uniforms[:, -1:] < 0.5
    crops = torch.from_numpy(np.hstack([boxes, flips]))

    def on_device():
        crop_and_flip(images.to(device), crops.to(device), (side, side))
        if device.type != "cpu":
            torch.accelerator.synchronize()

    return {
        "loader": lambda: flip_batch(crop_batch(images.clone(), boxes, (side, side)), flips[:, 0]),
        "device": on_device,
    }


def main(words: list[str] | None = None) -> list[list]:
    made = parser(__doc__, batch=64, rounds=15)
    made.add_argument("--device", default="cpu", type=torch.device)
    args, rows = made.parse_args(words), []
    torch.set_num_threads(1)
    clock = time.process_time if args.device.type == "cpu" else time.perf_counter
    for channels, side in SHAPES:
        seconds = alternate(arms(channels, side, args.batch, args.device), args.rounds, clock=clock)
        each = {name: [1e6 * value / args.batch for value in values] for name, values in seconds.items()}
        ratio = quartiles(np.divide(each["loader"], each["device"]))
        rows.append([f"{side}x{side}x{channels}", *(spread(quartiles(v), 0) for v in each.values()), spread(ratio)])
    header = ["images", "loader, us an image", f"device ({args.device.type}), us an image", "loader's time over it"]
    table = markdown_table(header, rows)
    print(table)
    if args.out:
        write_section(args.out, "crops", f"{machine()} Batches of {args.batch}, {args.rounds} rounds.\n\n{table}")
    return rows


if __name__ == "__main__":
    main()
