"""How long pretraining takes by recipe and image size: the processor's time of a training step on one core.

    python benchmarks/model_sizes.py --out docs/own_images.md

A step is forward, loss, backward and AdamW, in bf16 where the processor has it; loading images is not counted.
"""

from measure import alternate, machine, parser, quartiles, tensor_memory, write_section
from peers import Arm, make_batch
from pretraining_step import make_step

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.training.recipe import read
from hf_mim.training.trainer.arguments import has_bf16


PHOTOGRAPHS = {"num_channels": 3, "image_mean": None, "image_std": None}
TINY = {
    "encoder_config": {"size": "tiny"},
    "decoder_config": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3},
}
# (recipe, changes of its model, the same on the command line, images of a step)
POINTS = (
    ("mae_small", {}, "", 64),
    ("mae_small", {"image_size": 64, "encoder_config": {"patch_size": 8}, **PHOTOGRAPHS}, "64 px, patch 8", 64),
    ("mae_small", {"image_size": 96, "encoder_config": {"patch_size": 8}, **PHOTOGRAPHS}, "96 px, patch 8", 64),
    ("mae_small", {"image_size": 224, "encoder_config": {"patch_size": 16}, **PHOTOGRAPHS}, "224 px, patch 16", 32),
    ("a2mim_resnet18_small", {"image_size": 96, **PHOTOGRAPHS}, "96 px", 8),
    ("mae", TINY, "size=tiny, decoder 192x4", 8),
)
IMAGES, EPOCHS = 10_000, 100


def model_of(recipe: str, changes: dict) -> MIMConfig:
    model = dict(read(recipe)["model"])
    for key, value in changes.items():
        model[key] = {**model[key], **value} if isinstance(value, dict) else value
    return MIMConfig(**model)


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, rounds=9).parse_args(argv)
    precision = "bf16" if has_bf16() else "float32"
    lines = [
        f"{machine()} {precision}.",
        "",
        f"| recipe | images | parameters | images/s a core | MiB a step | {EPOCHS} epochs of {IMAGES:,} images |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, changes, title, count in POINTS:
        config = model_of(recipe, changes)
        batch = make_batch(config, count)
        model = MIMForPreTraining(config)
        arm = Arm(model, lambda model=model, batch=batch: model(batch.pixel_values, bool_masked_pos=batch.mask).loss)
        step = make_step(arm, precision)
        _, seconds, _ = quartiles(alternate({"step": step}, arguments.rounds)["step"])
        speed = count / seconds
        size = title or f"{config.image_size} px"
        cells = (
            f"`{recipe}`",
            size,
            f"{model.num_parameters() / 1e6:.1f} M",
            f"{speed:,.0f}",
            f"{tensor_memory(step):,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} | {duration(IMAGES * EPOCHS / speed)} |")
        print(lines[-1], flush=True)
    if arguments.out:
        write_section(arguments.out, "model_sizes", "\n".join(lines))


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


if __name__ == "__main__":
    main()
