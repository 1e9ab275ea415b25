"""Whole pretraining runs, from JPEG files to weights: `hf-mim pretrain mae` against transformers' `Trainer`.

    python benchmarks/pretraining_run.py --out docs/benchmarks.md

The peer is what transformers' run_mae.py does: `ViTMAEForPreTraining`, `Trainer`, and the PIL transforms of
`input_pipeline.py` on an image folder of `datasets`. Model (ViT-Ti/16 at 224 px, decoder 512x8), batch, crops, flips,
optimizer and precision are the same, and so are the images: 2,000 JPEGs of about 500x375 made here. Each run is a
process of its own with the machine to itself, started as people start it; arms take turns. Images per second are
counted from the end of the first step to the end of the last.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from input_pipeline import make_jpegs
from measure import machine, markdown_table, parser, quartiles, row, spread, verdicts
from summary import publish


PEER, OURS, CROSS = "transformers", "hf-mim pretrain mae", "hf-mim pretrain mae, cross_attention"
SIZES = {
    "tiny": {
        "what": "ViT-Ti/16 at 224 px, decoder 512x8",
        "image_size": 224,
        "patch_size": 16,
        "encoder": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
        "decoder": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16},
    },
    "test": {
        "what": "32 px, for the tests",
        "image_size": 32,
        "patch_size": 8,
        "encoder": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "decoder": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
}


def make_folder(folder: Path, count: int) -> None:
    """JPEG files; a few are made, and each is written many times over: what they show does not matter to the speed."""
    made = make_jpegs(min(count, 200))
    for i in range(count):
        (folder / f"{i:05d}.jpg").write_bytes(made[i % len(made)])


def run_ours(args, decoder: str) -> float:
    """The command line, as a process of its own. -> images per second"""
    size = SIZES[args.size]
    options = {
        "model.image_size": size["image_size"],
        "model.encoder_config": {**size["encoder"], "patch_size": size["patch_size"], "mask_style": "drop"},
        "model.decoder": decoder,
        "model.decoder_config": size["decoder"],
        "data.dataset": args.folder,
        "data.memory_limit_mb": 0,
        "training.max_steps": args.steps,
        "training.per_device_train_batch_size": args.batch,
        "training.dataloader_num_workers": 0,
        "training.dataloader_persistent_workers": False,
        "training.bf16": args.bf16,
        "training.save_strategy": "no",
        "training.watch_every": 0,
        "training.output_dir": args.out_dir,
    }
    words = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    command = [sys.executable, "-m", "hf_mim", "pretrain", "mae", *words]
    subprocess.run(command, check=True, capture_output=True, cwd=args.out_dir)
    return json.loads((Path(args.out_dir) / "metrics.json").read_text())["images_per_second"]


def peer_options(size: dict) -> dict:
    """Of `ViTMAEConfig`, for a model of one of `SIZES`."""
    return {
        "image_size": size["image_size"],
        "patch_size": size["patch_size"],
        "mask_ratio": 0.75,
        "norm_pix_loss": True,
        "intermediate_size": 4 * size["encoder"]["hidden_size"],
        "decoder_intermediate_size": 4 * size["decoder"]["hidden_size"],
        **size["encoder"],
        **{f"decoder_{name}": value for name, value in size["decoder"].items()},
    }


def run_peer(args) -> float:
    """In this process, which does nothing else. -> images per second"""
    import datasets
    import torch
    from input_pipeline import pil_transforms
    from transformers import Trainer, TrainerCallback, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

    from hf_mim import MIMConfig

    size, ends = SIZES[args.size], []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **kwargs):
            ends.append(time.perf_counter())

    transform = pil_transforms(MIMConfig(image_size=size["image_size"]), (size["image_size"],) * 2)
    dataset = datasets.load_dataset("imagefolder", data_files={"train": f"{args.folder}/*.jpg"}, split="train")
    dataset.set_transform(lambda rows: {"pixel_values": [transform(image) for image in rows["image"]]})
    arguments = TrainingArguments(
        output_dir=args.out_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        remove_unused_columns=False,
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collate = lambda rows: {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}  # noqa: E731
    model = ViTMAEForPreTraining(ViTMAEConfig(**peer_options(size)))
    Trainer(model, arguments, train_dataset=dataset, data_collator=collate, callbacks=[Clock()]).train()
    return (len(ends) - 1) * args.batch / (ends[-1] - ends[0])


def run_arm(name: str, args) -> float:
    """One run of an arm in a fresh process and an empty folder."""
    with tempfile.TemporaryDirectory() as out_dir:
        args.out_dir = out_dir
        if name != PEER:
            return run_ours(args, "cross_attention" if name == CROSS else "transformer")
        command = [sys.executable, __file__, "--peer", json.dumps(vars(args))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.strip().splitlines()[-1])


def ratios_of(speeds: dict[str, list[float]]) -> dict[str, tuple]:
    return {name: quartiles(np.divide(speeds[name], speeds[PEER])) for name in (OURS, CROSS)}


def rows_of(speeds: dict[str, list[float]], args) -> list[dict]:
    """The goals are those for bf16."""
    middle, ratios = {name: quartiles(values)[1] for name, values in speeds.items()}, ratios_of(speeds)
    how = "bf16" if args.bf16 else "float32"
    return [
        row(
            f"whole run, {how}, {name}: images per second over {PEER}'",
            middle[name],
            middle[PEER],
            ratios[name],
            goal if args.bf16 else None,
            unit="images/s",
        )
        for name, goal in GOALS
    ]


def report(speeds: dict[str, list[float]], args) -> str:
    ratios = ratios_of(speeds)
    rows = [
        [name, spread(quartiles(values), 1), spread(ratios[name]) if name in ratios else ""]
        for name, values in speeds.items()
    ]
    return "\n".join(
        [
            f"{SIZES[args.size]['what']}, batches of {args.batch}, {args.steps} steps, "
            f"{'bf16' if args.bf16 else 'float32'}, {args.images:,} images, {args.rounds} rounds, "
            f"{os.cpu_count()} cores.\n",
            markdown_table(["", "images per second", "times transformers'"], rows) + "\n",
            verdicts(rows_of(speeds, args)),
        ]
    )


GOALS = ((OURS, 1.2), (CROSS, 1.6))


def main(argv: list[str] | None = None) -> dict:
    options = parser(__doc__, images=2000, batch=32, steps=16, rounds=3)
    options.add_argument("--size", choices=list(SIZES), default="tiny")
    options.add_argument("--float32", dest="bf16", action="store_false")
    options.add_argument("--peer", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.peer:
        print(run_peer(argparse.Namespace(**json.loads(args.peer))))
        return {}
    speeds = {name: [] for name in (OURS, CROSS, PEER)}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        make_folder(Path(folder), args.images)
        for _ in range(args.rounds):
            for name, values in speeds.items():
                values.append(run_arm(name, args))
                print(f"{name}: {values[-1]:.1f} images per second", file=sys.stderr, flush=True)
    where = re.sub(r" \d+ thread;", "", machine())
    publish(args.out, "pretraining_run", f"{where}\n\n{report(speeds, args)}", rows_of(speeds, args), where)
    return speeds


if __name__ == "__main__":
    main()
