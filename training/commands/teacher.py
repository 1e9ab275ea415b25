"""Teachers before training: what one would give, and codebooks of its features."""

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair, size_title
from hf_mim.modeling.parts import make_encoder
from hf_mim.modeling.target_discrete import code_usage, nearest_code
from hf_mim.modeling.target_teacher import TeacherFeatureTarget
from hf_mim.modeling.teachers import TeacherModel, load_teacher
from hf_mim.training import recipe as recipes
from hf_mim.training.common.console import RunConsole, make_table
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.common.output_folder import check_new_file
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.report import without_evaluation
from hf_mim.training.evaluation.feature_statistics import DEAD_SHARE, token_diversity
from hf_mim.training.evaluation.frozen import pixel_loader
from hf_mim.training.own_data import chosen_data, own_data
from hf_mim.training.trainer.processes import PeerWatchdog


IMAGES = 256  # on which a teacher is described
BATCH = 32
PATCHLESS = {"size": "tiny", "num_hidden_layers": 1, "patch_size": 1}  # an encoder that takes any image size
RECIPE = "maskdistill_small"


def images_of(
    source: str, overrides: Sequence[str], config: MIMConfig, count: int, console: RunConsole
) -> list[Tensor]:
    """Batches of up to `count` training images, whole: `pixel_values` (batch, channels, height, width). They are of the
    run that the teacher is of, where nobody chooses any."""
    chosen = chosen_data(overrides)
    section = {**own_data([source], chosen, console), **chosen}
    data = DataArguments(**{**section, "max_train_images": count})
    splits = load_splits(data, config)
    console.log("\n".join([*without_evaluation(splits.report), splits.sample.line]))
    dataset = splits.train.without_augmentation()
    return list(pixel_loader(dataset, config, BATCH))


def image_fields(model: TeacherModel) -> dict:
    """What a teacher's images are like, as fields of a `MIMConfig`."""
    fields = {name: getattr(model.config, name) for name in ("image_size", "num_channels", "image_mean", "image_std")}
    return {**fields, "image_size": list(pair(fields["image_size"]))}


def describe_teacher(
    source: str, overrides: Sequence[str] = (), console: Console | RunConsole | None = None
) -> list[dict]:
    """Prints, for every layer of a teacher, what it would give as a target.

    Args:
        source: Hub id or local folder.
        overrides: `data.dataset=...` and the like; without, images are those of the run that the teacher is of.

    Returns:
        per layer: name, dim, grid (rows, cols) at the teacher's own input size, token diversity.

    Raises:
        ValueError, OSError: the teacher or the data cannot be loaded.
    """
    console = RunConsole(console)
    model = load_teacher(source)
    recipes.resolve(RECIPE, overrides)  # raises where one is wrong
    config = MIMConfig(**image_fields(model), encoder_config=PATCHLESS)
    batches, seconds = images_of(source, overrides, config, IMAGES, console), 0.0
    maps: dict[str, list[Tensor]] = {name: [] for name in model.encoder.stage_names}
    with console.progress() as bar, torch.inference_mode():
        for pixel_values in bar.track(batches, description="running the teacher"):
            started = time.perf_counter()
            encoded = model.encoder(pixel_values, output_hidden_states=True)
            stages = model.encoder.stage_maps(encoded, *pixel_values.shape[2:])
            seconds += time.perf_counter() - started
            for name, stage in zip(maps, stages):
                maps[name].append(stage)
    rows = []
    for (name, parts), dim in zip(maps.items(), model.encoder.num_features):
        tokens = torch.cat(parts).flatten(2).transpose(1, 2)
        rows.append({"layer": name, "dim": dim, "grid": tuple(parts[0].shape[2:]), **token_diversity(tokens)})
    count = sum(map(len, batches))
    console.show(teacher_table(source, rows, config, count / seconds, count))
    return rows


def teacher_table(source: str, rows: list[dict], config: MIMConfig, speed: float, count: int) -> Table:
    return make_table(
        ("layer", "channels", "grid", "token diversity", "centred"),
        [
            (row["layer"], str(row["dim"]), size_title(row["grid"]), f"{row['raw']:.3f}", f"{row['centred']:.3f}")
            for row in rows
        ],
        title=f"{source}: {size_title(config.image_size)} pixels, {config.num_channels} channels, "
        f"{speed:,.0f} images/s",
        caption=f"Token diversity on {count} images: 1 - the mean cosine of two tokens, and of two tokens less their "
        "image's mean. Compare teachers at equal grids.",
    )


def fit_codebook(
    source: str,
    out: Path,
    overrides: Sequence[str] = (),
    codes: int = 512,
    images: int = 2000,
    console: Console | RunConsole | None = None,
    force: bool = False,
) -> dict:
    """Fits a codebook by k-means on a teacher's features, as target `discrete_token` sees them, and writes it.

    Args:
        out: a safetensors file with `codes` (codes, dim).
        overrides: of the recipe `maskdistill_small`, with the last layer and match `interpolate`; its `target_config`
            (layers, match, norm) says what the features are. Without `model.image_size`, `num_channels` or an encoder,
            images and patches are the teacher's own.
        codes: 256 to 1024 for small data, 8192 in BEiT.
        force: replace a file that is there already.

    Returns:
        "perplexity" and "dead", the codes that no token has. Of several processes the first fits; the others wait, and
        return {}.

    Raises:
        FolderError: `out` exists already.
        ValueError, OSError: the teacher or the data cannot be loaded, or there are fewer tokens than codes.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    with PeerWatchdog(processes.num_processes, lambda: "there is no codebook: start again"):
        try:
            if not processes.is_main_process:
                return {}
            check_new_file(out, force)
            return _fit_codebook(source, out, overrides, codes, images, RunConsole(console))
        finally:
            processes.wait_for_everyone()


def _fit_codebook(
    source: str, out: Path, overrides: Sequence[str], codes: int, images: int, console: RunConsole
) -> dict:
    from sklearn.cluster import MiniBatchKMeans

    config = student_config(source, overrides)
    console.log(f"images: {size_title(config.image_size)} pixels, {config.num_channels} channels")
    encoder = make_encoder(config)
    target = TeacherFeatureTarget(config, encoder, **config.options("target"))
    grid = encoder.mask_grid(*pair(config.image_size))
    batches = images_of(source, overrides, config, images, console)
    with console.progress() as bar:
        track = bar.track(batches, description="running the teacher")
        features = torch.cat([target.targets(batch, grid)["patches"].flatten(0, 1) for batch in track])
    if len(features) < codes:
        raise RecipeError(f"{len(features)} tokens are too few for {codes} codes: give more images or fewer codes")
    with console.status(f"fitting {codes} codes to {len(features):,} tokens"):
        kmeans = MiniBatchKMeans(codes, batch_size=4096, n_init=3, random_state=0).fit(features.numpy())
    table = torch.from_numpy(np.ascontiguousarray(kmeans.cluster_centers_, dtype=np.float32))
    save_file({"codes": table}, out)
    return report_usage(table, features, out, console)


def student_config(source: str, overrides: Sequence[str]) -> MIMConfig:
    """Of a student that sees images as the teacher does, but for what overrides change of the recipe."""
    options = [f"model.target_config.{option}" for option in (f"teacher={source}", "layers=[-1]", "match=interpolate")]
    recipe = recipes.resolve(RECIPE, [*options, *overrides])
    chosen, teacher = recipes.parse_overrides(overrides).get("model", {}), load_teacher(source)
    fields = image_fields(teacher)
    if chosen.get("num_channels", fields["num_channels"]) != fields["num_channels"]:
        fields = {"image_size": fields["image_size"]}  # mean and std are per channel
    if not {"image_size", "encoder", "encoder_config"} & chosen.keys():
        down, right = teacher.stage_strides()[-1]
        recipe["model"]["encoder_config"]["patch_size"] = down if down == right else [down, right]
    return MIMConfig(**{**recipe["model"], **fields, **{name: recipe["model"][name] for name in chosen}})


def report_usage(table: Tensor, features: Tensor, out: Path, console: Console | RunConsole | None = None) -> dict:
    """Prints how evenly the codes are used; warns of dead ones."""
    console = RunConsole(console)
    perplexity, dead = code_usage(torch.bincount(nearest_code(features, table), minlength=len(table)))
    console.log(f"{out}: {len(table)} codes of dimension {table.shape[1]}, perplexity {perplexity:.0f}")
    if dead > DEAD_SHARE * len(table):
        console.warn(f"warning: {dead} codes are never used; fit fewer codes, or on more images")
    return {"perplexity": perplexity, "dead": dead}
