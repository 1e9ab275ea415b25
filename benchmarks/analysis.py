"""All measurements of `hf-mim analyze` for one ViT-Ti/16 against one plain forward pass over the same images.

    python benchmarks/analysis.py [--quick] [--images 500] [--prototypes 200] [--batch 32] [--rounds 3] [--each]

Both arms encode the same images in memory, in the same batches, on one thread; they alternate in one process. Counted
is processor time. The pass includes the images that class prototypes come from, and the results as JSON: what
`hf-mim analyze` does for one encoder, less reading the images and drawing. `--each` also times every measurement alone.
"""

import json
from types import SimpleNamespace

import torch
from measure import alternate, machine, markdown_table, paired_ratios, parser, quartiles, row, spread, verdicts
from summary import publish

from hf_mim import MIMConfig, MIMModel
from hf_mim.analysis import MEASUREMENTS
from hf_mim.analysis.shared_pass import measure


CLASSES = 10
WANTED = 3.0  # issue 6: at most so many times a plain pass


class TensorImages:
    """Images in memory, as `EncoderImages` gives them: the measured ones, and others for prototypes.

    Args:
        pixel_values: (images, channels, height, width).
        labels: (images,), or None.
        others: the same for prototypes, as a pair; None for none.
    """

    def __init__(self, pixel_values, labels=None, others=None):
        self.measured, self.others = pixel_values, None if others is None else others[0]
        self.labels, self.other_labels = labels, None if others is None else others[1]
        self.size = tuple(pixel_values.shape[2:])
        self.classes = [] if others is None else [str(i) for i in range(int(others[1].max()) + 1)]

    def batches(self, batch_size: int):
        for start in range(0, len(self.measured), batch_size):
            part = slice(start, start + batch_size)
            yield self.measured[part], None if self.labels is None else self.labels[part]

    def prototype_batches(self, batch_size: int):
        yield from TensorImages(self.others, self.other_labels).batches(batch_size)


def make_images(config: MIMConfig, count: int, prototypes: int) -> TensorImages:
    shape = (config.num_channels, config.image_size, config.image_size)
    others = torch.randn(prototypes, *shape), torch.arange(prototypes) % CLASSES
    return TensorImages(torch.randn(count, *shape), torch.arange(count) % CLASSES, others)


def plain_pass(model: MIMModel, images: TensorImages, batch_size: int) -> None:
    with torch.inference_mode():
        for pixel_values, _ in images.batches(batch_size):
            model(pixel_values)


def full_pass(model: MIMModel, images: TensorImages, batch_size: int, names: list[str] | None = None) -> dict:
    """-> the results of the measurements."""
    arguments = SimpleNamespace(measurements=names, batch_size=batch_size, examples=6, seed=0)
    measured = measure(model, images, arguments, model.encoder.token_grid(*images.size))
    results = {name: measurement.result() for name, measurement in measured.items()}
    json.dumps(results)
    return results


def arms(config: MIMConfig, args) -> dict:
    """name -> a function to time."""
    torch.manual_seed(0)
    model = MIMModel(config, add_pooling_layer=False).eval()
    images = make_images(config, args.images, args.prototypes)
    found = {
        "plain": lambda: plain_pass(model, images, args.batch),
        "all measurements": lambda: full_pass(model, images, args.batch),
    }
    if args.each:
        for name in MEASUREMENTS:
            found[name] = lambda name=name: full_pass(model, images, args.batch, [name])
    return found


def report(seconds: dict[str, list[float]], args) -> tuple[str, dict]:
    """-> Markdown, and the comparison of all measurements with the plain pass."""
    rows, ratios = [], {}
    for name in seconds:
        ratios[name] = paired_ratios(seconds, name, "plain")
        rows.append([name, spread(quartiles(seconds[name]), 1), spread(ratios[name])])
    every, plain = (quartiles(seconds[name])[1] for name in ("all measurements", "plain"))
    what = "analysis: all measurements over a plain pass"
    compared = row(what, every, plain, ratios["all measurements"], WANTED, more=False, unit="s")
    what = f"{args.images} images, {args.prototypes} more for prototypes, batch {args.batch}, {args.rounds} rounds"
    table = markdown_table(["", "seconds", "over the plain pass"], rows)
    return f"{machine()} {what}.\n\n{table}\n\n{verdicts([compared])}", compared


def main(argv: list[str] | None = None) -> float:
    options = parser(__doc__, images=500, prototypes=200, batch=32, rounds=3)
    options.add_argument("--quick", action="store_true", help="a small encoder and few images, to see that it runs")
    options.add_argument("--each", action="store_true", help="also every measurement alone")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    encoder, size = {"size": "tiny"}, 224
    if args.quick:
        encoder, size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}, 64
        args.images, args.prototypes, args.batch, args.rounds = 20, 10, 8, 1
    config = MIMConfig(image_size=size, encoder_config=encoder)
    text, compared = report(alternate(arms(config, args), args.rounds, warmup=1), args)
    publish(args.out, "analysis", text, [compared])
    return compared["ratio"][1]


if __name__ == "__main__":
    main()
