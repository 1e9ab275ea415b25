"""What the transformer encoder and decoders are made of: positions, attention, blocks."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend, attend_short, parts_of, takes_short
from .configuration_base import MIMConfigBase
from .mlp import MLP
from .options import Grid


# --- positions ---------------------------------------------------------------------------------------------------


def coordinates(grid: Grid, base: Grid, device=None) -> tuple[Tensor, Tensor]:
    """Row and column of every token of `grid`, in units of the tokens of `base`, (rows * cols,) float32 each.

    A grid of another size covers the same picture: its cell centres are expressed in the cells of the base grid, so
    that a position keeps its meaning at another resolution.
    """
    axes = [(torch.arange(n, device=device, dtype=torch.float32) + 0.5) * b / n - 0.5 for n, b in zip(grid, base)]
    rows, cols = torch.meshgrid(*axes, indexing="ij")
    return rows.flatten(), cols.flatten()


def sincos_2d(grid: Grid, base: Grid, dim: int, device=None) -> Tensor:
    """Fixed 2-D sin-cos positions (rows * cols, dim) in float32, in the layout of the released MAE code:
    sine and cosine of the column, then of the row. `dim` must be divisible by 4."""
    rows, cols = coordinates(grid, base, device)
    frequencies = 10000.0 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    angles = [axis[:, None] * frequencies for axis in (cols, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def rotary_2d(grid: Grid, base: Grid, head_dim: int, device=None) -> tuple[Tensor, Tensor]:
    """Cosine and sine (rows * cols, head_dim) of axial rotary positions: a quarter of the channels' frequencies for
    the row, a quarter for the column, each used by two channels (RoPE-ViT, 2403.13298, axial, base 100)."""
    frequencies = 100.0 ** -(torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4))
    angles = torch.cat([axis[:, None] * frequencies for axis in coordinates(grid, base, device)], dim=1).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotary_normalized_2d(grid: Grid, head_dim: int, device=None) -> tuple[Tensor, Tensor]:
    """As `rotary_2d`, with coordinates that run from -1 to 1 over the picture, times 2 pi (DINOv3, 2508.10104)."""
    scaled = [(2 * math.pi * (2 * axis + 1 - n)) / n for axis, n in zip(coordinates(grid, grid, device), grid)]
    frequencies = 100.0 ** -(torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4))
    angles = torch.cat([axis[:, None] * frequencies for axis in scaled], dim=1).repeat(1, 2)
    return angles.cos(), angles.sin()


class FixedTables:
    """A function of (grid, device) without parameters, computed once for each. (A buffer would come back as garbage
    from `from_pretrained`, which builds models without memory.)"""

    def __init__(self, make):
        self.make = make
        self.tables = {}

    def __call__(self, grid: Grid, device: torch.device):
        if torch.compiler.is_compiling():
            return self.make(grid, device=device)
        if (grid, device) not in self.tables:
            with torch.inference_mode(False), torch.no_grad():
                self.tables[grid, device] = self.make(grid, device=device)
        return self.tables[grid, device]


@lru_cache(maxsize=64)
def channel_values(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A number of each channel as (channels, 1, 1) float32, made once for each device: to copy numbers to a GPU waits
    for everything that it still has to do."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=torch.float32)[:, None, None]


def rotate(tokens: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Applies `rotary_2d` to the last tokens of (batch, heads, length, head_dim): those before have no position.

    `rotary` is (patches, head_dim) or (batch, 1, patches, head_dim) where each image keeps other patches.
    """
    cos, sin = (table.to(tokens.dtype) for table in rotary)
    prefix = tokens.shape[2] - cos.shape[-2]
    patches = tokens[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    patches = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([tokens[:, :, :prefix], patches], dim=2)


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (batch or 1, length, dim), index (batch, kept) -> (batch, kept, dim)."""
    if tokens.shape[0] == 1:
        return tokens[0][index]
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class LearnedPositions(nn.Module):
    """A learned vector for every token of the base grid, resized bicubically in two dimensions for other grids."""

    def __init__(self, base: Grid, dim: int):
        super().__init__()
        self.base = base
        self.table = nn.Parameter(torch.zeros(base[0] * base[1], dim))

    def init_parameters(self):
        init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """-> (1, rows * cols, dim)"""
        if grid == self.base:
            return self.table[None]
        return resize_table(self.table, self.base, grid)[None]


def resize_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """(rows * cols, channels) on the grid `old` -> on the grid `new`; bicubic with antialiasing, in float32."""
    image = table.float().T.reshape(1, -1, *old)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
    return image.flatten(2)[0].T.to(table.dtype)


class RelativePositionBias(nn.Module):
    """A learned bias on the attention logits for every 2-D offset between two patches, one per head (BEiT,
    2106.08254). Prefix tokens have no place: they share one bias from, one to and one among them."""

    def __init__(self, base: Grid, num_heads: int):
        super().__init__()
        self.base = base
        self.table = nn.Parameter(torch.zeros((2 * base[0] - 1) * (2 * base[1] - 1), num_heads))
        self.prefix = nn.Parameter(torch.zeros(3, num_heads))  # prefix to patch, patch to prefix, prefix to prefix

    def init_parameters(self):
        init.zeros_(self.table)
        init.zeros_(self.prefix)

    def forward(self, grid: Grid, num_prefix: int, visible_index: Tensor | None = None) -> Tensor:
        """-> (1 or batch, heads, length, length), to be added to the logits; `visible_index` (batch, visible)."""
        old, new = ((2 * rows - 1, 2 * cols - 1) for rows, cols in (self.base, grid))
        table = self.table if grid == self.base else resize_table(self.table, old, new)
        rows, cols = (axis.long() for axis in coordinates(grid, grid, table.device))
        index = (rows[:, None] - rows + grid[0] - 1) * new[1] + cols[:, None] - cols + grid[1] - 1
        index = index[None] + 3
        if visible_index is not None:
            index = index[0][visible_index[:, :, None], visible_index[:, None, :]]
        index = F.pad(index, (num_prefix, 0, num_prefix, 0), value=2)
        index[:, :num_prefix, num_prefix:] = 0
        index[:, num_prefix:, :num_prefix] = 1
        return torch.cat([self.prefix, table])[index].permute(0, 3, 1, 2)


# --- attention ---------------------------------------------------------------------------------------------------


class ViTAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    is_causal = False

    def __init__(self, config: MIMConfigBase, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size {dim} is not divisible by num_attention_heads {num_heads}")
        self.config = config
        self.num_heads = num_heads
        self.scaling = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else None for _ in "qk")

    def forward(
        self, tokens: Tensor, position_bias=None, rotary=None, num_queries: int | None = None, output_attentions=False
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (batch, length, dim) -> (batch, length or num_queries, dim), and the weights or None."""
        query, rest = self._project(tokens, num_queries)
        plain = position_bias is None and rotary is None and self.q_norm is None and not output_attentions
        if plain and takes_short(self, rest):
            return self.proj(attend_short(rest, query, self.scaling)), None
        query, key, value = (part.transpose(1, 2) for part in parts_of(rest, query))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        out, weights = attend(self, query, key, value, position_bias, output_attentions)
        return self.proj(out), weights

    def _project(self, tokens: Tensor, num_queries: int | None) -> tuple[Tensor | None, Tensor]:
        """-> None, and queries, keys and values (batch, length, 3, heads, head_dim); with `num_queries`, queries
        (batch, num_queries, heads, head_dim), and keys and values (batch, length, 2, heads, head_dim)."""
        batch, length, dim = tokens.shape
        if num_queries is None:
            return None, self.qkv(tokens).view(batch, length, 3, self.num_heads, -1)
        weights, biases = (values.split((dim, 2 * dim)) for values in (self.qkv.weight, self.qkv.bias))
        query, rest = (
            F.linear(part, weight, bias)
            for part, weight, bias in zip((tokens[:, -num_queries:], tokens), weights, biases)
        )
        return query.view(batch, num_queries, self.num_heads, -1), rest.view(batch, length, 2, self.num_heads, -1)


class CrossAttention(nn.Module):
    """Multi-head attention of queries (batch, queries, dim) to a context (batch, length, dim)."""

    is_causal = False

    def __init__(self, config: MIMConfigBase, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size {dim} is not divisible by num_attention_heads {num_heads}")
        self.config = config
        self.num_heads = num_heads
        self.scaling = (dim // num_heads) ** -0.5
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        batch, length, _ = context.shape
        query = self.query(queries).view(batch, queries.shape[1], self.num_heads, -1)
        rest = self.key_value(context).view(batch, length, 2, self.num_heads, -1)
        if takes_short(self, rest):
            return self.proj(attend_short(rest, query, self.scaling))
        query, key, value = (part.transpose(1, 2) for part in parts_of(rest, query))
        return self.proj(attend(self, query, key, value)[0])


# --- blocks ------------------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Drops a residual branch for whole images in training, with probability `rate` (stochastic depth)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], *(1,) * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * keep.to(branch.dtype) / (1 - self.rate)


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, 2103.17239)."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.value = value
        self.scale = nn.Parameter(torch.full((dim,), float(value)))

    def init_parameters(self):
        init.constant_(self.scale, self.value)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.scale


class ViTLayer(GradientCheckpointingLayer):
    """A transformer block. Its norms stand before each branch, or with `post_norm` behind each sum."""

    def __init__(
        self,
        config: MIMConfigBase,
        dim: int,
        num_heads: int,
        intermediate_size: int,
        mlp: str = "gelu",
        qk_norm: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        post_norm: bool = False,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = ViTAttention(config, dim, num_heads, qk_norm)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, intermediate_size, mlp)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, tokens: Tensor, position_bias=None, rotary=None, num_queries: int | None = None, output_attentions=False
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (batch, length, dim) -> the same, or the last `num_queries` of them, and the attention weights."""
        entering = tokens if self.post_norm else self.norm1(tokens)
        branch, weights = self.attention(entering, position_bias, rotary, num_queries, output_attentions)
        if num_queries is not None:
            tokens = tokens[:, -num_queries:]
        tokens = tokens + self.drop_path(self.scale1(branch))
        if self.post_norm:
            tokens = self.norm1(tokens)
            return self.norm2(tokens + self.drop_path(self.scale2(self.mlp(tokens)))), weights
        return tokens + self.drop_path(self.scale2(self.mlp(self.norm2(tokens)))), weights


class CrossLayer(GradientCheckpointingLayer):
    """A pre-norm block whose queries see the context and not one another (CrossMAE, 2401.14391)."""

    def __init__(self, config: MIMConfigBase, dim: int, num_heads: int, intermediate_size: int, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = CrossAttention(config, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, intermediate_size)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        queries = queries + self.attention(self.norm1(queries), context)
        return queries + self.mlp(self.norm2(queries))


def has_checkpointed_layers(model: nn.Module) -> bool:
    """Whether gradient checkpointing would save something."""
    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


class PixelShuffleLinear(nn.Module):
    """A linear map from the tokens of a coarse grid to those of a grid `factor` times finer per axis: each token
    makes factor x factor tokens (a 1x1 convolution and a pixel shuffle). `factor` (1, 1) is a plain linear layer."""

    def __init__(self, in_dim: int, out_dim: int, factor: Grid = (1, 1)):
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(in_dim, math.prod(factor) * out_dim)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens (batch, length, in_dim), `grid` the finer one -> (batch, rows * cols, out_dim)."""
        tokens = self.linear(tokens)
        if self.factor == (1, 1):
            return tokens
        (rows, cols), (down, right) = grid, self.factor
        tokens = tokens.view(tokens.shape[0], rows // down, cols // right, down, right, -1)
        return tokens.transpose(2, 3).reshape(tokens.shape[0], rows * cols, -1)
