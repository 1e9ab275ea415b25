"""From tokens to one vector per image. A pooler is a class in `POOLERS`."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .attention import LONG
from .encoder_base import Encoder, choose
from .layers import FixedTables, sincos_2d
from .mlp import MLP
from .options import at_least
from .pooler_base import Pooler
from .pooler_selection import CentralAttentionPooler, CentralPooler, ClsAttentionPooler


def divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def read_out(probes: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(probes keys^T + bias) values: probes (rows, dim) or (batch, rows, dim), keys and values
    (batch, length, dim) -> (batch, rows, dim) and the weights (batch, rows, length)."""
    logits = probes @ keys.transpose(1, 2)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return weights @ values, weights


@dataclass
class AffineTokens:
    """tokens @ matrix + shift, computed when it is asked for; or the tokens themselves.

    Args:
        tokens: (batch, length, dim).
        affine: matrix (dim, width), and shift (width,) or (length, width), where each token has its own.
    """

    tokens: Tensor
    affine: tuple[Tensor, Tensor] | None = None

    def add(self, shift: Tensor) -> "AffineTokens":
        if self.affine is None:
            return AffineTokens(self.tokens + shift)
        return AffineTokens(self.tokens, (self.affine[0], self.affine[1] + shift))

    def apply(self, layer) -> "AffineTokens":
        """A linear layer: of the matrix, which has fewer rows than there are tokens, and not rounded by autocast."""
        if self.affine is None:
            return AffineTokens(layer(self.tokens))
        matrix, shift = self.affine
        with torch.autocast(matrix.device.type, enabled=False):
            bias = layer(torch.zeros_like(matrix[0]))
            return AffineTokens(self.tokens, (layer(matrix) - bias, layer(shift)))

    def computed(self) -> Tensor:
        """(batch, length, width)."""
        if self.affine is None:
            return self.tokens
        matrix, shift = self.affine
        if shift.ndim > 1:
            return self.tokens @ matrix + shift
        return F.linear(self.tokens, matrix.T, shift)  # product and sum at once

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Of one shift for all tokens: weights (batch, rows, length), whose rows sum to one -> (batch, rows, width)."""
        if self.affine is None:
            return weights @ self.tokens
        matrix, shift = self.affine
        with torch.autocast(matrix.device.type, enabled=False):  # see `Pooler.trains_in_bf16`
            return weights.to(matrix.dtype) @ self.tokens.to(matrix.dtype) @ matrix + shift


class ClsPooler(Pooler):
    """The class token, of several their mean."""

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        if not encoder.has_cls_token:
            raise ValueError("pooler 'cls' needs an encoder with a class token; choose another, such as 'mean'")
        self.num_cls_tokens = max(1, encoder.num_cls_tokens)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        return tokens[:, : self.num_cls_tokens].mean(dim=1), None


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

    Made for features without negative values.

    Options:
        p: where the learned exponent starts; 1 is the mean, and the larger, the closer to the maximum.
        eps: smaller values count as this.
    """

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True, p: float = 3.0, eps: float = 1e-6):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        self.initial_p, self.eps = float(p), eps
        self.p = nn.Parameter(torch.full((1,), self.initial_p))

    def init_parameters(self):
        init.constant_(self.p, self.initial_p)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        # In float32: the p-th powers of small values underflow in half precision.
        patches, p = tokens[:, num_prefix_tokens:].float().clamp(min=self.eps), self.p.float()
        return patches.pow(p).mean(dim=1).pow(1 / p).to(tokens.dtype), None


class AbmilpPooler(Pooler):
    """Attention-based multiple-instance pooling (Beyond [cls], 2412.03215): sum_i a_i v_i, a = softmax(s) over tokens.

    s = `depth` - 1 hidden layers and one linear score; it sees U = SA(X), or the tokens X themselves, plus positions.
    SA is one head of self-attention without residual and norm. (depth - 1)(D^2 + D) + D + 1 parameters, 4 D^2 + D more
    for SA. The defaults are the paper's setting. The score starts at zero, so that a new pooler is the mean: a choice
    made here. `depth=2, hidden_size=128` is the pooling of Ilse et al. (1802.04712), the 128 not verified.

    Options:
        depth: linear layers of the score, 1 or more.
        activation: between those layers: tanh or relu.
        hidden_size: of the hidden layers; None is the tokens' width D.
        gated: hidden layers are multiplied by a learned sigmoid gate (Ilse's gated form).
        self_attention: `none`; `map`: the score sees SA(X) and X is summed; `both`: SA(X) is summed too.
        position: `none`, or `sincos` added to what the score sees; [cls] and registers have none.
        content: `patch`, or `all` to weigh [cls] and registers too. The weights returned are those of the patches,
            divided by their sum.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        apply_final_norm: bool = True,
        depth: int = 1,
        activation: str = "tanh",
        hidden_size: int | None = None,
        gated: bool = False,
        self_attention: str = "none",
        position: str = "none",
        content: str = "patch",
    ):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        dim = encoder.hidden_size
        width = dim if hidden_size is None else hidden_size
        at_least(1, depth=depth, hidden_size=width)
        self.activation = getattr(torch, choose("activation", activation, ("tanh", "relu")))
        self.self_attention = choose("self_attention", self_attention, ("none", "map", "both"))
        self.content = choose("content", content, ("patch", "all"))
        self.position = choose("position", position, ("none", "sincos"))
        if position == "sincos" and dim % 4:
            raise ValueError(f"position 'sincos' needs tokens of a width divisible by 4, got {dim}; choose 'none'")
        self.sincos = FixedTables(partial(sincos_2d, base=encoder.base_grid, dim=dim))
        if depth == 1 and (gated or hidden_size is not None):
            raise ValueError("gated and hidden_size are of hidden layers: they need a depth of 2 or more, got depth 1")
        attends = self_attention != "none"
        self.trains_in_bf16 = self_attention == "both"  # with `map` the tokens themselves are summed, mean and all
        self.qkv = nn.Linear(dim, 3 * dim, bias=False) if attends else None
        self.proj = nn.Linear(dim, dim) if attends else None
        widths = [dim, *[width] * (depth - 1)]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))
        self.gates = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]) if gated)
        self.score, self.score_bias = nn.Parameter(torch.zeros(1, widths[-1])), nn.Parameter(torch.zeros(1))

    def init_parameters(self):
        init.zeros_(self.score)
        init.zeros_(self.score_bias)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        prefix = num_prefix_tokens if self.content == "all" else 0
        values = seen = AffineTokens(tokens[:, num_prefix_tokens - prefix :])
        if self.qkv is not None and self.proj is not None:
            seen = self._attend(self.qkv, self.proj, values.tokens)
        if self.self_attention == "both":
            values = seen
        if self.position == "sincos":
            seen = seen.add(F.pad(self.sincos(grid, tokens.device), (0, 0, prefix, 0)).to(tokens.dtype))
        for i, layer in enumerate(self.hidden):
            hidden = self.activation(seen.apply(layer).computed())
            if len(self.gates):
                hidden = hidden * seen.apply(self.gates[i]).computed().sigmoid()
            seen = AffineTokens(hidden)
        score = partial(F.linear, weight=self.score, bias=self.score_bias)
        logits = seen.apply(score).computed().transpose(1, 2)  # (batch, 1, tokens)
        return values.weighted_sum(logits.softmax(dim=-1))[:, 0], logits[:, 0, prefix:].softmax(dim=-1)

    def _attend(self, qkv: nn.Module, proj: nn.Module, tokens: Tensor) -> AffineTokens:
        """SA(X). In training its matrices are multiplied with each other, which leaves one product of all tokens of
        five; keys and values are the tokens, which need no gradient in a probe. With few tokens that does not pay."""
        if not self.training or tokens.shape[:2].numel() < 4 * self.out_dim:
            query, key, value = qkv(tokens)[:, None].chunk(3, dim=-1)
            return AffineTokens(proj(F.scaled_dot_product_attention(query, key, value)[:, 0]))
        # The mean token is subtracted, so that bfloat16 keeps the differences. The result is the same: weights sum to
        # one, and a constant added to all logits of a query cancels in the softmax.
        mean = tokens.detach().mean(dim=(0, 1)).to(self.score.dtype)
        tokens = tokens - mean
        unit = torch.eye(self.out_dim, dtype=self.score.dtype, device=tokens.device)
        with torch.autocast(tokens.device.type, enabled=False):
            # The layers are called, instead of reading their weights: LoRA may be around them. (Its dropout would drop
            # the same channels of all tokens.)
            query, key, value = qkv(unit).chunk(3, dim=-1)
            inner = query @ key.T * self.out_dim**-0.5
            shift, result = mean @ inner, AffineTokens(tokens, (value, mean @ value)).apply(proj)
        probes = F.linear(tokens, inner.T, shift)
        if tokens.shape[1] <= LONG:
            mixed, _ = read_out(probes, tokens, tokens)
        else:
            one_head = tokens[:, None]
            mixed = F.scaled_dot_product_attention(probes[:, None], one_head, one_head, scale=1.0)[:, 0]
        return replace(result, tokens=mixed)


class AttentionPooler(Pooler):
    """Cross-attention of learned queries to the patches: the attentive probes of other papers, the mean over queries.

    Each head's softmax(q W_k x) W_v x is computed as (q W_k) x and W_v (sum a x): the same, without a projection of
    every token. Weights (batch, queries * heads, rows * cols), the heads of the first query first.

    Options:
        form: `aim`, AIM (2401.08541): tokens pass a batch norm without parameters, its running statistics in
                evaluation; no biases, no projection of the result. 2 D^2 + Q D parameters for Q queries.
            `cae`, CAE (2202.03026): layer norms on query, keys and values, and a projection; 4 D^2 + (9 + Q) D.
                That all but the keys have a bias is not verified.
            `vjepa`, V-JEPA (2404.08471): a transformer block whose queries attend to the normed tokens, with
                residuals and an MLP of four times the width; 12 D^2 + (13 + Q) D.
            Not verified: the norms' eps (1e-6), and the mean over several queries in `cae` and `vjepa`.
        num_queries, num_heads: Q, and a divisor of D, by default one head for every 64 channels.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        apply_final_norm: bool = True,
        form: str = "aim",
        num_queries: int = 1,
        num_heads: int | None = None,
    ):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        dim = encoder.hidden_size
        heads = (1 if dim % 64 else dim // 64) if num_heads is None else num_heads
        at_least(1, num_queries=num_queries, num_heads=heads)
        if dim % heads:
            raise ValueError(f"num_heads {heads} does not divide the width {dim}; choices: {divisors(dim)}")
        self.form, self.num_heads = choose("form", form, ("aim", "cae", "vjepa")), heads
        self.queries, self.key, self.value = (nn.Parameter(torch.zeros(rows, dim)) for rows in (num_queries, dim, dim))
        self.key_bias = nn.Parameter(torch.zeros(dim)) if form == "vjepa" else None
        self.value_bias = nn.Parameter(torch.zeros(dim)) if form != "aim" else None
        self.query, self.proj = (nn.Linear(dim, dim) if form != "aim" else None for _ in "qp")
        self.batch_norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False) if form == "aim" else None
        # Of query, key and value; of the tokens and before the MLP.
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range({"aim": 0, "cae": 3, "vjepa": 2}[form]))
        self.mlp = MLP(dim, 4 * dim) if form == "vjepa" else None

    def init_parameters(self):
        init.normal_(self.queries, std=0.02)
        init.xavier_uniform_(self.key)
        init.xavier_uniform_(self.value)
        for bias in (self.key_bias, self.value_bias):
            if bias is not None:
                init.zeros_(bias)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        patches = tokens[:, num_prefix_tokens:]
        if self.form == "aim":
            normed = self.batch_norm(patches.transpose(1, 2)).transpose(1, 2)
            out, weights = self._attend(self.queries, normed, normed)
        elif self.form == "cae":
            query, keys, values = (norm(x) for norm, x in zip(self.norms, (self.queries, patches, patches)))
            out, weights = self._attend(self.query(query), keys, values)
            out = self.proj(out)
        else:
            normed = self.norms[0](patches)
            out, weights = self._attend(self.query(self.queries), normed, normed)
            out = self.queries + self.proj(out)
            out = out + self.mlp(self.norms[1](out))
        return out.mean(dim=1), weights

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """queries (queries, dim), keys and values (batch, length, dim) before their projections
        -> (batch, queries, dim), and the weights (batch, queries * heads, length)."""
        shape = (self.num_heads, -1, self.out_dim)
        queries = queries.unflatten(1, shape[:2]) * (self.out_dim // self.num_heads) ** -0.5
        probes = torch.einsum("qhc,hcd->qhd", queries, self.key.view(shape)).flatten(0, 1)
        # The same for every token, so without effect, but a parameter of the original.
        bias = None if self.key_bias is None else (queries * self.key_bias.view(shape[:2])).sum(-1).view(-1, 1)
        pooled, weights = read_out(probes, keys, values, bias)
        pooled = pooled.unflatten(1, (-1, self.num_heads))
        out = torch.einsum("bqhd,hcd->bqhc", pooled, self.value.view(shape)).flatten(2)
        return out if self.value_bias is None else out + self.value_bias, weights


class SimPooler(Pooler):
    """SimPool (2309.06891): the patches' mean, projected, attends to their layer norm: q = W_q mean(X), k = W_k LN(X),
    v = LN(X), a = softmax(q k^T / sqrt(D)); the vector is sum a v. 2 D^2 + 2 D parameters.

    Options:
        gamma: a generalised mean, (sum a (v - min v + 1e-6)^gamma)^(1 / gamma); the authors use 1.25 for ViTs, 2 for
            ConvNets and none by default. The minimum is each image's own, over tokens and channels, and not the
            batch's as in the released code, where images change one another's vectors. The 1e-6 is not verified.
    """

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True, gamma: float | None = None):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        if gamma is not None and gamma <= 0:
            raise ValueError(f"gamma must be above 0, or None for a plain weighted mean, got {gamma}")
        self.gamma = gamma
        self.query = nn.Linear(self.out_dim, self.out_dim, bias=False)
        self.key = nn.Parameter(torch.zeros(self.out_dim, self.out_dim))
        self.norm = nn.LayerNorm(self.out_dim, eps=1e-6)

    def init_parameters(self):
        init.xavier_uniform_(self.key)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        patches = tokens[:, num_prefix_tokens:]
        keys = values = self.norm(patches)
        if self.gamma is not None:  # in float32, as the generalised mean above
            values = (values.float() - values.float().amin(dim=(1, 2), keepdim=True) + 1e-6).pow(self.gamma)
        # q (W_k x) as (q W_k) x: no projection of every token.
        probe = self.query(patches.mean(dim=1, keepdim=True)) @ self.key * self.out_dim**-0.5
        weights = (probe @ keys.transpose(1, 2)).softmax(dim=-1)
        pooled = (weights.to(values.dtype) @ values)[:, 0]
        return pooled if self.gamma is None else pooled.pow(1 / self.gamma).to(tokens.dtype), weights[:, 0]


class EfficientPooler(Pooler):
    """Efficient probing (2506.10178): each of Q learned queries attends to the patches themselves,
    A = softmax(q X^T / sqrt(D)), and sums its own chunk of their values X W_v; the chunks are concatenated.
    D^2 / d_out + Q D parameters, as the authors' logs say; an older description of theirs has averages instead of W_v.
    The weights are (batch, queries, rows * cols).

    Options:
        num_queries: Q; times `d_out` it must divide the width D.
        d_out: the vector has D / d_out channels.
    """

    def __init__(self, encoder: Encoder, *, apply_final_norm: bool = True, num_queries: int = 32, d_out: int = 1):
        super().__init__(encoder, apply_final_norm=apply_final_norm)
        dim = encoder.hidden_size
        at_least(1, num_queries=num_queries, d_out=d_out)
        if dim % (num_queries * d_out):
            fitting = divisors(dim // d_out) if dim % d_out == 0 else "none with this d_out"
            what = f"num_queries {num_queries} times d_out {d_out} does not divide the width {dim}"
            raise ValueError(f"{what}; choices of num_queries: {fitting}")
        if d_out > 1 and not isinstance(encoder.pooled_norm(), nn.Identity):
            raise ValueError(f"d_out must be 1 with an encoder that norms the pooled vector (ConvNeXt), got {d_out}")
        self.out_dim = dim // d_out
        self.queries = nn.Parameter(torch.zeros(num_queries, dim))
        self.value = nn.Parameter(torch.zeros(self.out_dim, dim))

    def init_parameters(self):
        init.normal_(self.queries, std=0.02)
        init.xavier_uniform_(self.value)

    def forward(self, tokens, num_prefix_tokens, grid, attentions=None):
        patches = tokens[:, num_prefix_tokens:]
        pooled, weights = read_out(self.queries * patches.shape[-1] ** -0.5, patches, patches)
        # W_v acts on the sums, which is the same as on every patch.
        chunks = self.value.unflatten(0, (len(self.queries), -1))
        return torch.einsum("bqd,qcd->bqc", pooled, chunks).flatten(1), weights


POOLERS = {
    "cls": ClsPooler,
    "mean": MeanPooler,
    "max": MaxPooler,
    "gem": GemPooler,
    "abmilp": AbmilpPooler,
    "attention": AttentionPooler,
    "simpool": SimPooler,
    "efficient": EfficientPooler,
    "central": CentralPooler,
    "cls_attention": ClsAttentionPooler,
    "central_attention": CentralAttentionPooler,
}
