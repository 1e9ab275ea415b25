"""Poolers without parameters that select patches, by their place or by attention (Beyond [cls], 2412.03215)."""

from .encoder_base import Encoder, Grid, choose
from .options import at_least
from .pooler_base import Pooler


class CentralPooler(Pooler):
    """The mean of the `size` x `size` patches in the middle (`cp1` to `cp4` in the code of Beyond [cls], 2412.03215).
    Nothing is learned. As released where the grid's sides are even; with odd sides and size it is the true middle.

    Options:
        size: side of the square in patches, at least 1.
    """

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True, size: int = 2):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        at_least(1, size=size)
        self.size = size
        self._check(encoder.base_grid)

    def _check(self, grid: Grid):
        if self.size > min(grid):
            raise ValueError(f"size {self.size} is more than the {grid[0]}x{grid[1]} patches; choose 1 to {min(grid)}")

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        self._check(grid)
        top, left = ((length - self.size) // 2 for length in grid)
        weights = tokens.new_zeros(grid)
        weights[top : top + self.size, left : left + self.size] = 1 / self.size**2
        weights = weights.flatten().expand(tokens.shape[0], -1)
        return (weights[:, None] @ tokens[:, num_prefix_tokens:])[:, 0], weights


class ClsAttentionPooler(Pooler):
    """The patches weighed by the class token's attention (of several: their mean) in the encoder's last block, divided
    by its sum over patches
    (`attn-mn` and `attn-lcte` in the code of Beyond [cls], 2412.03215). Nothing is learned.

    Options:
        head: `mean` over the heads, or `lowest_entropy`, each image's head whose weights over the patches have it.
    """

    needs_attentions = True

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True, head: str = "mean"):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        if not (encoder.has_cls_token and encoder.has_attentions):
            raise ValueError(
                "pooler 'cls_attention' needs an encoder with a class token and attention; choose another, such as "
                "'mean', 'central', 'abmilp'"
            )
        self.head = choose("head", head, ("mean", "lowest_entropy"))
        self.num_cls_tokens = max(1, encoder.num_cls_tokens)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        if not attentions:
            raise ValueError("pooler 'cls_attention' needs the attentions of the encoder's last block, and got none")
        rows = (
            attentions[-1][:, :, : self.num_cls_tokens, num_prefix_tokens:].float().mean(2)
        )  # (batch, heads, patches)
        if self.head == "mean":
            rows = rows.mean(dim=1, keepdim=True)
        shares = rows / rows.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        entropy = -(shares * (shares + 1e-6).log()).sum(dim=-1, keepdim=True)
        weights = shares.take_along_dim(entropy.argmin(dim=1, keepdim=True), dim=1)[:, 0].to(tokens.dtype)
        return (weights[:, None] @ tokens[:, num_prefix_tokens:])[:, 0], weights


class CentralAttentionPooler(CentralPooler):
    """The patches weighed by what the `size` x `size` patches in the middle attend to in the encoder's last block: the
    mean over them and the heads, divided by its sum over patches (`ca1` to `ca4` in the code of Beyond [cls],
    2412.03215, but for a factor, the number of patches, by which that divides the sum). Nothing is learned."""

    needs_attentions = True

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True, size: int = 2):
        super().__init__(encoder, apply_final_norm=apply_final_norm, size=size)
        if not encoder.has_attentions or len(set(encoder.num_features)) > 1:  # Swin's is inside windows
            message = "needs an encoder with attention between all patches; choose 'central' or 'mean'"
            raise ValueError(f"pooler 'central_attention' {message}")

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        if not attentions or attentions[-1].shape[2] != tokens.shape[1]:
            raise ValueError(
                "pooler 'central_attention' needs what all patches attend to, and got less: probe it without poolers "
                "that learn, beside which only the class token's attention is kept"
            )
        _, queries = super().forward(tokens, num_prefix_tokens, grid)
        rows = attentions[-1].float().mean(dim=1)[:, num_prefix_tokens:, num_prefix_tokens:]
        weights = (queries[:, None].to(rows.dtype) @ rows)[:, 0]
        weights = (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)).to(tokens.dtype)
        return (weights[:, None] @ tokens[:, num_prefix_tokens:])[:, 0], weights
