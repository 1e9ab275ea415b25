"""Whether the tokens of an image agree with each other and with it, before and after merging similar ones (DTM,
2401.00254, section 3; the protocol is this project's, the paper's is not fully known here)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.analysis.measurement import Averages, Measurement, Setting
from hf_mim.analysis.numbers import percent
from hf_mim.modeling.encoder_base import Grid
from hf_mim.modeling.morphing import even_schedule, match_tokens


ITERATIONS = 2  # the fewest in which half of the tokens can be merged away: each takes fewer than half
MERGES = {"plain": "as they are", "morphed": "similar tokens merged to half", "random": "random tokens merged to half"}
NUMBERS = {
    "neighbour_agreement": "neighbouring tokens of the same class",
    "image_agreement": "tokens of the class of their mean",
    "token_accuracy": "tokens of the image's class",
    "global_cosine": "cosine of a token and the mean token",
}


def neighbour_agreement(predicted: Tensor, grid: Grid) -> Tensor:
    """(batch, rows * cols) classes -> (batch,), the share of pairs of 4-neighbours that agree."""
    cells = predicted.view(-1, *grid)
    down, right = cells[:, 1:] == cells[:, :-1], cells[:, :, 1:] == cells[:, :, :-1]
    pairs = max(down[0].numel() + right[0].numel(), 1)
    return (down.sum(dim=(1, 2)) + right.sum(dim=(1, 2))) / pairs


def merge_half(tokens: Tensor, matching: str, seeds: list[int]) -> Tensor:
    """(batch, tokens, dim) -> the same shape: half as many groups, every token replaced by the mean of its group.

    Image by image, with a seed of its own: what is drawn must not depend on who else is in the batch.
    """
    schedule, merged = even_schedule(tokens.shape[1], tokens.shape[1] // 2, ITERATIONS), []
    for image, seed in zip(tokens, seeds):
        generator = torch.Generator().manual_seed(seed)
        groups = match_tokens(image[None], schedule, matching=matching, generator=generator)
        merged.append(groups.means(image[None])[0, groups.index[0]])
    return torch.stack(merged)


class Consistency(Measurement):
    """Every final patch token v_i gets the class of the nearest prototype by cosine; prototypes are the classes' mean
    pooled features on other, labelled images. Per image, then means over images: the share of 4-neighbours with the
    same class; of tokens with the class of their mean token; of tokens with the image's class; whether the mean token
    has it; the mean cosine of a token to the mean token.

    Each also after morphing N -> N / 2 tokens in two iterations (training's size-weighted means), a token then having
    the class of its group's mean, and after merging random tokens instead: agreement rises with any merging, so what
    morphing does is its difference from the random control.
    """

    title = "Spatial consistency"
    needs_prototypes = True
    normal = (
        "Merging similar tokens should make neighbours agree more than merging as many at random does. Random merging "
        "draws every token towards the mean token, which alone raises token accuracy. A sign of trouble is a token "
        "accuracy near chance while the image accuracy is high (only the mean means something), or neighbours that "
        "agree no more after morphing than after random merging: similar tokens then share no meaning."
    )

    def __init__(self, model, setting: Setting):
        super().__init__(model, setting)
        self.averages, self.count = Averages(), 0
        if setting.prototypes is None:
            self.absent = "It needs class prototypes, and the images have no labels."
        elif math.prod(setting.grid) < 4:
            self.absent = f"This encoder ends in {setting.grid[0]}x{setting.grid[1]} tokens, too few to compare them."
        else:
            self.known = setting.prototypes.abs().sum(dim=1) > 0
            self.prototypes = F.normalize(setting.prototypes, dim=1)
            if self.known.sum() < 2:
                self.absent = "It needs prototypes of at least two classes."

    def classes_of(self, tokens: Tensor) -> Tensor:
        """(..., dim) -> (...), the class of the nearest prototype."""
        # The length of a token does not change which cosine is the largest.
        return (tokens @ self.prototypes.T).masked_fill(~self.known, -torch.inf).argmax(dim=-1)

    def update(self, seen) -> None:
        tokens, mean = seen.final.tokens, seen.final.mean
        labels, by_mean = seen.labels.to(tokens.device), self.classes_of(mean)
        self.averages.add("image_accuracy", 0, (by_mean == labels).float())
        numbers = range(seen.first, seen.first + len(tokens))
        seeds = [self.setting.seed * 1_000_003 + number for number in numbers]
        for merge in MERGES:
            merged = tokens
            if merge != "plain":
                merged = merge_half(tokens, "similar" if merge == "morphed" else "random", seeds)
            predicted = self.classes_of(merged)
            cosines = F.cosine_similarity(merged, mean[:, None], dim=2)
            for name, values in (
                ("neighbour_agreement", neighbour_agreement(predicted, seen.final.grid)),
                ("image_agreement", (predicted == by_mean[:, None]).float().mean(dim=1)),
                ("token_accuracy", (predicted == labels[:, None]).float().mean(dim=1)),
                ("global_cosine", cosines.mean(dim=1)),
            ):
                self.averages.add(f"{name}_{merge}", 0, values)
        self.count += len(tokens)

    def result(self) -> dict:
        scalars = {"image_accuracy": self.averages.scalar("image_accuracy", "images whose mean token has their class")}
        for name, title in NUMBERS.items():
            for merge, merge_title in MERGES.items():
                scalars[f"{name}_{merge}"] = self.averages.scalar(f"{name}_{merge}", f"{title}, {merge_title}")
        for name, scalar in scalars.items():
            scalar["unit"] = "cosine" if name.startswith("global") else "share"
        shares = {name: percent(scalar["value"]) for name, scalar in scalars.items()}
        missing = int((~self.known).sum())
        return {
            "title": self.title,
            "summary": f"{shares['token_accuracy_plain']} of the tokens have the class of their image, and "
            f"{shares['image_accuracy']} of the images by their mean token. {shares['neighbour_agreement_plain']} of "
            f"neighbours agree; {shares['neighbour_agreement_morphed']} once similar tokens are merged to half, "
            f"{shares['neighbour_agreement_random']} once random ones are."
            + (f" {missing} of {len(self.known)} classes had no image to make a prototype of." if missing else ""),
            "normal": self.normal,
            "images": self.count,
            "scalars": scalars,
        }
