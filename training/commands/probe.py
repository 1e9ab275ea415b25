"""The command `probe`: evaluate a frozen encoder behind several poolers."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from hf_mim.training.checkpoint import untrained_twin
from hf_mim.training.commands import probe_report
from hf_mim.training.commands.dense import asks_for_dense, probe_dense
from hf_mim.training.commands.probe_setup import Probe, set_up
from hf_mim.training.common.console import IMAGES_DONE, RunConsole
from hf_mim.training.common.device import has_bf16, on_device
from hf_mim.training.common.errors import FolderError
from hf_mim.training.data.mapped_file import free_bytes
from hf_mim.training.evaluation import probe_scores
from hf_mim.training.evaluation.feature_store import weights_hash
from hf_mim.training.evaluation.features import (
    CachedSource,
    Features,
    PoolerChoice,
    UncachedSource,
    fill,
    missing_bytes,
    plan,
)
from hf_mim.training.evaluation.heads import Group, Trained, test_heads, train_heads
from hf_mim.training.evaluation.metrics import POOLINGS


def probe(source: str, overrides: Sequence[str] = (), console: Console | RunConsole | None = None) -> Path:
    """Probes a frozen encoder and writes everything into one folder.

    Args:
        source: a checkpoint of this project or a vision model of transformers: a folder, or an id on the Hub.
        overrides: `data.key=value` and `probe.key=value`; `task=dense` reads out masks instead (see `probe_dense`).

    Returns:
        the folder.

    Raises:
        ValueError, OSError: something of the model, the data or the settings is wrong; nothing has been written but
            features that are worth keeping.
        KeyboardInterrupt: after Ctrl-C; what is in the cache stays there.
    """
    if asks_for_dense(overrides):
        return probe_dense(source, overrides, console)
    run = set_up(source, overrides, console)
    started = time.perf_counter()
    with run.owning_folder():
        try:
            results = measure(run)
        except KeyboardInterrupt:
            kept = "" if run.arguments.uncached else f"; the features so far stay in {run.cache}"
            run.console.log(f"stopped{kept}; resume with: {run.command}")
            raise
        results["seconds"] = round(time.perf_counter() - started, 1)
        probe_report.write(results, run)
    run.log_next_steps()
    return run.folder


# ---- encoding ------------------------------------------------------------------------------------------------------
def make_features(run: Probe, model) -> Features:
    poolers = None
    if run.vectors_only:
        scored = [PoolerChoice(name, name, {}) for name in POOLINGS]
        scored = [choice for choice in scored if choice.name != "cls" or model.encoder.has_cls_token]
        poolers = list({choice.name: choice for choice in [*scored, *run.choices]}.values())
    attention = any(choice.make(model).needs_attentions for choice in run.choices)
    final_norm = run.arguments.apply_final_norm
    return Features(model, run.layers, poolers, attention, final_norm, has_bf16())


def make_plans(run: Probe, models: dict) -> dict:
    """{column: {split: files}}; see `plan`."""
    plans = {}
    for column, model in models.items():
        features = make_features(run, model)
        key = probe_report.describe_encoder(model, weights_hash(model))
        title = run.title if column == "trained" else f"{run.title}-untrained"
        views = {"train": run.arguments.views, "test": 1}
        plans[column] = {
            split: plan(features, images, views[split], run.cache, key, title) for split, images in run.images.items()
        }
    return plans


def encode(run: Probe, models: dict) -> dict:
    """Runs every encoder once over the data, unless its features are there. -> {column: {split: source}}

    Raises:
        ValueError: the disk is too small for the tokens that a pooler needs.
    """
    if run.arguments.uncached:
        views = {"train": run.arguments.views, "test": 1}
        return {
            column: {s: UncachedSource(make_features(run, model), run.images[s], views[s]) for s in run.images}
            for column, model in models.items()
        }
    run.vectors_only = not any(is_learned(choice, run.model) for choice in run.choices)
    plans = fit_disk(run, models, make_plans(run, models))
    with run.console.progress(IMAGES_DONE) as bar:
        for column, by_split in plans.items():
            features = make_features(run, models[column])
            for split, files in by_split.items():
                left = sum(max(file.count - file.done for file in view.values()) for view in files)
                task = bar.add_task(f"encoding, {column}, {split}", total=max(left, 1), visible=left > 0)
                fill(files, features, run.images[split], run.arguments.workers, partial(bar.advance, task))
    device = run.model.device
    return {
        column: {split: CachedSource(files, device) for split, files in by_split.items()}
        for column, by_split in plans.items()
    }


def is_learned(choice: PoolerChoice, model) -> bool:
    return any(True for _ in choice.make(model).parameters())


def fit_disk(run: Probe, models: dict, plans: dict) -> dict:
    """The plans, or those that keep less, if the disk is too small; says what will be written.

    Raises:
        ValueError: poolers were asked for that need more than there is.
    """

    def amount(of: dict) -> int:
        return sum(missing_bytes(files) for by_split in of.values() for files in by_split.values())

    needed, free = amount(plans), free_bytes(run.cache)
    what = "vectors of poolers without parameters" if run.vectors_only else "tokens"
    numbers = f"{probe_report.size(needed)} in {run.cache}, where {probe_report.size(free)} are free"
    if needed > free:
        fixed = [choice for choice in run.choices if not is_learned(choice, run.model)]
        if run.vectors_only or run.arguments.poolers is not None or not fixed:
            names = ", ".join(choice.name for choice in fixed) or "cls, mean, max"
            raise FolderError(
                f"the {what} need {numbers}: set probe.cache to a larger disk, take fewer probe.layers or probe.views, "
                f"set probe.untrained=false, or choose probe.poolers from those without parameters ({names})",
                str(run.cache),
            )
        run.console.warn(f"the tokens need {numbers}")
        run.choices, run.vectors_only = fixed, True
        names = ", ".join(choice.name for choice in fixed)
        run.console.warn(f"so only pooled vectors are kept, and only the poolers without parameters are tried: {names}")
        return fit_disk(run, models, make_plans(run, models))
    run.console.log(f"{what}: {numbers}" if needed else f"{what}: all of them are in {run.cache} already")
    return plans


# ---- measuring -----------------------------------------------------------------------------------------------------
def measure(run: Probe) -> dict:
    """Everything that goes into the report."""
    models = {"trained": run.model}
    if run.arguments.untrained:
        models["untrained"] = on_device(untrained_twin(run.model, seed=0), run.model.device)
    probe_report.describe(run)
    sources_of = encode(run, models)
    columns, examples = {}, {}
    for column, model in models.items():
        columns[column], heads, groups = probe_encoder(run, column, model, sources_of[column])
        if column == "trained":
            examples = probe_report.examples(run, sources_of[column]["test"], heads, groups)
    with run.console.status("k-NN and linear probe of the raw pixels"):
        raw = probe_scores.score_raw_pixels(run.images)
    return {"columns": columns, "raw_pixels": raw, "examples": examples}


def probe_encoder(run: Probe, column: str, model, sides: dict) -> tuple[dict, list[Trained], dict]:
    """Scores of one encoder, the best head of each pooler, and the groups that they belong to."""
    poolers, trained, groups = probe_poolers(run, column, model, sides)
    with run.console.status(f"k-NN, linear probe and few labels, {column}"):
        scores = probe_scores.score_features(sides, run.images, max(run.layers), model, run.arguments.seeds)
    scores = {"poolers": poolers, **scores, "settings": probe_report.settings(trained)}
    return scores, [members[0] for members in choose_settings(trained).values()], groups


def probe_poolers(run: Probe, column: str, model, sides: dict) -> tuple[dict, list[Trained], dict]:
    """Trains the poolers. -> {pooler: what is said of its best setting}, all heads, {(pooler, layer): group}"""
    places = [(choice, layer) for choice in run.choices for layer in run.layers]
    groups = {
        (choice.name, layer): Group(choice, layer, model, run.vectors_only, bf16=has_bf16()) for choice, layer in places
    }
    trained = train_seeds(run, column, groups, sides["train"])
    best = choose_settings(trained)
    heads: dict[Group, list[Trained]] = {}
    for head in (head for members in best.values() for head in members):
        heads.setdefault(groups[head.name, head.layer], []).append(head)
    right = test_heads(sides["test"], run.images["test"].labels, heads, run.arguments.batch_size)
    return {name: probe_report.entry(members, right) for name, members in best.items()}, trained, groups


def train_seeds(run: Probe, column: str, groups: dict, source) -> list[Trained]:
    """Everything with the first seed, then the best setting of each pooler with the others."""
    arguments, labels = run.arguments, run.images["train"].labels
    trained: list[Trained] = []
    rates: dict[Group, list[float]] = dict.fromkeys(groups.values(), arguments.rates)
    with run.console.progress() as bar:
        for seed in arguments.seeds:
            heads = sum(len(group_rates) for group_rates in rates.values())
            task = bar.add_task(f"training, {column}, seed {seed}, {heads} heads", total=1)
            trained += train_heads(
                source,
                labels,
                run.num_classes,
                rates,
                run.schedule,
                arguments.validation,
                seed,
                partial(bar.advance, task),
            )
            if seed == arguments.seeds[0]:
                best = [members[0] for members in choose_settings(trained).values()]
                rates = {groups[head.name, head.layer]: [head.learning_rate] for head in best}
    return trained


def choose_settings(trained: list[Trained]) -> dict[str, list[Trained]]:
    """{pooler: its heads, one for each seed, of the layer and learning rate that did best on the held-out images of the
    first seed}."""
    best: dict[str, Trained] = {}
    for head in (head for head in trained if head.seed == trained[0].seed):
        leader = best.get(head.name)
        if leader is None or (head.accuracy, -head.loss) > (leader.accuracy, -leader.loss):
            best[head.name] = head
    return {name: [head for head in trained if head.setting == leader.setting] for name, leader in best.items()}
