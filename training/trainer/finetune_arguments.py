"""The section `finetune` of a recipe."""

from dataclasses import dataclass

from hf_mim.modeling.options import unknown_choice
from hf_mim.training.data.arguments import AugmentArguments
from hf_mim.training.trainer.adaptation_arguments import AdaptationArguments


TASKS = ("classification", "segmentation")
OPTIMIZERS = ("lamb",)


@dataclass
class FinetuneArguments(AdaptationArguments, AugmentArguments):
    """The section `finetune` of a recipe; its augmentations are those of `AugmentArguments`, and what is trained
    how fast is said by `AdaptationArguments`: `layer_decay` for both tasks, LoRA for classification.

    Args:
        task: classification, or segmentation, where only what says so below applies.
        from_scratch: draw all weights anew; what a checkpoint's are worth is the difference. For both tasks.
        freeze: leave the encoder as it is, also its drop path and batch norms. For both tasks.
        drop_path: rate of the deepest block, in [0, 1); None keeps what the checkpoint's config says. For both tasks.
        optimizer: lamb (timm's), or None for that of `training.optim`. For both tasks.
        ema: decay of a moving average of the weights, which is what is evaluated and saved; 0 has none. For both tasks.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        class_weights: a weight per class for the training loss, in the order of the classes; "balanced" makes them
            inverse to how often a class occurs, 1 on the mean over the images.
        classes: for segmentation: how many, or their names by id; None takes the ids that the masks hold.
        head_size: for segmentation: channels of UperNet.
        pyramid: for segmentation: factors by which the maps of four blocks are scaled; None makes strides of 4, 8, 16
            and 32 pixels. Larger ones are finer and cost more.
    """

    task: str = "classification"
    from_scratch: bool = False
    freeze: bool = False
    drop_path: float | None = None
    optimizer: str | None = None
    ema: float = 0.0
    label_smoothing: float = 0.0
    class_weights: str | list[float] | None = None
    classes: int | list[str] | None = None
    head_size: int = 512
    pyramid: list[float] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise unknown_choice("finetune.task", self.task, TASKS)
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise unknown_choice("finetune.optimizer", self.optimizer, OPTIMIZERS)
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise unknown_choice("finetune.class_weights", self.class_weights, ["balanced", "a list of numbers"])
        self.check_adaptation("finetune")
        for name in ("drop_path", "ema", "label_smoothing"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"finetune.{name} must be in [0, 1), not {getattr(self, name)}")
        if self.head_size < 1:
            raise ValueError(f"finetune.head_size must be at least 1, not {self.head_size}")
        if self.lora and self.freeze:
            raise ValueError("finetune.lora=true trains additions to the encoder that finetune.freeze=true forbids")
