"""The pictures of the documentation: what each method hides and predicts, every mask generator, and every pooler.

    make gallery                                # trains the recipe `quick` first, for the poolers
    python docs/site/gallery.py [--run FOLDER]  # with the run of `quick` that is in FOLDER

The photographs are those of scikit-image: Chelsea the cat (Stefan van der Walt, CC0) and coffee (Rachel Michetti, CC0).
Teachers that have to be downloaded are replaced by `lite0` (`pip install "hf-mim[teacher]"`).
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import skimage.data
import torch
from torch import Tensor

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.modeling.encoder_base import unpatchify
from hf_mim.modeling.masking import MASK_GENERATORS, sample_masks
from hf_mim.modeling.target_base import displayable
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.commands.probe import probe
from hf_mim.training.commands.teacher import fit_codebook
from hf_mim.training.plots.grid import draw_grid
from hf_mim.training.plots.pictures import to_tiles
from hf_mim.training.recipe import read


OUT = Path(__file__).resolve().parents[1] / "gallery"
LITE0 = {"teacher": "lite0", "layers": [-2], "match": "input"}
# name of the picture -> the recipe whose masks and target it shows, and what is changed in its model, since neither a
# large encoder nor a teacher of the Hub is needed for a picture
SMALL_VIT = {"encoder_config": {"size": "tiny"}, "decoder_config": {}}
METHODS: dict[str, tuple[str, dict]] = {
    "mae": ("mae", SMALL_VIT),
    "pixio": ("pixio", {"encoder_config": {"size": "tiny"}, "decoder_config": {"num_hidden_layers": 1}}),
    "simmim": ("simmim", SMALL_VIT),
    "a2mim": ("a2mim_vit", SMALL_VIT),
    "maskfeat": ("maskfeat", SMALL_VIT),
    "data2vec": ("data2vec", SMALL_VIT | {"masks_per_image": 1}),
    "dtm": ("dtm", SMALL_VIT | {"target_config": {"features": {"name": "teacher_feature", **LITE0}}}),
    "maskdistill": ("maskdistill", SMALL_VIT | {"target_config": LITE0}),
    "img2vec": ("img2vec", SMALL_VIT | {"target_config": LITE0}),
    "spark": ("spark", {"encoder_config": {"model_name": "resnet18"}, "decoder_config": {}}),
}
MASKS = (
    ("random", {"ratio": 0.75}),
    ("random", {"ratio": 0.6, "unit": 2}),
    ("block", {"ratio": 0.4}),
    ("inverse_block", {"ratio": 0.8}),
)
POOLERS = ("abmilp", "attention", "simpool", "efficient", "central", "cls_attention")
CODES = 32
SHORT = ("data.max_train_images=3000", "training.max_steps=2000", "training.watch_every=0")


def photographs(size: int) -> list[np.ndarray]:
    """Squares from the middle of the photographs, (size, size, 3) uint8."""
    squares = []
    for image in (skimage.data.chelsea(), skimage.data.coffee()):
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        square = PIL.Image.fromarray(image[top : top + side, left : left + side])
        squares.append(np.asarray(square.resize((size, size), PIL.Image.Resampling.LANCZOS)))
    return squares


def normalised(config: MIMConfig) -> Tensor:
    """The photographs as `pixel_values`."""
    images = torch.from_numpy(np.stack(photographs(config.image_size))).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in config.statistics())
    return (images - mean) / std


def save(picture: PIL.Image.Image, name: str) -> None:
    OUT.mkdir(exist_ok=True)
    picture.save(OUT / f"{name}.webp", quality=80, method=6)
    print(OUT / f"{name}.webp", picture.size, flush=True)


# ---- methods -------------------------------------------------------------------------------------------------------
def config_of(recipe: str, changes: dict) -> MIMConfig:
    """The model of a recipe; a dict among `changes` is laid over the recipe's, an empty one replaces it."""
    model = {key: value for key, value in read(recipe)["model"].items() if key in MIMConfig.__dataclass_fields__}
    for key, value in changes.items():
        model[key] = {**model.get(key, {}), **value} if isinstance(value, dict) and value else value
    if model["decoder"] != "spark":
        model["decoder"] = "linear" if model["encoder_config"].get("mask_style") != "drop" else "transformer"
    return MIMConfig(**model)


@torch.no_grad()
def draw_method(config: MIMConfig) -> PIL.Image.Image:
    """The photographs, what is hidden of them, and what is to be predicted."""
    torch.manual_seed(0)
    model, pixels = MIMForPreTraining(config).eval(), normalised(config)
    grid = model.mask_grid(config.image_size, config.image_size)
    masks = sample_masks(config, grid, [np.random.default_rng(seed) for seed in (1, 2)])
    made = model.reconstruct(pixels, masks, with_target=True)
    columns = {"image": made.original, "what the encoder sees": made.masked}
    for name, images in (made.extra or {}).items():
        if "prediction" not in name:  # of an untrained model
            columns[name] = (
                images.sqrt() if "spectrum" in name else images
            )  # photographs have little at high frequencies
    if not made.extra:
        columns["target"] = pixel_target(model, pixels, grid)
    tiles = {caption: to_tiles(images) for caption, images in columns.items()}
    return draw_grid(tiles, blocks=1)


def pixel_target(model: MIMForPreTraining, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels as they are predicted: normalised ones over four standard deviations."""
    image = unpatchify(model.target.targets(pixels, grid)["patches"], grid, *pixels.shape[2:])
    if model.target.normalize:
        return (image / 4 + 0.5).clamp(0, 1)
    return displayable(image, *model.config.statistics())


def draw_codes() -> PIL.Image.Image:
    """The target `discrete_token`, with a codebook fitted to the photographs themselves."""
    with tempfile.TemporaryDirectory() as scratch:
        for i, image in enumerate(photographs(448)):
            Path(scratch, "photos").mkdir(exist_ok=True)
            PIL.Image.fromarray(image).save(f"{scratch}/photos/{i}.png")
        codes = Path(scratch, "codes.safetensors")
        layers = ["model.target_config.layers=[-2]", "model.image_size=224", "model.encoder_config.patch_size=16"]
        fit_codebook("lite0", codes, [f"data.dataset={scratch}/photos", "model.num_channels=3", *layers], CODES, 2)
        target = {"features": {"name": "teacher_feature", **LITE0, "match": "interpolate"}, "codebook": str(codes)}
        config = config_of("maskdistill", SMALL_VIT | {"target": "discrete_token"})
        fields = {name: getattr(config, name) for name in ("image_size", "encoder_config", "masking", "masking_config")}
        return draw_method(MIMConfig(**fields, decoder="linear", target="discrete_token", target_config=target))


# ---- masks and poolers ---------------------------------------------------------------------------------------------
def draw_masks() -> PIL.Image.Image:
    """A column for each generator, and a row for each draw, on one photograph."""
    pixels, grid = torch.from_numpy(photographs(224)[0].copy()).permute(2, 0, 1) / 255, (14, 14)
    columns = {}
    for name, options in MASKS:
        rngs = [np.random.default_rng(seed) for seed in range(3)]
        masks = MASK_GENERATORS[name](len(rngs), grid, rngs, **options).view(-1, 1, *grid)
        hidden = masks.repeat_interleave(16, 2).repeat_interleave(16, 3)
        caption = f"{name}, " + ", ".join(f"{key} {value}" for key, value in options.items())
        columns[caption] = to_tiles(torch.where(hidden, 0.5, pixels.expand(len(rngs), -1, -1, -1)))
    return draw_grid(columns, blocks=1)


def draw_poolers(run: str) -> PIL.Image.Image:
    """Where the poolers look, on a frozen encoder of the recipe `quick`."""
    with tempfile.TemporaryDirectory() as scratch:
        names = f"probe.poolers=[{', '.join(POOLERS)}]"
        place = [f"probe.output_dir={scratch}/probe", f"probe.cache={scratch}/cache"]
        few = ["probe.seeds=[0]", "probe.epochs=10", "probe.untrained=false"]
        few += ["data.max_train_images=1000", "data.max_eval_images=300"]
        probe(run, [names, *place, *few])
        return PIL.Image.open(f"{scratch}/probe/attention.png").copy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the output folder of `hf-mim pretrain`; without one, it is trained first")
    parser.add_argument("--only", choices=("methods", "masks", "poolers"))
    arguments = parser.parse_args()
    if arguments.only in (None, "methods"):
        for name, choice in METHODS.items():
            save(draw_method(config_of(*choice)), name)
        save(draw_codes(), "discrete_token")
    if arguments.only in (None, "masks"):
        save(draw_masks(), "masks")
    if arguments.only in (None, "poolers"):
        scratch = tempfile.mkdtemp()
        save(
            draw_poolers(arguments.run or str(pretrain("quick", [*SHORT, f"training.output_dir={scratch}/run"]))),
            "poolers",
        )
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
