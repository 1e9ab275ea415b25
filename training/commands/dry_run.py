"""What a run would do, without doing it: `--dry-run`."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from hf_mim.modeling.options import pair
from hf_mim.training.run import TrainerT, TrainingRun
from hf_mim.training.trainer.advice import describe_duration
from hf_mim.training.trainer.memory import MemoryNeed, measure_memory


UNKNOWN = "not estimated: of one process without torch_compile only"


def dry_run(run: TrainingRun[TrainerT], make_trainer: Callable[[], TrainerT]) -> Path:
    """Prints about how long a run that is set up would take and how much memory, both measured on a few images of
    noise. Nothing is written.

    Returns:
        the folder that the run would make.
    """
    with TemporaryDirectory() as folder:  # the Trainer makes the one it is given
        run.arguments.output_dir = folder
        trainer = make_trainer()
        config = getattr(trainer.bare_model.config, "backbone_config", trainer.bare_model.config)
        size = pair(run.recipe["model"].get("image_size") or config.image_size)
        with run.console.status("measuring a step"):
            time = describe_duration(trainer, run.length, size)
            memory = measure_memory(trainer, (config.num_channels, *size))
    if run.arguments.cache_teacher:
        run.console.log(
            "a teacher is in every step below; training.cache_teacher asks it once for each form of an image"
        )
    run.describe(time=time or UNKNOWN, memory=describe_memory(memory) if memory else UNKNOWN)
    total, free = memory.total if memory else 0, free_memory(run.arguments.device)
    if total > free:
        run.console.warn(
            f"warning: {gigabytes(total)} are needed, and {gigabytes(free)} are free: lower "
            "training.per_device_train_batch_size, or set training.activation_checkpointing=true"
        )
    run.console.log(f"dry run: nothing was written; the output folder would be {run.location}")
    return run.folder


def describe_memory(memory: MemoryNeed) -> str:
    parts = {"weights": memory.weights, "optimizer": memory.optimizer, "gradients and activations": memory.step}
    return f"about {gigabytes(memory.total)}: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())


def gigabytes(size: int) -> str:
    return f"{size / 2**30:,.2g} GB" if size >= 2**30 else f"{size / 2**20:,.0f} MB"


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available
