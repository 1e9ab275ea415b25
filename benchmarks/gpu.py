"""Training steps on a GPU: images per second, share of the peak, memory, and where the loader becomes the limit.

    python benchmarks/gpu.py --out docs/benchmarks.md              # nine minutes on one large GPU
    python benchmarks/gpu.py --device cpu --tiny                   # that it runs

In bf16, compiled, with the recipes' models at 224 px: MAE ViT-B/16 and ViT-L/16 with both decoders against
`ViTMAEForPreTraining` of transformers with the same sizes, compiled and as it is; DTM ViT-B with a teacher of the same
size and random weights; A2MIM ResNet-50. A step is forward, loss, backward and fused AdamW on images that are on the
device. Arms take turns of `--steps` steps, timed by CUDA events (by the clock, uncompiled, on a processor). The share
of morphing is that of its loss alone, forward and backward, run by itself. MFU counts the FLOPs of
`training.trainer.throughput`. Memory is what a step holds at most beyond what it found, with the arm's own weights and
optimizer.

The rows of steps need torch, torchvision, timm, transformers and PyYAML alone; the loader's needs `datasets`, and is
left out where that is missing. Each row is kept in `--state` as soon as it is done: stopped, or out of `--minutes`, the
command goes on where it was.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from measure import markdown_table, paired_ratios, parser, quartiles, row, spread, tensor_memory, verdicts, write_whole
from peers import Arm, Batch, make_batch, make_transformers
from summary import publish

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.training.recipe import merge, resolve
from hf_mim.training.trainer.throughput import flops_per_image, peak_flops


OURS, CROSS, PEER, EAGER = "hf_mim", "hf_mim, cross_attention", "transformers", "transformers, not compiled"
MORPHING = "morphing alone"
MAE_BASE, MAE_LARGE, DTM, RESNET, LOADER = "MAE ViT-B/16", "MAE ViT-L/16", "DTM ViT-B/16", "A2MIM ResNet-50", "loader"
# row -> recipe, what is changed in its model, images in a batch
ROWS = {
    MAE_BASE: ("mae", {}, 256),
    MAE_LARGE: ("mae", {"encoder_config": {"size": "large"}}, 128),
    DTM: ("dtm", {}, 128),
    RESNET: ("a2mim_resnet50", {}, 256),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_VIT = {"image_size": 32, "encoder_config": {**SMALL, "patch_size": 8, "intermediate_size": 64}}
TINY = {
    MAE_BASE: {**TINY_VIT, "decoder_config": SMALL},
    MAE_LARGE: {**TINY_VIT, "decoder_config": SMALL},
    DTM: TINY_VIT,
    RESNET: {
        "image_size": 64,
        "encoder_config": {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    },
}
GOALS = {MAE_BASE: (1.3, 0.40), MAE_LARGE: (None, 0.45)}  # of issue 8: images per second over transformers', MFU


# ---- models --------------------------------------------------------------------------------------------------------
def config_of(name: str, args, folder: Path) -> MIMConfig:
    recipe, changes, _ = ROWS[name]
    fields = merge(resolve(recipe)["model"], changes)
    if args.tiny:
        fields = merge(fields, TINY[name])
        fields["encoder_config"].pop("size", None)
    if name == DTM:
        sizes = {key: value for key, value in fields["encoder_config"].items() if key in (*SMALL, "patch_size", "size")}
        teacher = MIMConfig(image_size=fields["image_size"], encoder_config=sizes)
        model = MIMModel(teacher, add_pooling_layer=False)
        model.save_pretrained(folder / "teacher")
        dims = [model.encoder.hidden_size]  # so that a model without memory can be asked for its sizes
        fields["target_config"]["features"] |= {
            "teacher": str(folder / "teacher"),
            "feature_dims": dims,
            "project": False,  # the recipe's teacher is a CLIP; this one has no space of a text
        }
    return MIMConfig(**fields)


def make_ours(config: MIMConfig, batch: Batch) -> Arm:
    """As the trainer calls it: with a generator of the step."""
    model, seeds = MIMForPreTraining(config).train(), itertools.count()

    def loss():
        generator = torch.Generator().manual_seed(next(seeds))
        return model(batch.pixel_values, bool_masked_pos=batch.mask, generator=generator).loss

    return Arm(model, loss)


def make_arms(name: str, config: MIMConfig, batch: Batch, device: str) -> dict[str, Arm]:
    """The models of a row, on the device."""
    arms = {OURS: make_ours(config, batch)}
    if name in (MAE_BASE, MAE_LARGE):
        arms[CROSS] = make_ours(MIMConfig(**{**config.to_dict(), "decoder": "cross_attention"}), batch)
        arms[PEER], arms[EAGER] = (make_transformers(config, batch) for _ in range(2))
    for arm in arms.values():
        arm.model.to(device)
    return arms


def make_step(arm: Arm, device: str) -> tuple[Callable, Callable]:
    """-> a training step, and the bytes of weights and optimizer once it has run. Nothing waits for the device."""
    trained = [parameter for parameter in arm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = arm.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def held() -> int:
        state = (value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value))
        return sum(tensor.numel() * tensor.element_size() for tensor in (*arm.model.parameters(), *state))

    return step, held


def morphing_step(model, config: MIMConfig, batch: Batch, args) -> Callable:
    """The loss of a morphing target alone, forward and backward, on random features; not compiled."""
    grid = model.mask_grid(*batch.pixel_values.shape[2:])
    shape = (*batch.mask.shape, model.target.outputs["patches"])
    wanted = torch.randn(shape, device=args.device)
    predicted = torch.randn(shape, device=args.device, requires_grad=True)

    seeds = itertools.count()

    def step() -> None:
        generator = torch.Generator().manual_seed(next(seeds))
        model.target.loss({"patches": predicted}, {"patches": wanted}, batch.mask, grid, generator).backward()

    return step


# ---- measuring -----------------------------------------------------------------------------------------------------
def seconds_of(step: Callable, count: int, device: str) -> float:
    """Seconds of one of `count` steps in a row: between events on the GPU, else by the clock."""
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - started) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / count


def memory_of(step: Callable, held: Callable, device: str) -> float:
    """MiB that a step holds at most beyond what it found, with the bytes of `held`."""
    if device != "cuda":
        return tensor_memory(step) + held() / 2**20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + held()) / 2**20


def measure_row(name: str, args) -> dict:
    """{"batch", "images_per_second" (quartiles of each arm), "ratios", "mfu", "memory" (MiB), "gflops"}"""
    torch.manual_seed(0)
    count = 2 if args.tiny else ROWS[name][2]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, args, Path(folder))
        cpu = make_batch(config, count)
        batch = Batch(cpu.pixel_values.to(args.device), cpu.mask.to(args.device))
        arms = make_arms(name, config, batch, args.device)
        flops = {arm: flops_per_image(arms[arm].model) for arm in (OURS, CROSS) if arm in arms}
        for arm in arms:
            if args.device == "cuda" and arm != EAGER:
                arms[arm].model.compile()
        made = {arm: make_step(arms[arm], args.device) for arm in arms}
        steps = {arm: step for arm, (step, _) in made.items()}
        if name == DTM:
            steps[MORPHING] = morphing_step(arms[OURS].model, config, batch, args)
        times = alternate_blocks(steps, args)
    memory = {arm: memory_of(*made[arm], args.device) for arm in arms}
    peak = peak_flops(torch.cuda.get_device_name(), bf16=True) if args.device == "cuda" else None
    speeds = {arm: quartiles([count / second for second in times[arm]]) for arm in arms}
    flops |= {arm: flops[OURS] for arm in (PEER, EAGER) if arm in arms}  # the same architecture
    found = {"batch": count, "images_per_second": speeds, "memory": memory}
    found["gflops"] = {arm: flops[arm] / 1e9 for arm in flops}
    found["mfu"] = {arm: speeds[arm][1] * flops[arm] / peak for arm in arms} if peak else {}
    found["ratios"] = {f"{ours} / {peer}": paired_ratios(times, peer, ours) for ours, peer in pairs(arms)}
    if name == DTM:
        found["morphing"] = paired_ratios(times, MORPHING, OURS)
    return found


def pairs(arms: dict) -> list[tuple[str, str]]:
    return [(ours, peer) for ours in (OURS, CROSS) for peer in (PEER, EAGER) if ours in arms and peer in arms]


def alternate_blocks(steps: dict[str, Callable], args) -> dict[str, list[float]]:
    """Seconds of a step, `--rounds` blocks of each arm; the arms take turns, and each round begins with another."""
    names, seconds = list(steps), {name: [] for name in steps}
    for name in names:
        seconds_of(steps[name], 3, args.device)  # compiles, and warms up
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(seconds_of(steps[name], args.steps, args.device))
    return seconds


def measure_loader(args) -> dict:
    """{"workers": {count: images per second}}, of JPEGs of about 500x375 to uint8 crops of 224 px, by the clock.

    Raises:
        ModuleNotFoundError: a machine without `datasets`.
    """
    from input_pipeline import make_dataset, make_jpegs

    from hf_mim.training.data.arguments import DataArguments
    from hf_mim.training.data.batches import MIMCollator
    from hf_mim.training.data.images import MIMDataset

    config, batch = MIMConfig(image_size=32 if args.tiny else 224), 4 if args.tiny else 64
    files = make_jpegs(8 if args.tiny else 256)
    most = 1 if args.tiny else os.cpu_count()
    counts = sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})
    dataset = MIMDataset(make_dataset(files), config, DataArguments(crop_scale=[0.2, 1.0], memory_limit_mb=0))
    found = {}
    for workers in counts:
        order = [i % len(files) for i in range(batch * workers * (3 if args.tiny else 8))]
        loader = torch.utils.data.DataLoader(
            dataset,
            batch,
            sampler=order,
            num_workers=workers,
            collate_fn=MIMCollator(config, normalized=False),
            pin_memory=args.device == "cuda",
        )
        arrived = [time.perf_counter() for _ in loader]
        first = 2 * workers - 1  # batches that were made while the workers started
        found[workers] = batch * (len(arrived) - 1 - first) / (arrived[-1] - arrived[first])
    return {"workers": found}


# ---- report --------------------------------------------------------------------------------------------------------
def report(found: dict[str, dict], args) -> str:
    parts = [where(args)]
    for name in (name for name in ROWS if name in found):
        entry, lines = found[name], []
        for arm, speed in entry["images_per_second"].items():
            ratios = [entry["ratios"].get(f"{arm} / {peer}") for peer in (PEER, EAGER)]
            mfu = f"{entry['mfu'][arm]:.2f}" if entry["mfu"] else ""
            over = [spread(ratio) if ratio else "" for ratio in ratios]
            lines.append([arm, spread(speed, 0), *over, mfu, f"{entry['memory'][arm]:,.0f}"])
        header = ["", "images per second", "over transformers'", "over it uncompiled", "MFU", "memory, MiB"]
        parts.append(f"### {name}, batch {entry['batch']}\n\n{markdown_table(header, lines)}")
        if "morphing" in entry:
            parts.append(f"Morphing alone takes {spread([100 * value for value in entry['morphing']], 1)} % of a step.")
    if LOADER in found:
        parts.append(loader_words(found))
    return "\n\n".join([*parts, verdicts(rows_of(found))])


def loader_words(found: dict[str, dict]) -> str:
    """Images per second by workers, and how many workers each step needs."""
    speeds = {int(workers): speed for workers, speed in found[LOADER]["workers"].items()}
    most = max(speeds)
    lines = [[workers, f"{speed:,.0f}"] for workers, speed in speeds.items()]
    needs = []
    for name in (name for name in ROWS if name in found):
        speed = found[name]["images_per_second"][OURS][1]
        enough = next((workers for workers, limit in speeds.items() if limit >= speed), None)
        words = f"{enough} workers keep up" if enough else f"{most} do not keep up: the loader is the limit"
        needs.append(f"{name} takes {speed:,.0f}: {words}.")
    table = markdown_table(["workers", "images per second from JPEG"], lines)
    return (
        f"### Loader\n\n{table}\n\n{' '.join(needs)} Beyond {max(speeds.values()):,.0f} the loader is the limit here."
    )


def rows_of(found: dict[str, dict]) -> list[dict]:
    rows = []
    for name, (goal, wanted) in GOALS.items():
        if name not in found:
            continue
        speeds, ratios = found[name]["images_per_second"], found[name]["ratios"]
        for ours in (OURS, CROSS):
            what, ratio = f"{name} on a GPU, {ours}: images per second over transformers'", ratios[f"{ours} / {PEER}"]
            wanted_ratio = goal if ours == OURS else None
            rows.append(row(what, speeds[ours][1], speeds[PEER][1], ratio, wanted_ratio, unit="images/s"))
        if found[name]["mfu"]:
            mfu = found[name]["mfu"]
            rows.append(row(f"{name} on a GPU: MFU", mfu[OURS], mfu[PEER], None, wanted))
    return rows


def where(args) -> str:
    device = torch.cuda.get_device_name() if args.device == "cuda" else "a processor, to see that it runs"
    return f"{device}; torch {torch.__version__}, transformers {transformers.__version__}."


# ---- the command ---------------------------------------------------------------------------------------------------
def arguments(argv: list[str] | None) -> argparse.Namespace:
    numbers = {
        "steps": (10, "in a row, of one arm"),
        "rounds": (5, "of blocks of steps"),
        "minutes": (9.0, "after which no new row is begun"),
    }
    options = parser(__doc__, **numbers)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--tiny", action="store_true", help="small models, two images: to see that it runs")
    options.add_argument("--only", nargs="+", choices=[*ROWS, LOADER], help="only these rows")
    options.add_argument("--state", type=Path, default=Path("outputs/gpu"), help="where rows are kept")
    options.add_argument("--again", action="store_true", help="measure rows again that are done")
    args = options.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU with CUDA, and torch finds none on this machine")
    return args


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args, started, found = arguments(argv), time.monotonic(), {}
    args.state.mkdir(parents=True, exist_ok=True)
    for name in args.only or [*ROWS, LOADER]:
        file = args.state / f"{name.replace(' ', '-').replace('/', '-')}{'-tiny' * args.tiny}.json"
        kept = json.loads(file.read_text()) if file.exists() and not args.again else {}
        if kept.get("where") == where(args):
            found[name] = kept["found"]
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print(f"out of time before {name}: the same command goes on from there", file=sys.stderr)
            break
        try:
            measured = measure_loader(args) if name == LOADER else measure_row(name, args)
        except ModuleNotFoundError as missing:
            if name != LOADER:
                raise
            print(f"{name}: left out, this machine has no {missing.name}", file=sys.stderr)
            continue
        write_whole(file, json.dumps({"where": where(args), "found": measured}, indent=1) + "\n")
        found[name] = json.loads(file.read_text())["found"]
        print(f"{name}: {time.monotonic() - started:.0f} s so far", file=sys.stderr, flush=True)
        forget()
    publish(args.out, "gpu", report(found, args), rows_of(found), where(args))
    return found


def forget() -> None:
    """Gives back what a row's models held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
