"""Token morphing by indices against the same by a dense membership matrix, forward and backward.

    python benchmarks/token_morphing.py [--batch 64] [--tokens 196] [--dim 768] [--rounds 5] [--step] [--out PAGE]

Both arms match the same tokens (checked), average targets and predictions over the groups, and take the gradient of
the size-weighted smooth L1. They alternate in one process on one thread; counted is the processor's time; the table
shows medians and quartiles of paired ratios. `--step` also times a training step of ViT-B at the same batch and says
which share of it two morphing draws take. `--out` puts all of it into a page.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from measure import alternate, machine, markdown_table, paired_ratios, parser, quartiles, row, spread, verdicts
from summary import publish

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
        left = len(first) - merged
        place = torch.where(rank < merged, left + partner, (rank >= merged).cumsum(dim=1) - 1)
        merge = torch.zeros(batch, count - merged, count)
        merge[:, left + torch.arange(len(second)), second] = 1
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


def step_seconds(batch: int, rounds: int) -> float:
    """A training step of ViT-B/16 at 224 pixels, all tokens encoded, as DTM trains; optimizer excluded."""
    encoder = {"size": "base", "mask_style": "token", "position_embedding": "learned"}
    model = MIMForPreTraining(MIMConfig(encoder_config=encoder, decoder="linear"))
    pixel_values = torch.randn(batch, 3, 224, 224)
    return min(timed(lambda: model(pixel_values).loss.backward()) for _ in range(rounds))


def compare(args) -> list[dict]:
    """[{"what", "iterations", "ours", "dense" (median seconds), "ratio" (quartiles of dense / ours), "same"}]"""
    torch.manual_seed(0)
    values = torch.randn(args.batch, args.tokens, args.dim)
    predicted = torch.randn(args.batch, args.tokens, args.dim, requires_grad=True)
    found = []
    for iterations in (2, 7, 14):
        schedule = even_schedule(args.tokens, args.tokens // 2, iterations)
        same = check(values, predicted, schedule)
        for what, (ours, dense) in arms(values, predicted, schedule).items():
            times = alternate({"ours": ours, "dense": dense}, args.rounds, warmup=1)
            medians = {name: quartiles(seconds)[1] for name, seconds in times.items()}
            ratio = paired_ratios(times, "dense", "ours")
            found.append({"what": what, "iterations": iterations, **medians, "ratio": ratio, "same": same})
    return found


def rows_of(found: list[dict], share: float | None = None) -> list[dict]:
    """The goals hold for 7 and 14 iterations; `share` is that of morphing in a step, percent."""
    goals, rows = {"whole": 3, "matching": 5}, []
    for one in found:
        what = f"morphing, {one['what']}, {one['iterations']} iterations: time of dense over ours"
        goal = goals[one["what"]] if one["iterations"] > 2 else None
        rows.append(row(what, one["ours"], one["dense"], one["ratio"], goal, unit="s"))
    if share is not None:
        rows.append(row("morphing: two draws of a ViT-B step, percent", share, None, None, 3, more=False))
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parser(__doc__, batch=64, tokens=196, dim=768, rounds=5)
    options.add_argument("--step", action="store_true", help="also time a ViT-B step")
    args = options.parse_args(arguments)
    torch.set_num_threads(1)
    found, share = compare(args), None
    header = ["what", "iterations", "seconds by indices", "dense", "dense / indices", "equal assignments"]
    lines = [
        [
            one["what"],
            one["iterations"],
            f"{one['ours']:.3f}",
            f"{one['dense']:.3f}",
            spread(one["ratio"]),
            f"{100 * one['same']:.2f} %",
        ]
        for one in found
    ]
    parts = [machine(), f"Batch {args.batch}, {args.tokens} tokens, {args.dim} channels, {args.rounds} rounds."]
    parts.append(markdown_table(header, lines))
    if args.step:
        step = step_seconds(args.batch, 2)
        draws = [one["ours"] for one in found if one["what"] == "whole" and one["iterations"] == 7]
        share = 200 * statistics.mean(draws) / step
        parts.append(f"Two draws of 7 iterations take {share:.1f} % of a ViT-B step of {step:.1f} s.")
    rows = rows_of(found, share)
    publish(args.out, "token_morphing", "\n\n".join([*parts, verdicts(rows)]), rows)
    return found


if __name__ == "__main__":
    main()
