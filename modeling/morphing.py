"""Dynamic token morphing (DTM, 2401.00254): which tokens of an image are merged, and their means.

Groups are kept as indices, never as a dense membership matrix. The cosines between groups come from the tokens' Gram
matrix, whose rows and columns are added where tokens merge: the cosine of two sums is that of the two means.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Groups:
    """How the tokens of each image are merged.

    index: (batch, tokens), the group of every token, from 0 to count - 1; every group has a token.
    weight: (batch, tokens), the weight of a token in its group's mean; sums to 1 over a group.
    size: (batch, count), tokens of each group.
    """

    index: Tensor
    weight: Tensor
    size: Tensor

    @property
    def count(self) -> int:
        return self.size.shape[1]

    def means(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, dim) -> (batch, count, dim). Differentiable in the tokens."""
        batch, count = self.size.shape
        rows = (self.index + torch.arange(batch, device=tokens.device)[:, None] * count).flatten()
        weighted = (tokens * self.weight[..., None].to(tokens.dtype)).flatten(0, 1)
        return tokens.new_zeros(batch * count, tokens.shape[-1]).index_add(0, rows, weighted).view(batch, count, -1)


def draw_schedule(tokens: int, max_iterations: int, generator: torch.Generator | None = None) -> list[int]:
    """How many tokens are to be merged away in each iteration, as the released code draws it: m from 0 to all tokens,
    k from 1 to `max_iterations`, ceil(m / k) in each of k iterations (the floor where that would be more than all)."""
    merged = int(torch.randint(tokens + 1, (1,), generator=generator))
    iterations = int(torch.randint(1, max_iterations + 1, (1,), generator=generator))
    return even_schedule(tokens, merged, iterations)


def even_schedule(tokens: int, merged: int, iterations: int) -> list[int]:
    """`merged` tokens in equal parts, each at most half of what is left, so that one token at least remains."""
    each = -(-merged // iterations)
    each = merged // iterations if each * iterations > tokens else each
    schedule, left = [], tokens
    for _ in range(iterations):
        schedule.append(min(each, (left - 1) // 2))
        left -= schedule[-1]
    return [count for count in schedule if count > 0]


@torch.no_grad()
def match_tokens(
    values: Tensor,
    schedule: list[int],
    halves: str = "random",
    means: str = "size",
    matching: str = "similar",
    generator: torch.Generator | None = None,
) -> Groups:
    """Merges similar tokens, iteration by iteration (the paper's Algorithm 1, after ToMe, 2210.09461).

    In each iteration the groups are split into two halves; each of the first half proposes its most similar partner in
    the second (cosine of group means, float32); the most similar proposals are carried out.

    Args:
        values: (batch, tokens, dim).
        schedule: how many groups disappear in each iteration; each at most half of those left, rounded down.
        halves: random (paper), or alternating, the first token staying alone (released code).
        means: size, every token of a group counts the same (released code), or iterated, the mean of the means that
            were merged (the paper's product of normalised matrices, as reported).
        matching: similar, or random partners and proposals, a control.
    """
    batch, length, _ = values.shape
    gram = values.float() @ values.float().transpose(1, 2)
    index = torch.arange(length, device=values.device).expand(batch, -1)
    weight = torch.ones(batch, length, device=values.device)
    for merged in schedule:
        moves, left = _one_iteration(gram, merged, halves, matching, generator)
        gram = _merge(_merge(gram, moves, left).transpose(1, 2), moves, left)
        index = moves.gather(1, index)
        if means == "iterated":
            joined = torch.zeros(batch, left, device=values.device).scatter_add_(
                1, moves, torch.ones_like(moves.float())
            )
            gram = gram / (joined[:, :, None] * joined[:, None, :])
            weight = weight / joined.gather(1, index)
    count = length - sum(schedule)
    size = torch.zeros(batch, count, device=values.device).scatter_add_(1, index, torch.ones_like(weight))
    return Groups(index, 1 / size.gather(1, index) if means == "size" else weight, size)


def _one_iteration(gram: Tensor, merged: int, halves: str, matching: str, generator) -> tuple[Tensor, int]:
    """-> (batch, groups), the new number of every group, and how many there are now. As released, what is left of the
    first half comes first, in its order, then the second half: that decides how the next iteration alternates."""
    batch, count = gram.shape[:2]
    order = torch.arange(count) if halves == "alternating" else torch.randperm(count, generator=generator)
    first, second = (order[::2], order[1::2]) if halves == "alternating" else (order[: count // 2], order[count // 2 :])
    first, second = first.to(gram.device), second.to(gram.device)
    if matching == "random":
        similarity = torch.rand(batch, len(first), len(second), generator=generator).to(gram.device)
    else:
        scale = gram.diagonal(dim1=1, dim2=2).clamp(min=1e-12).rsqrt()
        similarity = gram[:, first[:, None], second] * scale[:, first, None] * scale[:, None, second]
    best, partner = similarity.max(dim=2)
    if halves == "alternating":
        best[:, 0] = -torch.inf
    proposals = best.argsort(dim=1, descending=True, stable=True)
    stays = proposals.argsort(dim=1) >= merged
    left = len(first) - merged
    moves = torch.empty(batch, count, dtype=torch.long, device=gram.device)
    moves[:, second] = left + torch.arange(len(second), device=gram.device)
    moves[:, first] = torch.where(stays, stays.cumsum(dim=1) - 1, left + partner)
    return moves, count - merged


def _merge(rows: Tensor, moves: Tensor, count: int) -> Tensor:
    """Adds the rows of (batch, groups, k) that move to the same place: (batch, count, k)."""
    batch, _, width = rows.shape
    places = (moves + torch.arange(batch, device=rows.device)[:, None] * count).flatten()
    return rows.new_zeros(batch * count, width).index_add_(0, places, rows.reshape(-1, width)).view(batch, count, width)
