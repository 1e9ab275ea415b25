"""From tokens to one vector per image. A pooler is a class in `POOLERS`."""

import torch
from torch import Tensor, nn
from transformers import initialization as init


Grid = tuple[int, int]


class Pooler(nn.Module):
    """Made as `Pooler(encoder, *, apply_final_norm=True, **options)`.

    `apply_final_norm` says whether the pooler sees the tokens after the encoder's last norm.
    """

    out_dim: int

    def __init__(self, encoder, *, apply_final_norm: bool = True):
        super().__init__()
        self.apply_final_norm = apply_final_norm
        self.out_dim = encoder.hidden_size

    def forward(
        self, tokens: Tensor, num_prefix_tokens: int, grid: Grid, attentions: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (batch, prefix + rows * cols, dim) -> the vector (batch, out_dim), and the weights of the patches
        (batch, rows * cols) or of heads and patches (batch, heads, rows * cols), None where there are none."""
        raise NotImplementedError


class ClsPooler(Pooler):
    """The class token."""

    def __init__(self, encoder, *, apply_final_norm: bool = True):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        if not encoder.has_cls_token:
            raise ValueError("pooler 'cls' needs an encoder with a class token; choose another, such as 'mean'")

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        return tokens[:, 0], None


class MeanPooler(Pooler):
    """The mean of the patch tokens."""

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        return tokens[:, num_prefix_tokens:].mean(dim=1), None


class MaxPooler(Pooler):
    """The largest value of each channel over the patch tokens."""

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        return tokens[:, num_prefix_tokens:].amax(dim=1), None


class GemPooler(Pooler):
    """The generalised mean (mean of max(x, eps)^p)^(1/p) of each channel with one learned p (1711.02512).

    Values below `eps` count as `eps`: made for features without negative values.
    """

    def __init__(self, encoder, *, apply_final_norm: bool = True, p: float = 3.0, eps: float = 1e-6):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        self.initial_p, self.eps = float(p), eps
        self.p = nn.Parameter(torch.full((1,), self.initial_p))

    def init_parameters(self):
        init.constant_(self.p, self.initial_p)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        # In float32: the p-th powers of small values underflow in half precision.
        patches, p = tokens[:, num_prefix_tokens:].float().clamp(min=self.eps), self.p.float()
        return patches.pow(p).mean(dim=1).pow(1 / p).to(tokens.dtype), None


POOLERS = {"cls": ClsPooler, "mean": MeanPooler, "max": MaxPooler, "gem": GemPooler}
