"""The contract of a pooler."""

from torch import Tensor, nn

from .encoder_base import Encoder, Grid


class Pooler(nn.Module):
    """Made as `Pooler(encoder, *, apply_final_norm=True, **options)`. A pooler with `needs_attentions` reads the
    attention of the encoder's last block, which the model computes for it.

    Options:
        apply_final_norm: whether the pooler sees the tokens after the encoder's last norm, or before it.
    """

    out_dim: int
    needs_attentions = False
    # Whether probes train it in bfloat16, where the device has that. A pooler that says so spends its time on products
    # of all tokens, and sums its vector in float32 under autocast: vectors differ by little from image to image.
    trains_in_bf16 = False

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True):
        super().__init__()
        encoder.check_final_norm(apply_final_norm)
        self.apply_final_norm = apply_final_norm
        self.out_dim = encoder.hidden_size

    def forward(
        self, tokens: Tensor, num_prefix_tokens: int, grid: Grid, attentions: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (batch, prefix + rows * cols, dim) -> the vector (batch, out_dim), and the patches' weights, which sum
        to one, (batch, rows * cols) or (batch, heads or queries, rows * cols), None where there are none.

        attentions: for `needs_attentions`. The last entry is read, (batch, heads, length, length) with length =
        prefix + rows * cols; `cls_attention` needs the class token's row only, of several their mean, so that a cache
        may keep that alone.
        """
        raise NotImplementedError
