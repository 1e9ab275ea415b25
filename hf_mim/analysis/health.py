"""Whether features use their dimensions: effective rank, RankMe, dead dimensions, and tokens of outlying norm."""

import torch
from torch import Tensor

from hf_mim.analysis.measurement import Averages, Layer, Measurement, Setting, number
from hf_mim.analysis.numbers import percent, readable


OUTLIER = 3.0  # a token is an outlier whose norm is so many times the median of its image (2309.16588 shows such)
DEAD = 0.01  # a channel is dead whose standard deviation is below this share of the channels' root mean square
RANKME_EPS = 1e-7  # as in the paper, 2210.02885, equation 1


class Moments:
    """Sums of (images, dim) and of their outer products, in float64 and in memory that does not grow with them."""

    def __init__(self):
        self.count = 0
        self.total = self.products = torch.zeros(())

    def add(self, features: Tensor) -> None:
        features = features.cpu().double()
        self.count += len(features)
        self.total = self.total + features.sum(dim=0)
        self.products = self.products + features.T @ features

    def singular_values(self, centred: bool) -> Tensor:
        """Of the (images, dim) matrix, or of it less its mean; those that may differ from zero, descending."""
        gram = self.products
        if centred:
            gram = gram - torch.outer(self.total, self.total) / self.count
        rank = min(self.count - int(centred), len(gram))
        return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)[:rank]


def rank_of(singular_values: Tensor, eps: float = 0.0) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007); 0 if all are zero."""
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    shares = singular_values / total + eps
    return torch.exp(-torch.special.xlogy(shares, shares).sum()).item()


class FeatureHealth(Measurement):
    """effective_rank: exp of the entropy of the singular values of the centred features (images, dim), the mean patch
    token of an image; a curve over the blocks, and a number after the final norm. rankme (2210.02885): the same of the
    features as they are. dead_dimensions: channels of the final patch tokens whose standard deviation over all tokens
    is below 1 % of the root mean square over the channels. norm_outliers: the share of patch tokens whose norm is more
    than 3 times the median of their image, per block, and largest_norm, the largest norm over that median.
    """

    title = "Feature health"
    normal = (
        "Healthy features use many dimensions, have no dead ones, and no tokens whose norm stands out. A sign of "
        "trouble is any of these failing where the untrained encoder's does not; what is usual for each number is said "
        "with it."
    )

    def __init__(self, model, setting: Setting):
        super().__init__(model, setting)
        self.averages, self.final = Averages(), Moments()
        self.blocks: list[Moments] = []
        self.squares = torch.zeros(())

    def layer(self, index: int, layer: Layer) -> None:
        if index == len(self.blocks):
            self.blocks.append(Moments())
        self.blocks[index].add(layer.mean)
        median = layer.norms.median(dim=1, keepdim=True).values.clamp(min=1e-12)
        relative = layer.norms / median
        self.averages.add("norm_outliers", index, (relative > OUTLIER).float().mean(dim=1))
        self.averages.add("largest_norm", index, relative.amax(dim=1))

    def update(self, seen) -> None:
        self.final.add(seen.final.mean)
        # Around the image's mean and then around all: the difference of two large sums would lose a small variance.
        self.squares = self.squares + seen.final.centred.square().mean(dim=1).cpu().double().sum(dim=0)

    def deviations(self) -> Tensor:
        """(dim,), the standard deviation of every channel over all tokens of all images."""
        count = self.final.count
        between = self.final.products.diagonal() / count - (self.final.total / count).square()
        return (self.squares / count + between.clamp(min=0)).sqrt()

    def result(self) -> dict:
        ranks = [rank_of(moments.singular_values(centred=True)) for moments in self.blocks]
        final = rank_of(self.final.singular_values(centred=True))
        rankme = rank_of(self.final.singular_values(centred=False), RANKME_EPS)
        deviations = self.deviations()
        dead = int((deviations <= DEAD * deviations.square().mean().sqrt()).sum())
        dims, max_rank = len(deviations), min(len(deviations), self.final.count - 1)
        last, blocks = max(self.averages.sums["norm_outliers"]), list(range(len(ranks)))
        share = self.averages.mean("norm_outliers", last)
        rank_curve = {"x": blocks, "mean": ranks, "low": None, "high": None, "x_label": "block", "unit": "dimensions"}
        return {
            "title": self.title,
            "summary": f"The features of {self.final.count} images spread over {readable(final)} of at most {max_rank} "
            f"dimensions; {dead} of {dims} dimensions are dead; {percent(share)} of the tokens after the last block "
            "have an outlying norm.",
            "normal": self.normal,
            "images": self.final.count,
            "curves": {
                "effective_rank": {**rank_curve, "y_label": "effective rank", "title": "effective rank per block"},
                "norm_outliers": self.averages.curve(
                    "norm_outliers",
                    f"tokens with more than {OUTLIER:g} times the median norm",
                    "share of tokens",
                    "share",
                ),
                "largest_norm": self.averages.curve("largest_norm", "largest norm over the median", "ratio of norms"),
            },
            "scalars": {**self._ranks(final, rankme), **self._faults(dead, dims, last)},
        }

    def _ranks(self, final: float, rankme: float) -> dict:
        dims, images = len(self.final.products), self.final.count
        return {
            "effective_rank": number(
                "effective rank of the centred features",
                final,
                f"dimensions of at most {min(dims, images - 1)}",
                "No value is right for all: training usually raises it above the untrained encoder's. A few dimensions "
                "only are a sign of collapse: images differ along hardly any direction.",
            ),
            "rankme": number(
                "RankMe",
                rankme,
                f"dimensions of at most {min(dims, images)}",
                "Like the effective rank, but the mean counts too: it is much lower where all images share one "
                "direction. The paper finds that encoders of one kind with a higher one probe better.",
            ),
        }

    def _faults(self, dead: int, dims: int, last: int) -> dict:
        return {
            "dead_dimensions": number(
                "dead dimensions",
                dead,
                f"of {dims}",
                "None is normal. Many are capacity that training gave up, or that was never reached.",
            ),
            "norm_outliers": self.averages.scalar(
                "norm_outliers",
                f"tokens after the last block with more than {OUTLIER:g} times their image's median norm",
                "share",
                "None or hardly any is normal in small encoders. One or two in a hundred is what large ones without "
                "registers do: they keep notes on the whole image in blank patches, which blurs attention maps.",
                last,
            ),
        }
