"""How many images are enough: the recipe `mae_small` on fewer and fewer of the shipped images, with the same number of
steps, and every encoder evaluated on the same images.

    python benchmarks/own_images.py --out docs/own_images.md
"""

import tempfile
from pathlib import Path

from measure import parser, write_section

from hf_mim.training.checkpoint import load_encoder
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.evaluation import frozen


COUNTS = (100, 300, 1000, 3000)
STEPS = (200, 2000)  # of 64 images
QUIET = ["data.max_eval_images=0", "training.watch_every=0", "training.save_strategy=no"]


def scores_of(folder: str | Path) -> dict[str, float]:
    model = load_encoder(str(folder))
    splits = load_splits(DataArguments(), model.config)
    train = frozen.subset(splits.train_eval, frozen.TRAIN_IMAGES)
    return frozen.evaluate_encoder(model, train, frozen.subset(splits.test, frozen.TEST_IMAGES))


def pretrained(count: int, steps: int, seed: int) -> dict[str, float]:
    """The scores of an encoder that saw `count` images in `steps` batches."""
    changes = [f"data.max_train_images={count}", f"training.max_steps={steps}", f"training.seed={seed}", *QUIET]
    with tempfile.TemporaryDirectory() as folder:
        pretrain("mae_small", [*changes, f"training.output_dir={folder}/run"])
        return scores_of(f"{folder}/run")


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, seed=0).parse_args(argv)
    titles = "".join(f" k-NN, {steps:,} steps | linear probe, {steps:,} steps |" for steps in STEPS)
    lines = [f"| images |{titles}", "|---|" + "---|" * 2 * len(STEPS)]
    for count in COUNTS:
        scores = [pretrained(count, steps, arguments.seed) for steps in STEPS]
        cells = "".join(f" {score['knn_mean']:.1f} | {score['linear_mean']:.1f} |" for score in scores)
        lines.append(f"| {count:,} |{cells}")
        print(lines[-1], flush=True)
    if arguments.out:
        write_section(arguments.out, "own_images", "\n".join(lines))


if __name__ == "__main__":
    main()
