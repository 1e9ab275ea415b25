"""What `MIMTrainer` does between steps: targets that move, epochs, damaged shards."""

import torch
from transformers import TrainerCallback

from hf_mim.modeling.target_base import Target
from hf_mim.training.common.console import RunConsole
from hf_mim.training.data.base import FollowsEpochs, ImageDataset


class TargetCallback(TrainerCallback):
    """Moves a target that follows the student after each optimizer step."""

    def __init__(self, target: Target, sharded: bool):
        self.target, self.sharded = target, sharded

    def on_train_begin(self, args, state, control, **kwargs):
        # Before they were sharded the weights of all processes but the first may have been empty memory.
        if self.sharded and state.global_step == 0:
            self.target.update(0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.target.update(state.global_step + 1)


class DamagedShardsCallback(TrainerCallback):
    """Warns, once, of each shard of a stream that turns out to be damaged."""

    def __init__(self, dataset: ImageDataset, console: RunConsole):
        self.dataset, self.console = dataset, console
        self.warned: set[str] = set()

    def on_log(self, args, state, control, **kwargs):
        for message in self.dataset.damaged_shards():
            if message not in self.warned:
                self.warned.add(message)
                self.console.warn(f"{message}, the others are left out")

    on_save = on_log  # when the processes have told each other


class EpochSampler(torch.utils.data.Sampler):
    """Every image once, in an order that follows from (seed, epoch) alone: the same in every process, and after a
    resume. accelerate's own, whose order this is, does not learn the epoch where several processes resume."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.count, generator=generator).tolist()


class EpochCallback(TrainerCallback):
    """Tells data set and sampler the epoch. accelerate tells the data set with one process, but not with several: its
    loader then finds a sampler to tell and stops there."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        # 1e-9: an epoch is a sum of shares; at its end it is a whole number, or less by rounding.
        epoch = int((state.epoch or 0) + 1e-9)
        for listener in (self.trainer.train_dataset, self.trainer.sampler):
            if isinstance(listener, FollowsEpochs):
                listener.set_epoch(epoch)

    def on_step_end(self, args, state, control, **kwargs):
        if args.ignore_data_skip:  # Trainer counts from the resume then, and a stream's passes are its own affair
            state.epoch = state.global_step / state.max_steps
