"""`MIMTrainingArguments`: the section `training` of a recipe."""

from dataclasses import dataclass, field

import torch
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType

from hf_mim.training.common.device import cores_per_process, has_bf16
from hf_mim.training.plots.charts import check_figures
from hf_mim.training.trainer.adaptation_arguments import AdaptationArguments
from hf_mim.training.trainer.optimization import OptimizationArguments


@dataclass
class MIMTrainingArguments(AdaptationArguments, OptimizationArguments):
    """`TrainingArguments` with the defaults of masked image modeling, what `OptimizationArguments` and, for
    pretraining, `AdaptationArguments` add, and these.

    Args:
        learning_rate: wins over `base_learning_rate` where it is given.
        bf16: "auto" turns it on where the machine has the instructions.
        lr_scheduler_type: half a cosine to 0 by default; `cosine_with_min_lr` ends at the floor that
            `lr_scheduler_kwargs` must name, `min_lr` or, as a share of the peak, `min_lr_rate`.
        lr_drops: shares of the training, in (0, 1), after which the learning rate falls to a tenth; it replaces
            `lr_scheduler_type` where it is given, and is constant but for that and the warm-up.
        freeze_layers: how many of the encoder's first blocks stay as they are, with their drop path and batch norms,
            and with the embedding; 0 freezes nothing. For pretraining.
        resume: go on in `output_dir` from its last complete checkpoint, exactly as if there had been no break; from
            the beginning where there is none.
        watch_every: steps, or a share of the training below 1, between checks (see `TrainingMonitor`); 0 makes none.
        activation_checkpointing, gradient_checkpointing: one option under two names: transformers renamed it in 5.24
            and drops the older name in version 6. Either works here with every version.
        cache_teacher: keep what a frozen teacher makes of every image on disk (float16, in `data.cache_dir`), for runs
            whose crops are the same at each epoch; the size is said first. See `TeacherCache`. For pretraining.
        profile: record a few steps, and write where their time goes (see `ProfileCallback`).
        figures: png; or svg or pdf, for papers: charts are written in that format too, beside the PNG.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]  # a number once it is made
        default=None, metadata={"help": "Wins over base_learning_rate."}
    )
    bf16: bool | str = field(  # type: ignore[assignment]  # true or false once it is made
        default="auto", metadata={"help": "true, false, or auto: where the machine has it."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute activations again in the backward pass, to save memory."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The older name of activation_checkpointing."}
    )
    lr_drops: list[float] | None = field(default=None, metadata={"help": "Shares of the training: a tenth from there."})
    freeze_layers: int = field(default=0, metadata={"help": "The first blocks, and the embedding, that stay."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    watch_every: float = field(default=0.25, metadata={"help": "Steps or a share of the training; 0 is never."})
    cache_teacher: bool = field(default=False, metadata={"help": "Keep the features of frozen teachers on disk."})
    profile: bool = field(default=False, metadata={"help": "Write where the time of a few steps goes."})
    figures: str = field(default="png", metadata={"help": "png, svg or pdf: charts are written so too."})
    per_device_train_batch_size: int = 64
    adam_beta2: float = 0.95
    weight_decay: float = 0.05
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.05
    logging_steps: float = 10
    save_strategy: SaveStrategy | str = "epoch"
    save_total_limit: int | None = 1
    disable_tqdm: bool | None = True
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False  # it would wait for the device at every step, and hide what must be seen
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "float32"

    def __post_init__(self):
        if self.hub_token is not None:
            # It would be saved with the recipe.
            raise ValueError("training.hub_token is refused: log in with `hf auth login`, or set HF_TOKEN")
        check_hub_strategy(self.hub_strategy)
        self.check_optimization()
        check_figures("training.figures", self.figures)
        self.check_adaptation("training")
        if self.freeze_layers < 0:
            raise ValueError(f"training.freeze_layers must be a number of blocks, not {self.freeze_layers}")
        if self.lora and self.freeze_layers:
            raise ValueError(
                "training.lora=true leaves all blocks as they are but for its additions: set training.freeze_layers=0"
            )
        if self.bf16 not in (True, False, "auto"):
            raise ValueError(f"training.bf16 must be true, false or auto, not {self.bf16!r}")
        if any(not 0 < share < 1 for share in self.lr_drops or ()):
            raise ValueError(f"training.lr_drops must be shares between 0 and 1, not {self.lr_drops}")
        if not 0 <= self.watch_every < float("inf"):
            raise ValueError(f"training.watch_every must be a number of steps, a share or 0, not {self.watch_every}")
        if self.bf16 == "auto":
            self.bf16 = has_bf16() and not self.fp16
        # Recipes are written for large machines; more workers than cores only wait for each other, and torch warns of
        # them whenever it makes a loader.
        self.asked_workers = self.dataloader_num_workers
        self.dataloader_num_workers = min(self.asked_workers, cores_per_process())
        if self.dataloader_num_workers == 0:  # what only workers have, recipes may say all the same
            self.dataloader_persistent_workers, self.dataloader_prefetch_factor = False, None
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            raise ValueError(
                "training.lr_scheduler_type=cosine_with_min_lr needs its floor: set "
                "training.lr_scheduler_kwargs.min_lr_rate, a share of the learning rate such as 0.01, or .min_lr"
            )
        self.activation_checkpointing = bool(
            self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing
        )
        self.gradient_checkpointing = self.activation_checkpointing
        # TrainingArguments refuses bf16 without a GPU, unless the CPU was asked for.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if self.learning_rate is None:
            self.learning_rate = self.scaled_learning_rate(self.total_batch_size)

    @property
    def workers(self) -> str:
        """How many loader workers there are, for people; "" where there are none."""
        asked, count = self.asked_workers, self.dataloader_num_workers
        kept = f" (training.dataloader_num_workers={asked} is more than the CPU cores)" if asked > count else ""
        return f"{count} loader worker{'s' * (count > 1)}{kept}" if count else ""

    @property
    def total_batch_size(self) -> int:
        """Images per optimizer step, over all devices and processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def check_hub_strategy(strategy: HubStrategy | str) -> None:
    """Raises:
    ValueError: it would send the states of optimizer and random numbers, which are pickles.
    """
    strategy = HubStrategy(strategy)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"training.hub_strategy={strategy.value} would send the optimizer's state to the Hub, which is a pickle; "
            "choose every_save or end, and resume from the checkpoints in the output folder"
        )
