"""What the demo shows of an image: reconstruction, attention, and the images that are like it. Without Gradio."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from hf_mim.modeling.masking import sample_masks
from hf_mim.modeling.modeling_mim import MIMForPreTraining, MIMModel
from hf_mim.modeling.options import pair
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_model, model_type_of, read_config
from hf_mim.training.commands.embed import Embedder, open_splits
from hf_mim.training.commands.search import read_pixels
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.device import best_device, on_device
from hf_mim.training.common.titles import name_of
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.splits import draw_subset
from hf_mim.training.data.transforms import sample_rng
from hf_mim.training.own_data import chosen_data, own_data
from hf_mim.training.plots.pictures import to_tiles


NEIGHBOURS = 8
SEARCHED = 1000  # images among which neighbours are looked for
Picture = tuple[PIL.Image.Image, str]  # and its caption


@dataclass
class Demo:
    """A model, and images to find neighbours among.

    Args:
        model: None where the checkpoint cannot predict: it has no decoder, or is one of transformers.
        images: those that are searched; their vectors (images, dim) have length 1.
    """

    title: str
    embedder: Embedder
    model: MIMForPreTraining | None
    data: DataArguments
    images: MIMDataset
    chosen: list[int]
    vectors: np.ndarray = field(repr=False)

    @classmethod
    def load(cls, source: str, overrides: Sequence[str] = (), searched: int = SEARCHED) -> "Demo":
        """
        Args:
            source: a checkpoint of this project or a vision model of transformers: a folder, a URL or an id on the Hub.
            overrides: of the section `data`; by default the images are those of the run, or those that ship.
            searched: how many of them, drawn at random.

        Raises:
            ValueError, OSError: the model or the data cannot be read.
        """
        console = RunConsole()
        base = {"data": own_data([source], chosen_data(overrides), console)}
        (data,) = recipes.read_sections(overrides, base, data=DataArguments)
        embedder = Embedder.load(source, "mean", -1)
        splits, data = open_splits(data, embedder.model)
        images = splits["test"] if "test" in splits else next(iter(splits.values()))
        chosen = draw_subset(len(images), searched).tolist()
        with console.status(f"looking at {len(chosen)} images"):
            vectors = embed_all(embedder, images, chosen)
        return cls(name_of(source), embedder, load_predictor(source), data, images, chosen, vectors)

    @property
    def encoder(self) -> MIMModel:
        return self.embedder.model

    @property
    def ratio(self) -> float:
        """The mask ratio that the model was trained with."""
        return self.encoder.config.options("masking").get("ratio", 0.75)

    @property
    def shows_attention(self) -> bool:
        return bool(self.encoder.encoder.has_attentions)

    def prepare(self, path: str | Path) -> tuple[Tensor, Tensor]:
        """A file as the model sees it: pixels (1, channels, height, width), uint8, and `pixel_values`."""
        pixels = read_pixels(Path(path), self.embedder, self.data)
        return pixels, self.normalize(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        config = self.encoder.config
        mean, std = (torch.tensor(values)[:, None, None] for values in config.statistics())
        return ((pixels / 255 - mean) / std).to(self.encoder.device)

    # ---- looks -----------------------------------------------------------------------------------------------------
    def reconstruct(self, path: str | Path, ratio: float, seed: int = 0) -> list[Picture]:
        """The image, what the model sees with this share of patches hidden, its prediction, and both together."""
        if self.model is None:
            return []
        _, pixel_values = self.prepare(path)
        config = copy.copy(self.model.config)
        config.masking_config = {**config.options("masking"), "ratio": ratio}
        config.masks_per_image = 1
        grid = self.model.mask_grid(*pair(config.image_size))
        masks = sample_masks(config, grid, [sample_rng(seed, 0, 0)]).to(pixel_values.device)
        shown = self.model.reconstruct(pixel_values, masks)
        pictures = {
            "image": shown.original,
            "what the model sees": shown.masked,
            "prediction": shown.prediction,
            "prediction with the visible patches": shown.combined,
        }
        return [(to_tiles(picture)[0], caption) for caption, picture in pictures.items() if picture is not None]

    @torch.no_grad()
    def attention(self, path: str | Path) -> list[Picture]:
        """How much the last block attends to each patch: from the class token, else from all patches, head by head."""
        if not self.shows_attention:
            return []
        pixels, pixel_values = self.prepare(path)
        encoder = self.encoder.encoder
        weights = encoder(pixel_values, None, False, True).attentions[-1][0].float().cpu()
        prefix, grid = encoder.num_prefix_tokens, encoder.token_grid(*pixel_values.shape[2:])
        row = weights[:, 0] if encoder.has_cls_token else weights[:, prefix:].mean(dim=1)
        maps = row[:, prefix:].unflatten(1, grid)
        maps = torch.cat([maps.mean(dim=0, keepdim=True), maps])
        names = ["mean of the heads", *(f"head {head}" for head in range(len(maps) - 1))]
        return [(overlay(pixels[0], values), name) for values, name in zip(maps, names)]

    def neighbours(self, path: str | Path, count: int = NEIGHBOURS) -> list[Picture]:
        """The images with the largest cosine similarity, and it."""
        _, pixel_values = self.prepare(path)
        (vector,) = unit(self.embedder(pixel_values))
        similarity = self.vectors @ vector
        best = np.argsort(-similarity, kind="stable")[:count]
        pictures = []
        for position in best:
            index = self.chosen[position]
            label = "" if self.images.labels is None else f"{self.images.classes[int(self.images.labels[index])]}, "
            (batch,) = self.images.__getitems__([index])
            pictures.append((to_tiles(shown_channels(batch.images))[0], f"{label}{similarity[position]:.2f}"))
        return pictures


def load_predictor(source: str) -> MIMForPreTraining | None:
    """The whole model of a checkpoint of pretraining; None of others."""
    trained = "MIMForPreTraining" in (read_config(source).get("architectures") or ())
    if model_type_of(source) != "mim" or not trained:
        return None
    return on_device(load_model(source).float().eval(), best_device())


def embed_all(embedder: Embedder, images: MIMDataset, chosen: list[int]) -> np.ndarray:
    """(images, dim), each of length 1."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(images, chosen), 64, collate_fn=MIMCollator(embedder.model.config)
    )
    return unit(np.concatenate([embedder(batch["pixel_values"]) for batch in loader]))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def shown_channels(pixels: Tensor) -> Tensor:
    """(batch, channels, height, width), uint8 -> (batch, 1 or 3, height, width) in [0, 1]."""
    return pixels[:, : 3 if pixels.shape[1] >= 3 else 1] / 255


def overlay(pixels: Tensor, values: Tensor) -> PIL.Image.Image:
    """An image (channels, height, width) under a map (rows, cols): bright where it is large, dark where it is not."""
    shares = values / values.max().clamp(min=1e-12)
    size = pixels.shape[1:]
    light = torch.nn.functional.interpolate(shares[None, None], size=size, mode="bilinear", align_corners=False)
    return to_tiles(shown_channels(pixels[None]) * (0.15 + 0.85 * light))[0]
