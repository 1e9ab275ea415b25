"""What squeezing costs images that are not square: accuracies of one frozen encoder with `data.eval_crop` squeeze, none
and 0.875, on clothes of the shipped data pasted on textured canvases of 3:2 and 2:3.

    python benchmarks/eval_crop.py FOLDER      # of a run of a grey model, such as `hf-mim pretrain`

The clothes lie in the middle of the canvas, or anywhere on it, where a centre crop may cut them off.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image

from hf_mim.training.checkpoint import load_encoder
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.decoding import decode
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.scenes import texture
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.evaluation import frozen


SHAPES = ((48, 72), (72, 48))  # height and width, pixels
PIECE = 40  # pixels of a side of the pasted image
COUNTS = {"train": 1000, "test": 1000}
CROPS = ("squeeze", "none", 0.875)


def compose(root: Path, spread: float, seed: int = 0) -> None:
    """Writes class folders. `spread`: how far from the middle a piece may lie, as a share of the room that there is."""
    rows = open_dataset(DataArguments())
    for split, count in COUNTS.items():
        chosen = rows[split].select(range(count))  # classes are balanced in any run of rows
        for index, row in enumerate(chosen):
            rng = np.random.default_rng((seed, split == "test", index))
            canvas = texture(rng, SHAPES[index % 2])
            piece = PIL.Image.fromarray(decode(row["image"], 1)[0]).resize((PIECE, PIECE), PIL.Image.Resampling.BICUBIC)
            piece = np.array(piece, dtype=np.float32)
            room = np.array(canvas.shape) - PIECE
            top, left = np.rint(room * (0.5 + spread * (rng.random(2) - 0.5))).astype(int)
            place = canvas[top : top + PIECE, left : left + PIECE]
            place[piece > 12] = piece[piece > 12]
            folder = root / split / str(row["label"])
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(canvas.astype(np.uint8)).save(folder / f"{index:05}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the output folder of a run")
    model = load_encoder(parser.parse_args().model)
    print("| pieces | eval_crop | k-NN | linear probe |\n|---|---|---|---|")
    for title, spread in (("in the middle", 0.2), ("anywhere", 1.0)):
        with tempfile.TemporaryDirectory() as root:
            compose(Path(root), spread)
            for crop in CROPS:
                splits = load_splits(DataArguments(dataset=root, eval_crop=crop), model.config)
                parts = [(part, part.labels) for part in (splits.train_eval, splits.test)]
                scores = frozen.evaluate_encoder(model, *parts, False)
                print(f"| {title} | {crop} | {scores['knn_mean']:.1f} | {scores['linear_mean']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
