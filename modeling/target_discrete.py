"""Codes of features as targets: the nearest entry of a codebook, predicted by cross-entropy (BEiT, 2106.08254)."""

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid, image_size
from .target_base import VISIBLE_NOTE, Target, code_colours, hidden_values, mean_over_hidden
from .target_morphing import wrap_features


def nearest_code(features: Tensor, codes: Tensor) -> Tensor:
    """(..., dim) features and (number, dim) codes -> (...) the index of the code at the least Euclidean distance."""
    # |f - c|^2 = |f|^2 - 2 f.c + |c|^2, the first of which is the same for every code
    return (codes.square().sum(1) - 2 * features @ codes.T).argmin(dim=-1)


def code_usage(counts: Tensor) -> tuple[float, int]:
    """How often each code occurs (codes,) -> the perplexity of that distribution, and how many never do."""
    share = counts.double() / counts.sum()
    return torch.special.entr(share).sum().exp().item(), int((counts == 0).sum())


class DiscreteTokenTarget(Target):
    """The index of the codebook entry nearest to a token's features (BEiT v2, 2208.06366).

    Options:
        features: the target whose features are coded: {"name": ..., and its options}.
        codebook: a safetensors file with `codes` (number, dim), as `hf-mim codebook` writes it.
        num_codes: how many there are; filled in with the first model that is built.
    """

    token_features = False
    image_note = f"{VISIBLE_NOTE} Each code has a colour of its own; tokens of one colour have one code."

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        features: dict | None = None,
        codebook: str | None = None,
        num_codes: int | None = None,
    ):
        super().__init__()
        self.wrapped = wrap_features("discrete_token", config, encoder, features)
        self.codebook_file, self.features = codebook, dict(features or {})
        self.codes: Tensor | None = None  # a plain attribute: no part of the published weights
        self.counts: Tensor | None = None  # how often each code was a token's target in training, since `log_metrics`
        self.num_codes = num_codes or 0  # 0: as many as the codebook has
        self.num_codes = self.num_codes or len(self.load_codes())
        self.outputs = {"patches": self.num_codes}

    def options_to_save(self) -> dict:
        return {"num_codes": self.num_codes, "features": {**self.features, **self.wrapped.options_to_save()}}

    def load_codes(self) -> Tensor:
        """The codebook (number, dim), read once.

        Raises:
            ValueError: there is none, it is of another dimension than the features, or of another number of codes than
                the model predicts.
        """
        if self.codes is None:
            if self.codebook_file is None:
                raise ValueError("target 'discrete_token' needs target_config.codebook; make one with hf-mim codebook")
            try:
                codes = load_file(self.codebook_file)["codes"].float()
            except (OSError, KeyError, SafetensorError) as error:
                raise ValueError(f"{self.codebook_file} is not a codebook: {error}") from error
            dim = self.wrapped.outputs["patches"]
            if codes.ndim != 2 or codes.shape[1] != dim:
                raise ValueError(
                    f"the codebook {self.codebook_file} has codes of shape {tuple(codes.shape)}, the features have "
                    f"{dim} channels; fit one on the same features with hf-mim codebook"
                )
            if self.num_codes not in (0, len(codes)):
                raise ValueError(
                    f"the codebook {self.codebook_file} has {len(codes)} codes, and target_config.num_codes is "
                    f"{self.num_codes}: a model predicts as many codes as it was made for"
                )
            self.codes = codes
        return self.codes

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        """-> {"patches": (batch, tokens, 1)}, integers."""
        features = self.wrapped.targets(pixel_values, grid)["patches"].float()
        codes = self.load_codes().to(features.device)
        index = nearest_code(features, codes)
        if self.training:
            if self.counts is None or self.counts.device != index.device:
                self.counts = torch.zeros(self.num_codes, dtype=torch.long, device=index.device)
            self.counts.index_add_(0, index.flatten(), torch.ones_like(index.flatten()))  # waits for no GPU
        return {"patches": index[..., None]}

    def loss(self, predictions, targets, bool_masked_pos, grid, generator=None) -> Tensor:
        logits = predictions["patches"].float()
        target, weight = hidden_values(targets["patches"], bool_masked_pos, logits.shape[1])
        losses = F.cross_entropy(logits.transpose(1, 2), target[..., 0], reduction="none")
        return mean_over_hidden(losses, None if weight is None else bool_masked_pos.float())

    def usage(self, values: Tensor) -> tuple[float, int]:
        """Of codes (batch, tokens, 1): the perplexity of their distribution, and how many are never used."""
        return code_usage(torch.bincount(values.flatten(), minlength=self.num_codes))

    @torch.no_grad()
    def reduce_metrics(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.counts is None or not distributed:
            return
        torch.distributed.reduce(self.counts, 0)
        if torch.distributed.get_rank() > 0:
            self.counts.zero_()

    def log_metrics(self) -> dict[str, float]:
        """The perplexity of the codes and how many were never used, once each could have been used ten times."""
        if self.counts is None or self.counts.sum() < 10 * self.num_codes:
            return {}
        perplexity, dead = code_usage(self.counts)
        self.counts.zero_()
        return {"code_perplexity": perplexity, "dead_codes": dead}

    def to_image(self, values, pixel_values, grid, bool_masked_pos=None) -> Tensor:
        """Codes (batch, tokens, 1), or logits (batch, tokens, codes), whose largest is shown."""
        index = values[..., 0].long() if values.shape[-1] == 1 else values.argmax(dim=-1)
        return code_colours(index, self.num_codes, grid, image_size(pixel_values))
