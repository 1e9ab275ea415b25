"""What an ImageNet-1K run of each large recipe costs: computed, not measured.

    python benchmarks/training_cost.py --out docs/scaling.md

FLOPs of an image are counted on this machine (`training.trainer.throughput`), a frozen teacher's forward
pass is added. GPU hours follow from the number of epochs in the recipe, the vendor's peak and the share of it that is
assumed to be reached; images per second are what the loader must then deliver to each GPU.
"""

import torch
from measure import markdown_table, parser, write_section
from torch.utils.flop_counter import FlopCounterMode

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.training.recipe import list_recipes, resolve
from hf_mim.training.trainer.throughput import PEAKS, flops_per_image


IMAGES = 1_281_167  # ImageNet-1K's training split
KILOBYTES = 110  # of its JPEG files, on average
# The architectures of the recipes' teachers; their weights do not matter here.
TEACHERS = {
    "facebook/dino-vitb16": {"encoder": "native", "encoder_config": {"model_type": "vit"}},
    "Ramos-Ramos/dino-resnet-50": {"encoder": "native", "encoder_config": {"model_type": "resnet"}},
}


def teacher_of(target_config: dict) -> str | None:
    return target_config.get("teacher") or target_config.get("features", {}).get("teacher")


def student_flops(model: dict) -> float:
    """FLOPs of an image. A teacher's target is replaced by pixels: only the width of the last layer changes."""
    if teacher_of(model.get("target_config", {})):
        model = {**model, "target": "pixel", "target_config": {}}
    with torch.device("meta"):  # no weights are needed
        student = MIMForPreTraining(MIMConfig(**model))
    return flops_per_image(student)


def teacher_flops(name: str) -> float:
    """FLOPs of the forward pass of one image of 224 pixels."""
    config = MIMConfig(image_size=224, attn_implementation="eager", **TEACHERS[name])
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        MIMModel(config, add_pooling_layer=False).eval()(torch.zeros(1, 3, 224, 224))
    return float(counter.get_total_flops())


def cost(name: str, gpu: str, utilisation: float) -> dict:
    """{"student", "teacher" (FLOPs of an image), "epochs", "speed" (images per second and GPU), "hours"}"""
    recipe = resolve(name)
    teacher = teacher_of(recipe["model"].get("target_config", {}))
    student, taught = student_flops(recipe["model"]), teacher_flops(teacher) if teacher else 0.0
    speed = PEAKS[gpu] * utilisation / (student + taught)
    epochs = recipe["training"]["num_train_epochs"]
    return {
        "student": student,
        "teacher": taught,
        "epochs": epochs,
        "speed": speed,
        "hours": IMAGES * epochs / speed / 3600,
    }


def large_recipes() -> list[str]:
    """Pretraining recipes for images of 192 pixels and more."""
    found = [(entry["name"], resolve(entry["name"])) for entry in list_recipes()]
    return [name for name, recipe in found if "target" in recipe["model"] and recipe["model"]["image_size"] >= 192]


def main(argv: list[str] | None = None) -> list[dict]:
    options = parser(__doc__, utilisation=(0.4, "share of the GPU's peak that is reached"))
    options.add_argument("--recipes", nargs="+", help="by default all large ones")
    options.add_argument("--gpu", choices=list(PEAKS), default="H100")
    args = options.parse_args(argv)
    rows, costs = [], []
    for name in args.recipes or large_recipes():
        found = cost(name, args.gpu, args.utilisation)
        costs.append(found)
        megabytes = found["speed"] * KILOBYTES / 1000
        flops = [f"{found['student'] / 1e9:.1f}", f"{found['teacher'] / 1e9:.1f}" if found["teacher"] else ""]
        rows.append([f"`{name}`", *flops, found["epochs"], f"{found['speed']:,.0f}", f"{megabytes:,.0f}"])
        rows[-1].append(f"{found['hours']:,.0f}")
    header = ["recipe", "GFLOP an image", "teacher", "epochs", "images/s a GPU", "MB/s of JPEG a GPU", "GPU hours"]
    text = f"{args.gpu} at {args.utilisation:.0%} of its peak in bfloat16.\n\n{markdown_table(header, rows)}"
    print(text)
    if args.out:
        write_section(args.out, "training_cost", text)
    return costs


if __name__ == "__main__":
    main()
