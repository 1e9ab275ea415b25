"""Does the memory of a long run stay constant? The recipe `quick`, again and again over the shipped images.

    python benchmarks/long_run.py --minutes 60 --out docs/benchmarks.md

Starts `hf-mim pretrain quick` as people do, with a loader worker, a checkpoint every epoch and a look at the run every
1,000 steps, on one thread, and stops it by SIGTERM after `--minutes`. Every few seconds the resident memory of the
process and its workers is added up; the steps done are those of the last checkpoint. Over what was seen after the
warm-up, the first fifth, a line is fitted. Exit code 1 where it climbs by more than `--bound` MB per 1,000 steps: with
one MB, a run of 250,000 steps, ImageNet's 800 epochs at batch 4,096, would gain 250 MB.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import matplotlib
import numpy as np
import psutil
from measure import machine, parser, write_section


matplotlib.use("Agg")
from matplotlib import pyplot


WARM_UP = 0.2  # share of the samples in which caches and heaps fill
STEPS_AN_EPOCH = 20_000 // 64


# ---- the run -------------------------------------------------------------------------------------------------------
def start(folder: Path, args) -> subprocess.Popen:
    """The command, without an end of its own."""
    settings = [f"training.output_dir={folder}", "training.max_steps=100000000", "data.max_eval_images=0"]
    settings += [f"training.save_steps={args.save_steps}", "training.save_strategy=steps"]
    settings += [f"training.dataloader_num_workers={args.workers}", f"training.watch_every={args.watch_every}"]
    settings += [f"training.dataloader_persistent_workers={'true' if args.workers else 'false'}", *args.settings]
    command = [sys.executable, "-m", "hf_mim", "pretrain", "quick", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def resident(process: psutil.Process) -> tuple[float, float]:
    """MB of a process and those it started together, and of the process alone. Pages that they share count for each."""
    own = total = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return total / 1e6, own / 1e6


def last_step(folder: Path) -> int:
    """Of the last complete checkpoint; 0 before the first."""
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def sample(args) -> dict:
    """-> {"seconds", "steps", "megabytes", "own"}: what was seen, one entry a sample.

    Raises:
        RuntimeError: the run ended by itself, or not as SIGTERM ends it.
    """
    found = {name: [] for name in ("seconds", "steps", "megabytes", "own")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        run = start(folder, args)
        process, started = psutil.Process(run.pid), time.monotonic()
        while (seconds := time.monotonic() - started) < 60 * args.minutes and last_step(folder) < args.steps:
            if run.poll() is not None:
                raise RuntimeError(f"the run ended with exit code {run.returncode}: {run.stderr.read()[-500:]}")
            for name, value in zip(found, (seconds, last_step(folder), *resident(process))):
                found[name].append(value)
            if args.json:
                Path(args.json).write_text(json.dumps(found))
            time.sleep(args.every)
        run.send_signal(signal.SIGTERM)
        if (code := run.wait(timeout=600)) != 128 + signal.SIGTERM:
            raise RuntimeError(f"the run, told to stop, ended with exit code {code}: {run.stderr.read()[-500:]}")
        found["last_step"] = last_step(folder)
    return found


# ---- the line ------------------------------------------------------------------------------------------------------
def fit(found: dict) -> dict:
    """A line through memory over steps after the warm-up.

    Args:
        found: "steps" and "megabytes", one entry a sample.

    Returns:
        {"slope": MB per 1,000 steps, "level": MB where the warm-up ends, "first": the first sample that counts,
        "low", "high": least and greatest MB of those}.

    Raises:
        RuntimeError: too few steps were done to fit anything.
    """
    steps, megabytes = np.array(found["steps"], float), np.array(found["megabytes"])
    started = int((steps == 0).sum())  # loading and compiling before the first checkpoint say nothing of steps
    first = started + int(WARM_UP * (len(steps) - started))
    steps, megabytes = steps[first:], megabytes[first:]
    checkpoints = np.unique(steps)
    if len(checkpoints) < 3:
        raise RuntimeError(f"{len(steps)} samples of {len(checkpoints)} checkpoints: let it run for longer")
    means = [megabytes[steps == step].mean() for step in checkpoints]  # so that a pause does not weigh more
    slope, level = np.polyfit((checkpoints - checkpoints[0]) / 1000, means, 1)
    return {
        "slope": float(slope),
        "level": float(level),
        "first": first,
        "low": float(megabytes.min()),
        "high": float(megabytes.max()),
    }


# ---- report --------------------------------------------------------------------------------------------------------
def draw(found: dict, line: dict, file: Path) -> None:
    steps = np.array(found["steps"])
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(steps, found["megabytes"], ".", markersize=2, color="tab:blue", label="resident, process and worker")
    fitted = steps[line["first"] :]
    axes.plot(
        fitted,
        line["level"] + line["slope"] * (fitted - fitted[0]) / 1000,
        color="tab:orange",
        label=f"{line['slope']:+.2f} MB per 1,000 steps",
    )
    axes.set(xlabel="optimizer steps (of the last checkpoint)", ylabel="MB", ylim=(0, 1.15 * max(found["megabytes"])))
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def report(found: dict, line: dict, args) -> str:
    steps, minutes = found["last_step"], found["seconds"][-1] / 60
    reached = "within" if line["slope"] <= args.bound else "**beyond**"
    return (
        f"{steps:,} steps in {minutes:.0f} minutes, {steps / STEPS_AN_EPOCH:.0f} epochs of 20,000 images, "
        f"{args.workers} loader worker, a checkpoint every {args.save_steps:,} steps, a look at the run every "
        f"{args.watch_every:,}: {line['slope']:+.2f} MB per 1,000 steps after the warm-up, {reached} the bound of "
        f"{args.bound:g}; between {line['low']:,.0f} and {line['high']:,.0f} MB, from "
        f"{len(found['steps']) - line['first']:,} samples of all processes together."
    )


def arguments(argv: list[str] | None):
    numbers = {
        "minutes": 60.0,
        "steps": (10**9, "stop before, after so many"),
        "every": (5.0, "seconds between samples"),
        "bound": (1.0, "MB per 1,000 steps that are still constant"),
        "workers": 1,
        "save_steps": (STEPS_AN_EPOCH, "by default every epoch"),
        "watch_every": 1000,
    }
    options = parser(__doc__, out="put the figure into this Markdown page, and the picture beside it", **numbers)
    options.add_argument("--json", help="write the samples to this file while they come")
    options.add_argument("settings", nargs="*", help="more settings of the run: section.key=value")
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    found = sample(args)
    line = fit(found)
    text = f"{machine()}\n\n{report(found, line, args)}"
    print(text)
    if args.out:
        draw(found, line, Path(args.out).parent / "long_run.png")
        write_section(args.out, "long_run", f"{text}\n\n![memory over steps](long_run.png)")
    return int(line["slope"] > args.bound)


if __name__ == "__main__":
    sys.exit(main())
