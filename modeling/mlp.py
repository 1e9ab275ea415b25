"""The MLP of a transformer block, with the activations of the families that it takes weights of."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RecomputedGELULinear(torch.autograd.Function):
    """`F.linear(F.gelu(hidden), weight, bias)` that keeps `hidden` alone for its backward pass, and computes the GELU
    again there: a fifth of the memory of a block's activations for a hundredth of a training step."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        ctx.save_for_backward(rows, weight)
        # The result, which stays, gets its place before the GELU, which goes: else a hole is left in the heap.
        out = rows.new_empty(len(rows), len(weight))
        torch.addmm(bias, F.gelu(rows), weight.T, out=out)
        return out.view(*hidden.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        rows, weight = ctx.saved_tensors
        needs, grad_rows, grad_weight = ctx.needs_input_grad, grad.flatten(0, -2), None
        # The GELU, its gradient and that of `rows` take turns in one large tensor.
        space = F.gelu(rows) if needs[1] else torch.empty_like(rows)
        if needs[1]:
            grad_weight = grad_rows.T @ space
        if needs[0]:
            torch.mm(grad_rows, weight, out=space)
            torch.ops.aten.gelu_backward(space, rows, grad_input=space)
        grad_hidden = space.view(*grad.shape[:-1], -1) if needs[0] else None
        return grad_hidden, grad_weight, grad_rows.sum(0) if needs[2] else None


def quick_gelu(hidden: Tensor) -> Tensor:
    """The approximation in CLIP."""
    return hidden * torch.sigmoid(1.702 * hidden)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class MLP(nn.Module):
    """Two linear layers with one of `ACTIVATIONS`, or the gated SwiGLU form, whose first one also makes the gate."""

    def __init__(self, dim: int, intermediate_size: int, kind: str = "gelu"):
        super().__init__()
        self.kind, self.gated = kind, kind == "swiglu"
        self.fc1 = nn.Linear(dim, intermediate_size * (2 if self.gated else 1))
        self.fc2 = nn.Linear(intermediate_size, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.fc1(tokens)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * hidden)
        plain = self.kind == "gelu" and type(self.fc2) is nn.Linear  # an adapter may stand there
        if self.training and torch.is_grad_enabled() and plain:
            weight, bias = self.fc2.weight.to(hidden.dtype), self.fc2.bias.to(hidden.dtype)
            return RecomputedGELULinear.apply(hidden, weight, bias)
        return self.fc2(ACTIVATIONS[self.kind](hidden))
