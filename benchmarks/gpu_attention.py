"""Attention alone, for benchmarks/gpu.py: torch's fused kernels and `mim_short`, from a projection's output to its
gradient, with the errors of both against float64."""

import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from gpu_steps import seconds_of
from measure import markdown_table
from torch import Tensor

from hf_mim.modeling import attention


# what: images, tokens, heads, head size
SHAPES = {
    "encoder of MAE ViT-B": (256, 50, 12, 64),
    "encoder of MAE ViT-L": (128, 50, 16, 64),
    "decoder of MAE": (256, 197, 16, 32),
    "whole images, ViT-B": (128, 197, 12, 64),
}
CHECKED = 2  # images that are computed in float64 too
AHEAD = 50_000_000  # ticks (some 30 ms) that the GPU idles first: its work, not the host's, is timed of small kernels
WRONG = 0.01  # relative: the error of a gradient in bfloat16 is about 0.0024


def fused(qkv: Tensor) -> Tensor:
    """(images, tokens, 3, heads, head size) -> (images, tokens, heads, head size), as layers.py does it."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def short(qkv: Tensor) -> Tensor:
    return torch.ops.hf_mim.short_attention(qkv, None, qkv.shape[-1] ** -0.5)[0]


def ways(qkv: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    asked = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention.SHORT))
    return {"sdpa": fused} | ({attention.SHORT: short} if attention.takes_short(asked, qkv) else {})


def measure_attention(args) -> dict[str, dict[str, dict[str, float]]]:
    """{shape: {way: {"forward" and "both" (ms), "error" and "gradient_error" (relative, against float64)}}}"""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for what, (images, *shape) in SHAPES.items():
        torch.manual_seed(0)
        size = (CHECKED if args.tiny else images, shape[0], 3, *shape[1:])
        qkv = torch.randn(size, device=args.device, dtype=torch.bfloat16, requires_grad=True)
        upper = torch.randn(size[0], size[1], *size[3:], device=args.device, dtype=torch.bfloat16)
        exact = qkv.detach()[:CHECKED].double().requires_grad_()
        wanted = fused(exact)
        wanted.backward(upper[:CHECKED].double())
        found[what] = {way: measure_way(compute, qkv, upper, args) for way, compute in ways(qkv).items()}
        for way, compute in ways(qkv).items():
            qkv.grad = None
            out = compute(qkv)
            out.backward(upper)
            found[what][way]["error"] = relative(out[:CHECKED], wanted)
            found[what][way]["gradient_error"] = relative(qkv.grad[:CHECKED], exact.grad)
    return found


def measure_way(compute: Callable[[Tensor], Tensor], qkv: Tensor, upper: Tensor, args) -> dict[str, float]:
    steps = {"forward": partial(compute, qkv), "both": lambda: torch.autograd.grad(compute(qkv), qkv, upper)}
    found = {}
    for name, step in steps.items():
        seconds_of(step, 3, args.device)
        seconds = []
        for _ in range(args.rounds):
            if args.device == "cuda":
                torch.cuda._sleep(AHEAD)
            seconds.append(seconds_of(step, args.steps, args.device))
        found[name] = 1000 * statistics.median(seconds)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def attention_words(found: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        [what, way, *(f"{figures[name]:.3f}" for name in ("forward", "both")), f"{figures['gradient_error']:.1e}"]
        for what, by_way in found.items()
        for way, figures in by_way.items()
    ]
    header = ["", "", "forward, ms", "forward and backward, ms", "error of the gradient"]
    wrong = [
        f"**{way} computes a wrong gradient: {what}.**"
        for what, by_way in found.items()
        for way, figures in by_way.items()
        if not figures["gradient_error"] < WRONG
    ]
    return "\n\n".join([f"### Attention alone\n\n{markdown_table(header, lines)}", *wrong])
