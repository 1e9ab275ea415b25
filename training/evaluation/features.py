"""The features of a frozen encoder: which ones, of which images, and where they come from at every step."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from hf_mim.modeling.options import check_part
from hf_mim.modeling.pixels import crop_share
from hf_mim.modeling.poolers import POOLERS
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.evaluation.feature_store import FeatureStore, data_hash


BATCH = 64  # images that the encoder sees at once
COMMIT = 32  # batches after which a crash loses nothing that was computed before


# ---- what is kept of an image --------------------------------------------------------------------------------------
@dataclass
class PoolerChoice:
    """An entry of `POOLERS` with options, under a name of its own.

    Raises:
        ValueError: there is no such pooler or option.
    """

    name: str
    kind: str
    options: dict

    def __post_init__(self):
        check_part("pooler", POOLERS, self.kind, self.options)

    def make(self, model):
        """A new pooler in eval mode, initialised as one of the model's own would be."""
        try:
            pooler = POOLERS[self.kind](model.encoder, **self.options)
        except ValueError as error:
            raise ValueError(f"probe.poolers: {error}") from None
        return pooler.apply(model._init_weights).to(model.device).eval()


class Features:
    """What is kept of every image: a function of `pixel_values`.

    Names are `tokens/<layer>`, `attention/<layer>` (the row of the class token in the layer's last block) and
    `<pooler>/<layer>`. Layers count the blocks passed, 0 is the embedding.

    Args:
        model: a frozen `MIMModel` without its pooler.
        layers: as of `choose_layers`.
        poolers: of which only the vectors are kept, poolers without parameters; None keeps all tokens.
        attention: whether to keep the attention of the class token too.
        apply_final_norm: whether tokens, of whichever layer, pass the encoder's last norm.
        bf16: compute in bfloat16 where autocast does.
    """

    def __init__(
        self,
        model,
        layers: list[int],
        poolers: list[PoolerChoice] | None = None,
        attention: bool = False,
        apply_final_norm: bool = True,
        bf16: bool = False,
    ):
        self.model, self.layers, self.choices, self.attention = model, layers, poolers, attention
        self.poolers = None if poolers is None else {choice.name: choice.make(model) for choice in poolers}
        model.encoder.check_final_norm(apply_final_norm)
        self.apply_final_norm, self.bf16 = apply_final_norm, bf16
        self.last = len(model.encoder.stage_names) - 1

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(batch, channels, height, width) -> {name: (batch, ...)}: tokens (batch, prefix + rows * cols, dim), in
        float32; attention (batch, heads, prefix + rows * cols); vectors (batch, dim)."""
        encoder, device = self.model.encoder, self.model.device
        deep = any(layer != self.last for layer in self.layers)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            encoded = encoder(pixel_values.to(device, self.model.dtype), None, deep, self.attention)
        grid, result = encoder.token_grid(*pixel_values.shape[2:]), {}
        for layer in self.layers:
            tokens = (encoded.tokens if layer == self.last else encoded.hidden_states[layer]).float()
            tokens = encoder.final_norm(tokens) if self.apply_final_norm else tokens
            attention = encoded.attentions[layer - 1] if self.attention else None
            if self.poolers is None:
                result[f"tokens/{layer}"] = tokens
                if attention is not None:
                    result[f"attention/{layer}"] = attention[:, :, : max(1, encoder.num_cls_tokens)].mean(2)
                continue
            for name, pooler in self.poolers.items():
                result[f"{name}/{layer}"] = pool(pooler, tokens, encoder.num_prefix_tokens, grid, attention)[0]
        return result


def pool(pooler, tokens: Tensor, prefix: int, grid: tuple[int, int], attention: Tensor | None = None):
    """A pooler's vector and weights. attention (batch, heads, length, length), or of stored features what the class
    token attends to alone, (batch, heads, 1, length)."""
    return pooler(tokens, prefix, grid, None if attention is None else (attention,))


def choose_layers(encoder, layers: list[int], attention: bool = False) -> list[int]:
    """Layers as people write them, -1 for the last, as numbers of blocks passed.

    Raises:
        ValueError: there is no such layer, or its tokens are of another width than the poolers expect.
    """
    last = len(encoder.stage_names) - 1
    chosen = []
    for layer in layers:
        if not -last - 1 <= layer <= last:
            raise ValueError(f"probe.layers: there is no layer {layer}; choose from {-last - 1} to {last}")
        chosen.append(layer % (last + 1))
    if len(set(encoder.num_features)) > 1 and set(chosen) != {last}:
        raise ValueError("probe.layers must be [-1]: the stages of this encoder differ in width")
    if attention and 0 in chosen:
        raise ValueError("probe.layers: layer 0, the embedding, has no attention to pool by; leave it out")
    return list(dict.fromkeys(chosen))


# ---- of which images -----------------------------------------------------------------------------------------------
class ImageViews:
    """Some images of a data set: whole (view 0), and as random crops and flips of them (views 1, 2, ...).

    Args:
        whole: the images without augmentation.
        augmented: the same with crops and flips that follow from (seed, view, index); None if there is only view 0.
        indices: which images.
        name: of the split.
    """

    def __init__(self, whole: MIMDataset, augmented: MIMDataset | None, indices: list[int], config, name: str):
        self.whole, self.augmented = whole, augmented or whole
        self.indices, self.name = indices, name
        self.collate = MIMCollator(config)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Class numbers (images,); final once every image was fetched, since a broken one is replaced by another."""
        return self.whole.true_labels(self.indices)

    def dataset(self, view: int) -> MIMDataset:
        dataset = self.augmented if view else self.whole
        dataset.set_epoch(view)
        return dataset

    def batches(self, view: int, start: int, workers: int = 0):
        """`pixel_values` (batch, channels, height, width) of the images from `start` on, in order."""
        subset = torch.utils.data.Subset(self.dataset(view), self.indices[start:])
        yield from (
            batch["pixel_values"]
            for batch in torch.utils.data.DataLoader(subset, BATCH, collate_fn=self.collate, num_workers=workers)
        )

    def fetch(self, view: int, positions: Tensor) -> Tensor:
        """`pixel_values` of the images at `positions`."""
        chosen = [self.indices[position] for position in positions.tolist()]
        return self.collate(self.dataset(view).__getitems__(chosen))["pixel_values"]

    @cached_property
    def images_hash(self) -> str:
        chosen = hashlib.sha256(np.array(self.indices).tobytes()).hexdigest()[:16]
        return f"{data_hash(self.whole)}-{chosen}"

    def describe(self, view: int) -> dict:
        """What the pixels follow from, for the key of a cache."""
        description = {"split": self.name, "images": self.images_hash, "view": view}
        description |= {"eval_crop": crop_share(self.whole.eval_crop), "rules": str(self.whole.decode.rules)}
        if view:
            augmented = self.augmented
            description |= {"seed": augmented.seed, "crop": augmented.crop_scale, "flip": augmented.horizontal_flip}
        return description


# ---- where they come from ------------------------------------------------------------------------------------------
class UncachedSource:
    """Features computed anew whenever they are asked for: the slow way."""

    def __init__(self, features: Features, images: ImageViews, views: int = 1):
        self.features, self.images, self.views = features, images, views

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, view: int, positions: Tensor) -> dict[str, Tensor]:
        """Features in float32 of the images at `positions` (batch,) in a view, counted modulo the number of views."""
        parts = [self.features(self.images.fetch(view % self.views, part)) for part in positions.split(BATCH)]
        return {name: torch.cat([part[name].float() for part in parts]) for name in parts[0]}


class CachedSource:
    """Features on disk; made by `fill`.

    Args:
        files: for every view {name of a feature: its `FeatureStore`}.
        device: where the features are wanted.
    """

    def __init__(self, files: list[dict[str, FeatureStore]], device):
        self.files, self.device, self.views = files, device, len(files)

    def __len__(self) -> int:
        return next(iter(self.files[0].values())).count

    def fetch(self, view: int, positions: Tensor) -> dict[str, Tensor]:
        files = self.files[view % self.views]
        return {name: file[positions].to(self.device).float() for name, file in files.items()}


def plan(features: Features, images: ImageViews, views: int, folder: Path, model: dict, title: str):
    """The files that hold the features of every view, as they are on disk now; see `fill`.

    Args:
        model: what the encoder is, for the key.
        title: of the model, for the names of the files.

    Raises:
        ValueError: files of these names hold something else.
    """
    example = features(images.fetch(0, torch.arange(1)))
    encoder = {**model, "final_norm": features.apply_final_norm, "bf16": features.bf16}
    kinds, plans = {choice.name: [choice.kind, choice.options] for choice in features.choices or ()}, []
    for view in range(views):
        where, files = images.describe(view), {}
        for name, value in example.items():
            tokens = name.startswith(("tokens/", "attention/"))
            options = {} if tokens else {"pooler": kinds[name.rpartition("/")[0]]}
            described = {**encoder, **where, "feature": name, **options}
            dtype = torch.bfloat16 if tokens else torch.float32
            files[name] = FeatureStore(
                folder,
                f"{title}-{images.name}-view{view}-{name}",
                described,
                len(images),
                tuple(value.shape[1:]),
                dtype,
            )
        plans.append(files)
    return plans


def missing_bytes(plans: list[dict[str, FeatureStore]]) -> int:
    """What is still to be written."""
    return sum(file.missing_bytes for files in plans for file in files.values())


def fill(plans: list[dict[str, FeatureStore]], features: Features, images: ImageViews, workers: int = 0, advance=None):
    """Writes what is missing, each image encoded once a view; `advance` is told how many were encoded.

    What is there stays there when it is interrupted, and is not computed again.
    """
    for view, files in enumerate(plans):
        first = next(iter(files.values()))
        first.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(first.path.with_suffix(".lock")):  # of several processes one writes, the others wait
            for file in files.values():
                file.reread()
            fill_view(files, features, images, view, workers, advance)
        for file in files.values():
            images.whole.bad.flags[file.bad] = True


def fill_view(files: dict[str, FeatureStore], features: Features, images: ImageViews, view: int, workers: int, advance):
    at = min(file.done for file in files.values())
    if at == len(images):
        return
    bad = images.whole.bad
    try:
        for number, pixel_values in enumerate(images.batches(view, at, workers), start=1):
            for name, value in features(pixel_values).items():
                # Two files of one view may have been interrupted at different places.
                skip = files[name].done - at
                if skip < len(value):
                    files[name].append(value[skip:])
            at += len(pixel_values)
            if advance is not None:
                advance(len(pixel_values))
            if number % COMMIT == 0:
                commit(files, bad)
    finally:
        commit(files, bad)
        for file in files.values():
            file.close()


def commit(files: dict[str, FeatureStore], bad) -> None:
    for file in files.values():
        file.commit(bad.flags.nonzero().flatten().tolist())
