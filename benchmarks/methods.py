"""The papers' methods on the shipped images with one budget: what does a frozen encoder know after each?

    python benchmarks/methods.py [--students vit resnet] [--methods mae hog ...] [--seeds 0 1 2] [--steps 3000]
                                 [--minutes 55] [--out outputs/methods]

Every cell (student, method, seed) is one run of a recipe for `--steps` optimizer steps of 64 images, and one file with
its scores: k-NN, and a linear probe on 1 percent, 10 percent and all of the training labels (mean-pooled patch tokens).
What is done already is skipped, so the command can be stopped at any time and run again; after `--minutes` it stops by
itself. Teachers are trained first, by this project, on the train split: a supervised ViT and a supervised ResNet-18.
The table shows mean and standard deviation over the seeds that are there, and how many they are.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments, set_seed

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining
from hf_mim.training import metrics
from hf_mim.training import recipe as recipes
from hf_mim.training.data import MIMCollator, load_splits
from hf_mim.training.pretrain import pretrain
from hf_mim.training.sources import DataArguments
from hf_mim.training.trainer import has_bf16


PIXELS = ["model.target=pixel", "model.target_config={normalize: false, loss: l1}"]
VIT, RESNET = "model.target_config.teacher={teachers}/vit", "model.target_config.teacher={teachers}/resnet"
MORPHED = "model.target_config.features.teacher={teachers}/"
# student -> method -> (recipe, overrides); None is the encoder as it is drawn
STUDENTS = {
    "vit": {
        "untrained": ("quick", None),
        "mae": ("quick", []),
        "simmim": ("maskfeat_small", PIXELS),
        "hog": ("maskfeat_small", []),
        "a2mim": ("a2mim_vit_small", ["model.target_config.weight=0"]),
        "a2mim+frequency": ("a2mim_vit_small", []),
        "distillation": ("maskdistill_small", [VIT]),
        "img2vec, resnet teacher": ("img2vec_small", [RESNET]),
        "img2vec, vit teacher": ("img2vec_small", [VIT]),
        "dtm, resnet teacher": ("dtm_small", [MORPHED + "resnet"]),
        "dtm, vit teacher": ("dtm_small", [MORPHED + "vit"]),
        "moving average": ("data2vec_small", ["model.masks_per_image=1"]),
    },
    "resnet": {
        "untrained": ("a2mim_resnet18_small", None),
        "spark": ("spark_small", []),
        "simmim": ("a2mim_resnet18_small", [*PIXELS, "model.encoder_config.mask_style=token"]),
        "hog": ("a2mim_resnet18_small", ["model.target=hog"]),
        "a2mim": ("a2mim_resnet18_small", ["model.target_config.weight=0"]),
        "a2mim+frequency": ("a2mim_resnet18_small", []),
        "distillation": (
            "a2mim_resnet18_small",
            ["model.target=teacher_feature", VIT, "model.target_config.match=interpolate"],
        ),
    },
}
TEACHERS = {"vit": "quick", "resnet": "a2mim_resnet18_small"}
SHARES = (0.01, 0.1, 1.0)


def train_teacher(name: str, folder: Path, steps: int) -> None:
    """A supervised classifier of the student's architecture; saved whole, and loaded again by path."""
    if (folder / name / "config.json").exists():
        return
    set_seed(0)
    fields = {**recipes.resolve(TEACHERS[name])["model"], "num_labels": 10}
    config = MIMConfig(**fields)
    splits = load_splits(DataArguments(), config)
    labels, collate = splits.train.labels, MIMCollator(config)

    class Labelled(torch.utils.data.Dataset):
        def __len__(self):
            return len(splits.train)

        def __getitems__(self, indices):
            return [{**collate(splits.train.__getitems__(indices)), "labels": labels[torch.as_tensor(indices)]}]

    arguments = TrainingArguments(
        output_dir=str(folder / f"{name}-run"),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        bf16=has_bf16(),
    )
    model = MIMForImageClassification(config)
    Trainer(model, arguments, train_dataset=Labelled(), data_collator=lambda batch: batch[0]).train()
    model.save_pretrained(folder / name)


def run_cell(student: str, method: str, seed: int, args) -> dict:
    """Pretrains one encoder and scores it: {"knn", "linear_1", "linear_10", "linear_100"} in percent, and seconds."""
    recipe, overrides = STUDENTS[student][method]
    started, folder = time.perf_counter(), args.out / "runs" / f"{student}-{slug(method)}-{seed}-{int(time.time())}"
    if overrides is None:
        set_seed(seed)
        model = MIMForPreTraining(MIMConfig(**recipes.resolve(recipe)["model"])).mim
    else:
        settings = [override.replace("{teachers}", str(args.out / "teachers")) for override in overrides]
        settings += [f"training.seed={seed}", f"training.max_steps={args.steps}", f"training.output_dir={folder}"]
        settings += ["training.save_strategy='no'", "data.max_eval_images=0"]
        pretrain(recipe, settings, Console(quiet=True))
        model = MIMForPreTraining.from_pretrained(folder).mim
    return {**score(model, seed, args.images), "seconds": round(time.perf_counter() - started, 1)}


def score(model, seed: int, images: int | None) -> dict:
    config = model.config
    splits = load_splits(DataArguments(max_train_images=images, max_eval_images=images), config)
    sides = (splits.train_eval, splits.test)
    loaders = (metrics.pixel_loader(side, config) for side in sides)
    train, test = (metrics.extract_features(model, loader, has_bf16())["mean"] for loader in loaders)
    labels, truth = (side.labels for side in sides)
    scores = {"knn": metrics.knn_accuracy(train, labels, test, truth)}
    for share in SHARES:
        chosen = draw(labels, share, seed)
        scores[f"linear_{share:.0%}"[:-1]] = metrics.linear_accuracy(train[chosen], labels[chosen], test, truth)
    return scores


def draw(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Indices of `share` of the images of every class, at least five each."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels.numpy() == label) for label in labels.unique().tolist()]
    return torch.from_numpy(np.concatenate([rng.permutation(c)[: max(5, round(share * len(c)))] for c in classes]))


def slug(method: str) -> str:
    return method.replace(", ", "-").replace(" ", "-").replace("+", "-")


def table(args) -> str:
    """Mean and standard deviation over seeds, as markdown."""
    columns = ("knn", *(f"linear_{share:.0%}"[:-1] for share in SHARES))
    titles = ("k-NN", "linear, 1 %", "linear, 10 %", "linear, all")
    lines = ["| student | method | " + " | ".join(titles) + " | seeds |", "|---|---|" + "---|" * (len(titles) + 1)]
    for student in args.students:
        for method in STUDENTS[student]:
            files = sorted(args.out.glob(f"{student}-{slug(method)}-seed*-{args.steps}.json"))
            cells = [json.loads(file.read_text()) for file in files]
            if cells:
                values = np.array([[cell[column] for column in columns] for cell in cells])
                spread = values.std(0, ddof=min(1, len(cells) - 1))
                shown = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(values.mean(0), spread)]
                lines.append(f"| {student} | {method} | {' | '.join(shown)} | {len(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--images", type=int, help="score on the first so many images only")
    parser.add_argument("--minutes", type=float, default=55.0)
    parser.add_argument("--out", type=Path, default=Path("outputs/methods"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for name in TEACHERS:
        train_teacher(name, args.out / "teachers", args.steps)
    for seed in args.seeds:  # a whole table of one seed first
        for student in args.students:
            for method in STUDENTS[student]:
                file = args.out / f"{student}-{slug(method)}-seed{seed}-{args.steps}.json"
                if file.exists() or (args.methods and method not in args.methods) or time.monotonic() > deadline:
                    continue
                scores = run_cell(student, method, seed, args)
                file.write_text(json.dumps(scores, indent=2) + "\n")
                print(f"{student}, {method}, seed {seed}: {scores}", flush=True)
    shown = table(args)
    print(shown)
    return shown


if __name__ == "__main__":
    main()
