"""Three examples of each command, for its help. `tests/test_documented_commands.py` runs them."""

from rich.markup import escape


EXAMPLES: dict[str, tuple[str, str, str]] = {
    "hf-mim": ("hf-mim pretrain", "hf-mim options", "hf-mim recipes"),
    "pretrain": (
        "hf-mim pretrain",
        "hf-mim pretrain mae data.dataset=photos training.num_train_epochs=400",
        "hf-mim pretrain FOLDER training.resume=true",
    ),
    "distill": (
        "hf-mim distill lite0 vit",
        "hf-mim distill facebook/dinov2-base lite0 mobilenetv3_small_050 data.dataset=photos",
        "hf-mim distill facebook/dinov2-base vit data.dataset=photos model.masking=block",
    ),
    "finetune": (
        "hf-mim finetune FOLDER data.dataset=photos",
        "hf-mim finetune facebook/dinov2-base data.dataset=photos finetune.lora=true",
        "hf-mim finetune FOLDER segmentation_small task=segmentation",
    ),
    "recipes": ("hf-mim recipes", "hf-mim recipes mae", "hf-mim recipes quick > mine.yaml"),
    "options": ("hf-mim options", "hf-mim options target.hog", "hf-mim options crop_scale"),
    "reconstruct": (
        "hf-mim reconstruct FOLDER",
        "hf-mim reconstruct FOLDER image.png",
        "hf-mim reconstruct FOLDER image.png --out filled_in.png --force",
    ),
    "analyze": (
        "hf-mim analyze FOLDER",
        "hf-mim analyze FOLDER facebook/dinov2-base data.dataset=photos",
        "hf-mim analyze FOLDER analyze.images=100",
    ),
    "probe": (
        "hf-mim probe FOLDER",
        "hf-mim probe facebook/dinov2-base data.dataset=photos",
        "hf-mim probe FOLDER 'probe.poolers=[mean, abmilp]' probe.epochs=20",
    ),
    "teacher": (
        "hf-mim teacher facebook/dinov2-base",
        "hf-mim teacher facebook/dinov2-base data.dataset=photos",
        "hf-mim teacher facebook/dinov2-base model.image_size=32",
    ),
    "codebook": (
        "hf-mim codebook facebook/dinov2-base codes.safetensors",
        "hf-mim codebook facebook/dinov2-base codes.safetensors --codes 256",
        "hf-mim codebook facebook/dinov2-base codes.safetensors data.dataset=photos --images 500",
    ),
    "embed": (
        "hf-mim embed FOLDER vectors",
        "hf-mim embed facebook/dinov2-base vectors data.dataset=photos",
        "hf-mim embed FOLDER vectors data.dataset=photos data.split=test --pooler cls",
    ),
    "search": (
        "hf-mim search VECTORS image.png",
        "hf-mim search VECTORS image.png --count 20",
        "hf-mim search VECTORS image.png --out alike.jpg --force",
    ),
    "demo": (
        "hf-mim demo FOLDER",
        "hf-mim demo FOLDER --space space",
        "hf-mim demo FOLDER --page page",
    ),
    "new": (
        "hf-mim new target edge",
        "hf-mim new pooler softmax",
        "hf-mim new mask disc --out parts",
    ),
    "push": (
        "hf-mim push FOLDER me/my-model",
        "hf-mim push FOLDER me/my-model --private --tag v1",
        "hf-mim push FOLDER me/my-model --pr --license mit",
    ),
    "card": (
        "hf-mim card FOLDER me/my-model --out card",
        "hf-mim card FOLDER me/my-model --out card --license mit",
        "hf-mim card FOLDER me/my-model --out card --force",
    ),
    "convert": (
        "hf-mim convert mae_pretrain_vit_base.pth out",
        "hf-mim convert mae_pretrain_vit_base.pth out --image-size 224",
        "hf-mim convert facebook/dinov2-base out",
    ),
    "doctor": (
        "hf-mim doctor FOLDER",
        "hf-mim doctor FOLDER data.dataset=photos",
        "hf-mim doctor facebook/dinov2-base",
    ),
    "export": (
        "hf-mim export FOLDER out --to transformers",
        "hf-mim export FOLDER out --to timm",
        "hf-mim export FOLDER out --to onnx",
    ),
}


def epilog(name: str) -> str:
    """The examples of a command below its help."""
    return escape("\n\n".join(["Examples:", *(f"  {line}" for line in EXAMPLES[name])]))
