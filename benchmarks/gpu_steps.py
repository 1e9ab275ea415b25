"""The training steps of benchmarks/gpu.py: models, what a step is, and how long it takes.

Needs torch, torchvision, timm, transformers and PyYAML alone.
"""

import itertools
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measure import paired_ratios, quartiles, tensor_memory
from peers import Arm, Batch, make_batch, make_transformers
from torch._dynamo.utils import counters

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.training.recipe import merge, resolve
from hf_mim.training.trainer.throughput import flops_per_image, peak_flops


OURS, CROSS, PEER, EAGER = "hf_mim", "hf_mim, cross_attention", "transformers", "transformers, not compiled"
MORPHING = "morphing alone"
STORED = "hf_mim, features of the teacher stored"
MAE_BASE, MAE_LARGE, DTM, RESNET = "MAE ViT-B/16", "MAE ViT-L/16", "DTM ViT-B/16", "A2MIM ResNet-50"
# row -> recipe, what is changed in its model, images in a batch, arms
ROWS = {
    MAE_BASE: ("mae", {}, 256, (OURS, CROSS, PEER, EAGER)),
    MAE_LARGE: ("mae", {"encoder_config": {"size": "large"}}, 128, (OURS, CROSS, PEER)),
    DTM: ("dtm", {}, 128, (OURS, STORED)),
    RESNET: ("a2mim_resnet50", {}, 256, (OURS,)),
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


# ---- models --------------------------------------------------------------------------------------------------------
def config_of(name: str, args, folder: Path) -> MIMConfig:
    recipe, changes, _, _ = ROWS[name]
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


def make_stored(config: MIMConfig, batch: Batch) -> Arm:
    """As if the teacher's features came with the batch: random ones."""
    arm = make_ours(config, batch)
    target = arm.model.target
    stored = {"patches": torch.randn(*batch.mask.shape, target.outputs["patches"], device=batch.mask.device)}
    target.targets = lambda pixel_values, grid: stored
    return arm


def make_arm(arm: str, config: MIMConfig, batch: Batch, device: str) -> Arm:
    """One model of a row, on the device and, on a GPU, compiled."""
    if arm in (PEER, EAGER):
        made = make_transformers(config, batch)
    elif arm == STORED:
        made = make_stored(config, batch)
    else:
        decoder = {"decoder": "cross_attention"} if arm == CROSS else {}
        made = make_ours(MIMConfig(**{**config.to_dict(), **decoder}), batch)
    made.model.to(device)
    if batch.pixel_values.is_contiguous(memory_format=torch.channels_last):
        made.model.to(memory_format=torch.channels_last)
    if device == "cuda" and arm != EAGER:
        made.model.compile()
    return made


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


def make_images(name: str, config: MIMConfig, args) -> Batch:
    """Random images, for a ConvNet with channels last, and masks, on the device."""
    batch = make_batch(config, 2 if args.tiny else ROWS[name][2])
    images = batch.pixel_values.to(args.device)
    if name == RESNET:
        images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, batch.mask.to(args.device))


def measure_row(name: str, args) -> dict:
    """{"batch", "images_per_second" (quartiles of each arm), "ratios", "mfu", "memory" (MiB), "gflops",
    "compiled_again" (graphs after the first steps), "waits" (of one step for the GPU, by arm)}"""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, args, Path(folder))
        batch = make_images(name, config, args)
        arms = {arm: make_arm(arm, config, batch, args.device) for arm in ROWS[name][3]}
        flops = {arm: flops_per_image(made.model) for arm, made in arms.items() if arm not in (PEER, EAGER)}
        made = {arm: make_step(arms[arm], args.device) for arm in arms}
        steps = {arm: step for arm, (step, _) in made.items()}
        if name == DTM:
            steps[MORPHING] = morphing_step(arms[OURS].model, config, batch, args)
        times, compiled_again = alternate_blocks(steps, args)
    count = len(batch.mask)
    peak = peak_flops(torch.cuda.get_device_name(), bf16=True) if args.device == "cuda" else None
    speeds = {arm: quartiles([count / second for second in times[arm]]) for arm in arms}
    flops |= {arm: flops[OURS] for arm in (PEER, EAGER) if arm in arms}  # the same architecture
    found = {"batch": count, "images_per_second": speeds, "compiled_again": compiled_again}
    found["memory"] = {arm: memory_of(*made[arm], args.device) for arm in arms}
    found["waits"] = {arm: waits_of(steps[arm]) for arm in arms} if args.device == "cuda" else {}
    found["gflops"] = {arm: flops[arm] / 1e9 for arm in flops}
    found["mfu"] = {arm: speeds[arm][1] * flops[arm] / peak for arm in arms} if peak else {}
    found["ratios"] = {f"{ours} / {peer}": paired_ratios(times, peer, ours) for ours, peer in pairs(arms)}
    if name == DTM:
        found["morphing"] = paired_ratios(times, MORPHING, OURS)
    return found


def waits_of(step: Callable) -> int:
    """How often one step makes the host wait for the GPU, as torch tells it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in told)


def pairs(arms: dict) -> list[tuple[str, str]]:
    """Which arms are compared, as (ours, the other)."""
    asked = [(ours, peer) for ours in (OURS, CROSS) for peer in (PEER, EAGER)] + [(STORED, OURS)]
    return [(ours, peer) for ours, peer in asked if ours in arms and peer in arms]


def alternate_blocks(steps: dict[str, Callable], args) -> tuple[dict[str, list[float]], int]:
    """Seconds of a step, `--rounds` blocks of each arm; the arms take turns, and each round begins with another. And
    how many graphs were compiled meanwhile."""
    names, seconds = list(steps), {name: [] for name in steps}
    for name in names:
        seconds_of(steps[name], 3, args.device)  # compiles, and warms up
    graphs = counters["stats"]["unique_graphs"]
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(seconds_of(steps[name], args.steps, args.device))
    return seconds, counters["stats"]["unique_graphs"] - graphs


# ---- compilation ---------------------------------------------------------------------------------------------------
def compile_ahead(names: list[str], args, processes: int = 4) -> None:
    """Fills torch's caches of compiled code, an arm in a process, since most of a compilation runs on one core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        arms = [(name, arm) for name in names for arm in ROWS[name][3] if arm != EAGER]
        running = {arm: pool.submit(one_step, arm, args) for arm in arms}
        for arm, future in running.items():
            if (error := future.exception()) is not None:  # of memory, say: the row itself may still do
                print(f"{' '.join(arm)}: not compiled ahead: {type(error).__name__}: {error}"[:500], file=sys.stderr)


def one_step(which: tuple[str, str], args) -> None:
    name, arm = which
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, args, Path(folder))
        step, _ = make_step(make_arm(arm, config, make_images(name, config, args), args.device), args.device)
        step()
