"""Token morphing by indices against the same by a dense membership matrix, forward and backward.

    python benchmarks/token_morphing.py [--batch 64] [--tokens 196] [--dim 768] [--rounds 5] [--step] [--out PAGE]

Both arms match the same tokens (checked), average targets and predictions over the groups, and take the gradient of
the size-weighted smooth L1. They alternate in one process on one thread; counted is the processor's time; the table
shows medians and the median of paired ratios. `--step` also times a training step of ViT-B at the same batch and says
which share of it two morphing draws take. `--out` puts all of it into a page.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from measure import machine, write_section

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.modeling.morphing import even_schedule, match_tokens


def dense_match(values: torch.Tensor, schedule: list[int], generator: torch.Generator) -> torch.Tensor:
    """Membership (batch, groups, tokens), by multiplying with a matrix per iteration; cosines of the means, anew."""
    batch, tokens, _ = values.shape
    membership = torch.eye(tokens).expand(batch, -1, -1)
    for merged in schedule:
        sizes = membership.sum(2, keepdim=True)
        unit = F.normalize((membership @ values) / sizes, dim=2)
        count = unit.shape[1]
        order = torch.randperm(count, generator=generator)
        first, second = order[: count // 2], order[count // 2 :]
        best, partner = (unit[:, first] @ unit[:, second].transpose(1, 2)).max(2)
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        place = torch.where(rank < merged, partner, len(second) + rank - merged)
        merge = torch.zeros(batch, count - merged, count)
        merge[:, torch.arange(len(second)), second] = 1
        merge.transpose(1, 2)[torch.arange(batch)[:, None], first, place] = 1
        membership = merge @ membership
    return membership


def dense_loss(predicted: torch.Tensor, values: torch.Tensor, membership: torch.Tensor) -> torch.Tensor:
    sizes = membership.sum(2, keepdim=True)
    means = membership / sizes
    errors = F.smooth_l1_loss(means @ predicted, means @ values, reduction="none", beta=2.0).mean(2)
    return (errors * sizes[..., 0]).sum() / sizes.sum()


def index_loss(predicted: torch.Tensor, values: torch.Tensor, groups) -> torch.Tensor:
    errors = F.smooth_l1_loss(groups.means(predicted), groups.means(values), reduction="none", beta=2.0).mean(2)
    return (errors * groups.size).sum() / groups.size.sum()


def arms(values: torch.Tensor, predicted: torch.Tensor, schedule: list[int]) -> dict:
    """name -> a function to time."""

    def run(match, loss):
        predicted.grad = None
        loss(predicted, values, match(values, schedule, generator=torch.Generator().manual_seed(0))).backward()

    return {
        "whole": (lambda: run(match_tokens, index_loss), lambda: run(dense_match, dense_loss)),
        "matching": (
            lambda: match_tokens(values, schedule, generator=torch.Generator().manual_seed(0)),
            lambda: dense_match(values, schedule, torch.Generator().manual_seed(0)),
        ),
    }


def check(values: torch.Tensor, predicted: torch.Tensor, schedule: list[int]) -> float:
    """The share of tokens that both put into the same group; the losses must agree where all do."""
    groups = match_tokens(values, schedule, generator=torch.Generator().manual_seed(0))
    membership = dense_match(values, schedule, torch.Generator().manual_seed(0))
    same = (membership.argmax(1) == groups.index).float().mean().item()
    if same == 1.0:
        losses = index_loss(predicted, values, groups), dense_loss(predicted, values, membership)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    return same


def timed(function) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def compare(ours, dense, rounds: int) -> tuple[float, float, float]:
    """-> median seconds of each, and the median of paired ratios dense / ours."""
    ours(), dense()
    pairs = [(timed(ours), timed(dense)) for _ in range(rounds)]
    mine, theirs = zip(*pairs)
    return statistics.median(mine), statistics.median(theirs), statistics.median(b / a for a, b in pairs)


def step_seconds(batch: int, rounds: int) -> float:
    """A training step of ViT-B/16 at 224 pixels, all tokens encoded, as DTM trains; optimizer excluded."""
    encoder = {"size": "base", "mask_style": "token", "position_embedding": "learned"}
    model = MIMForPreTraining(MIMConfig(encoder_config=encoder, decoder="linear"))
    pixel_values = torch.randn(batch, 3, 224, 224)
    return min(timed(lambda: model(pixel_values).loss.backward()) for _ in range(rounds))


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 64), ("tokens", 196), ("dim", 768), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step", action="store_true", help="also time a ViT-B step")
    parser.add_argument("--out", help="a page to put the table into")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = torch.randn(args.batch, args.tokens, args.dim)
    predicted = torch.randn(args.batch, args.tokens, args.dim, requires_grad=True)
    lines = [machine(), "", f"Batch {args.batch}, {args.tokens} tokens, {args.dim} channels, {args.rounds} rounds.", ""]
    lines += ["| what | iterations | seconds by indices | dense | dense / indices | equal assignments |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    rows = []
    for iterations in (2, 7, 14):
        schedule = even_schedule(args.tokens, args.tokens // 2, iterations)
        same = check(values, predicted, schedule)
        for what, (ours, dense) in arms(values, predicted, schedule).items():
            mine, theirs, ratio = compare(ours, dense, args.rounds)
            row = {"what": what, "iterations": iterations, "ours": mine, "dense": theirs, "ratio": ratio, "same": same}
            rows.append(row)
            figures = f"{mine:.3f} | {theirs:.3f} | {ratio:.2f} | {100 * same:.2f} %"
            lines.append(f"| {what} | {iterations} | {figures} |")
    if args.step:
        step = step_seconds(args.batch, 2)
        morphing = 2 * statistics.mean(row["ours"] for row in rows if row["what"] == "whole" and row["iterations"] == 7)
        lines += ["", f"Two draws of 7 iterations take {100 * morphing / step:.1f} % of a ViT-B step of {step:.1f} s."]
    print("\n".join(lines))
    if args.out:
        write_section(args.out, "token_morphing", "\n".join(lines))
    return rows


if __name__ == "__main__":
    main()
