"""Training steps on a GPU: images per second, share of the peak, memory, and where the loader becomes the limit.

    python benchmarks/gpu.py --out docs/benchmarks.md              # nine minutes on one large GPU
    python benchmarks/gpu.py --device cpu --tiny                   # that it runs

Where hf_mim is not installed, `PYTHONPATH=.` before it, in the checkout.

In bf16, compiled, with the recipes' models at 224 px: MAE ViT-B/16 and ViT-L/16, with the attention of few tokens
(`attn_implementation="mim_short"`) and with the decoder `cross_attention` too, against `ViTMAEForPreTraining` of
transformers with the same sizes, compiled and as it is; DTM ViT-B with a teacher of the same size and random weights,
and with its features given; A2MIM ResNet-50 with channels last. A step is forward, loss, backward and fused AdamW on
images that are on the device. Arms take turns of `--steps` steps, timed by CUDA events (by the clock, uncompiled, on a
processor). The share of morphing is that of its loss alone, forward and backward, run by itself. MFU counts the FLOPs
of `training.trainer.throughput`. Memory is what a step holds at most beyond what it found, with the arm's own weights
and optimizer. A step should neither be compiled again nor wait for the GPU; both are counted. At last, attention alone,
the seconds of `hf-mim pretrain quick` with its scores, and the loader.

The rows of steps need torch, torchvision, timm, transformers and PyYAML alone; what needs more is left out where that
is missing. Each row is kept in `--state` as soon as it is done: stopped, or out of `--minutes`, the command goes on
where it was. All arms are compiled at the same time, each in a process, and then timed. That takes the memory of a
large GPU; `--together 1` takes one row at a time. An arm or a part that fails is left out, which is told.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import transformers
from gpu_attention import attention_words, measure_attention
from gpu_processes import in_own_process
from gpu_steps import CROSS, EAGER, MAE_BASE, MAE_LARGE, OURS, PEER, ROWS, SHORT, STORED, measure_row, start_rows
from measure import markdown_table, parser, row, spread, verdicts, write_whole
from summary import publish


ATTENTION, QUICK, LOADER = "attention", "quick", "loader"
PARTS = (*ROWS, ATTENTION, QUICK, LOADER)
GOALS = {MAE_BASE: (1.3, 0.40), MAE_LARGE: (None, 0.45)}  # images per second over transformers', MFU


def measure_loader(args) -> dict:
    """{"workers": {count: images per second}}, of JPEGs of about 500x375 to uint8 crops of 224 px, by the clock.

    Raises:
        ModuleNotFoundError: a machine without `datasets`.
    """
    from input_pipeline import make_dataset, make_jpegs

    from hf_mim import MIMConfig
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


def measure_quick(args) -> dict:
    """{way: {"whole_seconds" (with evaluation and pictures), "seconds" (of training), "images_per_second", "knn" and
    "linear", each of the encoder and of raw pixels}}, of the recipe `quick`, as it is and compiled.

    Raises:
        ModuleNotFoundError: a machine without `datasets` or scikit-learn.
    """
    from rich.console import Console

    from hf_mim.training.commands.pretrain import pretrain

    ways = {"as it is": [], "compiled": ["training.torch_compile=true"]} if args.device == "cuda" else {"as it is": []}
    few = ["training.max_steps=2", "training.watch_every=0", "data.max_eval_images=200"] if args.tiny else []
    found = {}
    for way, words in ways.items():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            pretrain("quick", [f"training.output_dir={folder}/run", *few, *words], Console(quiet=True))
            results = json.loads(Path(folder, "run", "metrics.json").read_text())
        found[way] = {"whole_seconds": time.perf_counter() - started}
        found[way] |= {name: results[name] for name in ("seconds", "images_per_second")}
        for name in ("knn", "linear"):
            found[way][name] = [results["trained"][f"{name}_mean"], results["raw_pixels"][name]]
    return found


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
        parts.append(f"### {name}, batch {entry['batch']}\n\n{markdown_table(header, lines)}\n\n{step_words(entry)}")
    if ATTENTION in found:
        parts.append(attention_words(found[ATTENTION]))
    if QUICK in found:
        parts.append(quick_words(found[QUICK]))
    if LOADER in found:
        parts.append(loader_words(found))
    return "\n\n".join([*parts, verdicts(rows_of(found))])


def step_words(entry: dict) -> str:
    """What is not a column: graphs compiled again, waiting, morphing, the teacher."""
    waits = ", ".join(f"{arm} {count}" for arm, count in entry["waits"].items() if count is not None)
    words = [f"Graphs compiled after the first steps: {sum(entry['compiled_again'].values())}."]
    words += [f"Times that a step waits for the GPU: {waits}."] if waits else []
    if "morphing" in entry:
        words.append(f"Morphing alone takes {spread([100 * value for value in entry['morphing']], 1)} % of a step.")
    if faster := entry["ratios"].get(f"{STORED} / {OURS}"):
        words.append(f"Without the teacher a step is {spread(faster)} times as fast.")
    if entry["left_out"]:
        words.append(f"**Left out, since they failed: {'; '.join(entry['left_out'])}.**")
    return " ".join(words)


def quick_words(found: dict[str, dict]) -> str:
    """The table of the recipe `quick`."""
    lines = []
    for way, result in found.items():
        scores = [f"{trained:.1f} ({pixels:.1f})" for trained, pixels in (result["knn"], result["linear"])]
        speed = f"{result['images_per_second']:,.0f}"
        lines.append([way, f"{result['whole_seconds']:.0f}", f"{result['seconds']:.0f}", speed, *scores])
    header = ["", "seconds", "of training", "images per second", "k-NN (raw pixels)", "linear probe (raw pixels)"]
    return f"### quick\n\n{markdown_table(header, lines)}"


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
        for ours in (arm for arm in (OURS, SHORT, CROSS) if f"{arm} / {PEER}" in ratios):
            what, ratio = f"{name} on a GPU, {ours}: images per second over transformers'", ratios[f"{ours} / {PEER}"]
            wanted_ratio = goal if ours == OURS else None
            rows.append(row(what, speeds[ours][1], speeds[PEER][1], ratio, wanted_ratio, unit="images/s"))
        if found[name]["mfu"]:
            mfu = found[name]["mfu"]
            rows.append(row(f"{name} on a GPU: MFU", mfu[OURS], mfu.get(PEER), None, wanted))
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
    options.add_argument("--only", nargs="+", choices=PARTS, help="only these rows")
    options.add_argument("--together", type=int, default=len(ROWS), help="rows whose arms are compiled at one time")
    options.add_argument("--profile", choices=list(ROWS), help="a row whose kernels, by time, are written beside it")
    options.add_argument("--state", type=Path, default=Path("outputs/gpu"), help="where rows are kept")
    options.add_argument("--again", action="store_true", help="measure rows again that are done")
    args = options.parse_args(argv)
    args.started = time.time()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU with CUDA, and torch finds none on this machine")
    return args


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args, begun = arguments(argv), time.monotonic()
    args.state.mkdir(parents=True, exist_ok=True)
    asked = args.only or PARTS
    found = {name: kept for name in asked if (kept := kept_row(name, args)) is not None}
    missing = [name for name in asked if name not in found]
    rows, started = [name for name in missing if name in ROWS], {}
    for name in missing:
        if time.monotonic() - begun > 60 * args.minutes:
            print(f"out of time before {name}: the same command goes on from there", file=sys.stderr)
            break
        if name in rows and name not in started and args.device == "cuda":
            started = start_rows(rows[rows.index(name) :][: args.together], args)
        measured = measure(name, args, started.get(name))
        if measured is not None:
            write_whole(file_of(name, args), json.dumps({"where": where(args), "found": measured}, indent=1) + "\n")
            found[name] = kept_row(name, args)
            print(f"{name}: {time.monotonic() - begun:.0f} s so far", file=sys.stderr, flush=True)
    publish(args.out, "gpu", report(found, args), rows_of(found), where(args))
    return found


def file_of(name: str, args) -> Path:
    return args.state / f"{name.replace(' ', '-').replace('/', '-')}{'-tiny' * args.tiny}.json"


def kept_row(name: str, args) -> dict | None:
    """What an earlier call found on such a machine; of this one with `--again`."""
    file = file_of(name, args)
    kept = json.loads(file.read_text()) if file.exists() else {}
    fresh = not args.again or (file.exists() and file.stat().st_mtime >= args.started)
    return kept["found"] if fresh and kept.get("where") == where(args) else None


def measure(name: str, args, started: dict | None = None) -> dict | None:
    """A row; None where the machine lacks a package for it, or it failed on a GPU, which is told."""
    try:
        if name in ROWS:
            return measure_row(name, args, started)
        part = {ATTENTION: measure_attention, QUICK: measure_quick, LOADER: measure_loader}[name]
        return in_own_process(part, args) if args.device == "cuda" else part(args)
    except ModuleNotFoundError as absent:
        if name in ROWS:
            raise
        print(f"{name}: left out, this machine has no {absent.name}", file=sys.stderr)
    except Exception:
        if args.device != "cuda":
            raise
        print(f"{name}: failed: {traceback.format_exc()}", file=sys.stderr, flush=True)
    finally:
        for served in (started or {}).values():
            served.end()
    return None


if __name__ == "__main__":
    main()
