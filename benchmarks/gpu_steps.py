"""The training steps of benchmarks/gpu.py: models, what a step is, and how long it takes.

Needs torch, torchvision, timm, transformers and PyYAML alone. On a GPU each arm has a process of its own, so that all
of them are compiled at the same time, and one that fails leaves the others as they are.
"""

import contextlib
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_processes import Served, answers
from measure import paired_ratios, quartiles, tensor_memory
from peers import Arm, Batch, make_batch, make_transformers
from torch._dynamo.utils import counters

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.modeling import attention
from hf_mim.modeling.teachers import teachers_of
from hf_mim.training.recipe import merge, resolve
from hf_mim.training.trainer.throughput import flops_per_image, peak_flops


OURS, CROSS, PEER, EAGER = "hf_mim", "hf_mim, cross_attention", "transformers", "transformers, not compiled"
MORPHING = "morphing alone"
SHORT, STORED = "hf_mim, mim_short", "hf_mim, features of the teacher stored"
MAE_BASE, MAE_LARGE, DTM, RESNET = "MAE ViT-B/16", "MAE ViT-L/16", "DTM ViT-B/16", "A2MIM ResNet-50"
# row -> recipe, what is changed in its model, images in a batch, arms
ROWS = {
    MAE_BASE: ("mae", {}, 256, (OURS, SHORT, CROSS, PEER, EAGER)),
    MAE_LARGE: ("mae", {"encoder_config": {"size": "large"}}, 128, (OURS, SHORT, CROSS, PEER)),
    DTM: ("dtm", {}, 128, (OURS, STORED)),
    RESNET: ("a2mim_resnet50", {}, 256, (OURS,)),
}
SAME = 0.02  # relative, in bfloat16: loss and norm of the gradient of two ways to compute one model
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
    """As the trainer calls it: with a generator of the step, and with images that a teacher has not just seen."""
    model, seeds = MIMForPreTraining(config).train(), itertools.count()

    def loss():
        generator = torch.Generator().manual_seed(next(seeds))
        images = batch.pixel_values.detach()  # another tensor for the teacher, which keeps what it said of its last one
        return model(images, bool_masked_pos=batch.mask, generator=generator).loss

    return Arm(model, loss)


def make_stored(config: MIMConfig, batch: Batch) -> Arm:
    """As if the teacher's features came with the batch: random ones."""
    arm = make_ours(config, batch)
    target = arm.model.target
    stored = {"patches": torch.randn(*batch.mask.shape, target.outputs["patches"], device=batch.mask.device)}
    target.targets = lambda pixel_values, grid: stored
    return arm


def make_arm(arm: str, config: MIMConfig, batch: Batch, device: str) -> Arm:
    """One model of a row, on the device and, on a GPU, compiled.

    Raises:
        RuntimeError: `mim_short` would be sdpa on this GPU.
    """
    if arm in (PEER, EAGER):
        made = make_transformers(config, batch)
    elif arm == STORED:
        made = make_stored(config, batch)
    else:
        decoder = {"decoder": "cross_attention"} if arm == CROSS else {}
        made = make_ours(MIMConfig(**{**config.to_dict(), **decoder}), batch)
    if arm == SHORT:
        if device == "cuda" and not attention.has_short_attention(torch.device(device)):
            raise RuntimeError("the kernels of mim_short do not run on this GPU, or Triton is missing")
        made.model.set_attn_implementation(attention.SHORT)
    made.model.to(device)
    if batch.pixel_values.is_contiguous(memory_format=torch.channels_last):
        made.model.to(memory_format=torch.channels_last)
    if device == "cuda" and arm != EAGER:
        made.model.compile()
        for teacher in teachers_of(getattr(made.model, "target", None)):
            teacher.compile()  # as the trainer does
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
def make_images(name: str, config: MIMConfig, args) -> Batch:
    """Random images, for a ConvNet with channels last, and masks, on the device."""
    batch = make_batch(config, 2 if args.tiny else ROWS[name][2])
    images = batch.pixel_values.to(args.device)
    if name == RESNET:
        images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, batch.mask.to(args.device))


class Runner:
    """An arm of a row that has taken its first steps, which compile it."""

    def __init__(self, name: str, arm: str, args):
        torch.manual_seed(0)
        self.name, self.arm, self.args = name, arm, args
        with tempfile.TemporaryDirectory() as folder:
            self.config = config_of(name, args, Path(folder))
            self.batch = make_images(name, self.config, args)
            self.made = make_arm(arm, self.config, self.batch, args.device)
            self.step, self.held = make_step(self.made, args.device)
            self.flops = None if arm in (PEER, EAGER) else flops_per_image(self.made.model)
            self.first = when_there_is_memory(self.first_gradient)
            when_there_is_memory(lambda: seconds_of(self.step, 3, args.device))
        self.morph = morphing_step(self.made.model, self.config, self.batch, args) if name == DTM else None
        if self.morph is not None:
            when_there_is_memory(lambda: seconds_of(self.morph, 3, args.device))
        self.graphs = counters["stats"]["unique_graphs"]
        self.give_memory_back()

    def first_gradient(self) -> tuple[float, float]:
        """The loss and the norm of its gradient before the first step: arms of one architecture begin with the same
        weights."""
        try:
            with torch.autocast(self.args.device, dtype=torch.bfloat16):
                loss = self.made.loss()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.made.model.parameters() if p.grad is not None])
            return loss.item(), norm.item()
        finally:
            self.made.model.zero_grad()

    def seconds(self) -> float:
        return self.seconds_alone(self.step)

    def morphing_seconds(self) -> float:
        return self.seconds_alone(self.morph)

    def seconds_alone(self, step: Callable) -> float:
        """After a step that is not counted: it takes the memory, which is given back."""
        step()
        seconds = seconds_of(step, self.args.steps, self.args.device)
        self.give_memory_back()
        return seconds

    def give_memory_back(self) -> None:
        """To the others, while this arm waits."""
        if self.args.device == "cuda":
            torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        """Of a step: MiB held, times it waits for the GPU, graphs compiled since the first steps, FLOPs of an image."""
        compiled_again = counters["stats"]["unique_graphs"] - self.graphs
        found = {"memory": memory_of(self.step, self.held, self.args.device), "compiled_again": compiled_again}
        found["waits"] = waits_of(self.step) if self.args.device == "cuda" else None
        found |= {"flops": self.flops, "first": self.first}
        if self.args.profile == self.name:
            write_profile(self.step, self.args.state / f"{self.name} {self.arm}.txt".replace("/", "-"))
        self.give_memory_back()
        return found


def when_there_is_memory(compute: Callable[[], Any], tries: int = 20, pause: float = 5.0) -> Any:
    """Its result; tried again where others hold the memory, as arms do that take their first steps at the same time.

    Raises:
        OutOfMemoryError: there was none at the last try either.
    """
    for _ in range(tries - 1):
        with contextlib.suppress(torch.OutOfMemoryError):
            return compute()
        torch.cuda.empty_cache()
        time.sleep(pause)
    return compute()


def start_rows(names: list[str], args) -> dict[str, dict[str, Served]]:
    """The arms of these rows, each in a process that has compiled it. None is timed while another is still busy."""
    count = sum(len(ROWS[name][3]) for name in names)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, count))))
    started = {name: {arm: Served(Runner, name, arm, args) for arm in ROWS[name][3]} for name in names}
    for arms in started.values():
        ready = answers({arm: served.ready for arm, served in arms.items()})
        for arm in arms.keys() - ready.keys():
            arms.pop(arm).end()
    return started


def measure_row(name: str, args, started: dict[str, Served] | None = None) -> dict:
    """{"batch", "images_per_second" (quartiles of each arm), "ratios", "mfu", "left_out" (arms that failed), and by arm
    "memory" (MiB), "flops", "compiled_again" (graphs after the first steps), "waits" (of a step for the GPU), "first"
    (loss and norm of its gradient before the first step)}

    Raises:
        RuntimeError: hf_mim's own arm failed.
    """
    arms = {arm: Runner(name, arm, args) for arm in ROWS[name][3]} if started is None else dict(started)
    asked = {arm: runner.seconds for arm, runner in arms.items()}
    if name == DTM and OURS in arms:
        asked[MORPHING] = arms[OURS].morphing_seconds
    times = alternate(asked, args.rounds)
    facts = without_wrong(answers({arm: runner.facts for arm, runner in arms.items() if arm in times}))
    if OURS not in facts:
        raise RuntimeError(f"the arm {OURS} failed")
    count = 2 if args.tiny else ROWS[name][2]
    peak = peak_flops(torch.cuda.get_device_name(), bf16=True) if args.device == "cuda" else None
    speeds = {arm: quartiles([count / second for second in times[arm]]) for arm in facts}
    found: dict[str, Any] = {"batch": count, "images_per_second": speeds}
    found["left_out"] = [arm for arm in ROWS[name][3] if arm not in facts]
    found |= {fact: {arm: facts[arm][fact] for arm in facts} for fact in facts[OURS]}
    found["flops"] = {arm: own or found["flops"][OURS] for arm, own in found["flops"].items()}  # one architecture
    found["mfu"] = {arm: speeds[arm][1] * found["flops"][arm] / peak for arm in facts} if peak else {}
    found["ratios"] = {f"{ours} / {peer}": paired_ratios(times, peer, ours) for ours, peer in pairs(facts)}
    if MORPHING in times:
        found["morphing"] = paired_ratios(times, MORPHING, OURS)
    return found


def without_wrong(facts: dict[str, dict]) -> dict[str, dict]:
    """Without `mim_short` where it computes something else than sdpa, which is told."""
    if SHORT in facts and OURS in facts:
        first, wanted = facts[SHORT]["first"], facts[OURS]["first"]
        if not np.allclose(first, wanted, rtol=SAME):
            print(f"left out: {SHORT}: loss and norm of the gradient are {first}, not {wanted}", file=sys.stderr)
            return {arm: found for arm, found in facts.items() if arm != SHORT}
    return facts


def pairs(arms: dict) -> list[tuple[str, str]]:
    """Which arms are compared, as (ours, the other)."""
    asked = [(ours, peer) for ours in (OURS, SHORT, CROSS) for peer in (PEER, EAGER)] + [(STORED, OURS)]
    return [(ours, peer) for ours, peer in asked if ours in arms and peer in arms]


def alternate(asked: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, once a round of each arm; the arms take turns, and each round begins with another. An arm that
    fails is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for i in range(rounds):
        names = list(seconds)
        first = i % max(1, len(names))
        found = answers({name: asked[name] for name in names[first:] + names[:first]})
        seconds = {name: [*seconds[name], found[name]] for name in names if name in found}
    return seconds


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


def waits_of(step: Callable) -> int:
    """How often one step makes the host wait for the GPU, as torch tells it. (Its first words are of another warning,
    that it may not see all.)"""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in told)


def write_profile(step: Callable, file: Path) -> None:
    """The kernels of three steps by their time on the device."""
    with torch.profiler.profile() as profile:
        for _ in range(3):
            step()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    file.write_text(profile.key_averages().table(sort_by=order, row_limit=100, max_name_column_width=100))
