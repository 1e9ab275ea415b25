"""`MIMTrainer`: the Hugging Face Trainer with what masked image modeling wants by default."""

import re
import signal
import sys
import time
from collections.abc import Sized
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy, SchedulerType

from hf_mim.modeling.options import pair
from hf_mim.training.data.base import FollowsEpochs, ImageDataset
from hf_mim.training.data.batches import normalize_batch
from hf_mim.training.data.streaming import StreamedImages
from hf_mim.training.foreign_errors import is_lost_worker
from hf_mim.training.trainer.optimization import OptimizationArguments, WeightDecayCallback, lamb, scale_rates
from hf_mim.training.trainer.pushing import PushMixin, check_hub_strategy
from hf_mim.training.trainer.saving import SafeCheckpointMixin, handle_children, lost_worker, outlive_sigterm
from hf_mim.training.trainer.throughput import Throughput, flops_per_image, peak_flops


# What wrappers put before a parameter's name.
WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
NOTABLE_WAIT = 0.1  # share of the time waiting for data from which the progress says so
LINES = 20  # how many progress lines a run prints where there is no terminal


def has_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices by instruction, on its GPU or, without one, on its CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


@dataclass
class MIMTrainingArguments(OptimizationArguments):
    """`TrainingArguments` with the defaults of masked image modeling, what `OptimizationArguments` adds, and these.

    Args:
        learning_rate: wins over `base_learning_rate` where it is given.
        bf16: "auto" turns it on where the machine has the instructions.
        lr_scheduler_type: half a cosine to 0 by default; `cosine_with_min_lr` ends at the floor that
            `lr_scheduler_kwargs` must name, `min_lr` or, as a share of the peak, `min_lr_rate`.
        lr_drops: shares of the training, in (0, 1), after which the learning rate falls to a tenth; it replaces
            `lr_scheduler_type` where it is given, and is constant but for that and the warm-up.
        resume: go on in `output_dir` from its last complete checkpoint, exactly as if there had been no break; from
            the beginning where there is none.
        watch_every: steps, or a share of the training below 1, between looks at it (see `Watch`); 0 never looks.
        profile: record a few steps, and write where their time goes (see `ProfileCallback`).
    """

    learning_rate: float | None = field(default=None, metadata={"help": "Wins over base_learning_rate."})
    bf16: bool | str = field(default="auto", metadata={"help": "true, false, or auto: where the machine has it."})
    lr_drops: list[float] | None = field(default=None, metadata={"help": "Shares of the training: a tenth from there."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    watch_every: float = field(default=0.25, metadata={"help": "Steps or a share of the training; 0 is never."})
    profile: bool = field(default=False, metadata={"help": "Write where the time of a few steps goes."})
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

    def __post_init__(self):
        if self.hub_token is not None:
            # It would be saved with the recipe.
            raise ValueError("training.hub_token is refused: log in with `hf auth login`, or set HF_TOKEN")
        check_hub_strategy(self.hub_strategy)
        self.check_optimization()
        if self.bf16 not in (True, False, "auto"):
            raise ValueError(f"training.bf16 must be true, false or auto, not {self.bf16!r}")
        if any(not 0 < share < 1 for share in self.lr_drops or ()):
            raise ValueError(f"training.lr_drops must be shares between 0 and 1, not {self.lr_drops}")
        if not 0 <= self.watch_every < float("inf"):
            raise ValueError(f"training.watch_every must be a number of steps, a share or 0, not {self.watch_every}")
        if self.bf16 == "auto":
            self.bf16 = has_bf16() and not self.fp16
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            raise ValueError(
                "training.lr_scheduler_type=cosine_with_min_lr needs its floor: set "
                "training.lr_scheduler_kwargs.min_lr_rate, a share of the learning rate such as 0.01, or .min_lr"
            )
        # TrainingArguments refuses bf16 without a GPU, unless the CPU was asked for.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if self.learning_rate is None:
            self.learning_rate = self.scaled_learning_rate(self.total_batch_size)

    @property
    def total_batch_size(self) -> int:
        """Images per optimizer step, over all devices and processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


class MIMTrainer(SafeCheckpointMixin, PushMixin, Trainer):
    """A `Trainer` without weight decay for biases, norms, tokens and positions, whose data set is told the epoch, and
    whose order of the images, crops and masks follows from (seed, epoch) alone. It normalises `pixel_values` that come
    as uint8, on the device.

    Args:
        console: where progress is shown; None shows nothing. All other arguments are those of `Trainer`.
    """

    def __init__(self, *args, console: Console | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.sampler = None
        self.add_callback(EpochCallback(self))
        if getattr(self.args, "weight_decay_end", None) is not None:
            self.add_callback(WeightDecayCallback())
        if isinstance(self.train_dataset, StreamedImages):
            self.args.ignore_data_skip = True  # the stream goes to its place itself
            args = self.args
            self.train_dataset.arrange(
                args.train_batch_size, args.process_index, args.world_size, args.dataloader_num_workers
            )
        self.throughput = Throughput(self.args.total_batch_size)
        self.pixels = None
        self.micro_step = (-1, 0)  # optimizer step, and batches seen in it
        if self.target is not None:
            self._bind_before_sharding()
            self.add_callback(TargetCallback(self.target, self.is_fsdp_enabled))
        self.progress = None
        if console is not None and self.is_world_process_zero():
            self.progress = TrainingProgress(console)
            self.add_callback(self.progress)
            if isinstance(self.train_dataset, ImageDataset):
                self.add_callback(DamageCallback(self.train_dataset, console))

    def train(self, *args, **kwargs):
        """Raises:
        ChildProcessError: a worker of the loader was killed.
        """
        if self.args.world_size > 1:
            # Weights were drawn alike everywhere; what is drawn from here on (dropped paths, masks of data sets that
            # bring no generators) must not be.
            torch.manual_seed(seed_of((self.args.seed, self.args.process_index)))
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if not is_lost_worker(error):
                raise
            reason, handler = str(error).strip(), handle_children(signal.SIG_DFL)
        finally:
            if self.progress is not None:
                self.progress.close()
        # Here the loader is gone, with the workers that were left: the error, which held it, is forgotten.
        handle_children(handler)
        raise lost_worker(self, reason)

    def _bind_before_sharding(self) -> None:
        """Raises:
        ValueError: the target follows the student, whose weights it would not see whole.
        """
        if self.has_shares:
            self.target.bind(self.accelerator.unwrap_model(self.model).mim.encoder)
            if self.target.moving_state() and not self.accelerator.is_fsdp2:
                raise ValueError(
                    f"target {self.model.config.target!r} follows the student's whole weights: it works with FSDP2 "
                    "(--fsdp_version 2), DeepSpeed's stages 1 and 2 and without sharding"
                )

    @property
    def target(self):
        """The target of a `MIMForPreTraining`, however it is wrapped; None for other models."""
        return getattr(self.accelerator.unwrap_model(self.model), "target", None)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        images = inputs.get("pixel_values")
        if images is None or images.dtype != torch.uint8:
            return inputs
        config = self.accelerator.unwrap_model(self.model).config
        shape = (*images.shape[:2], *pair(config.image_size)) if "crops" in inputs else images.shape
        if self.pixels is None or (self.pixels.shape, self.pixels.device) != (shape, images.device):
            # Kept for the next step: fresh pages of memory would cost a processor more than the arithmetic.
            self.pixels = torch.empty(shape, device=images.device)
        return normalize_batch(inputs, config, out=self.pixels)

    def get_batch_samples(self, *args, **kwargs):
        try:
            return self.throughput.fetch(partial(super().get_batch_samples, **kwargs), *args)
        except (ConnectionError, EOFError, FileNotFoundError):
            time.sleep(1)  # a killed worker's pipe breaks first; then torch hears of it, and says so from in here
            raise

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= self.throughput.read(self.state.global_step)
        super().log(logs, *args, **kwargs)

    def count_flops(self) -> None:
        """From now on the log says what a pretraining model computes and, where the device's peak is known, uses."""
        device = self.args.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, self.args.bf16)
        self.throughput.flops = flops_per_image(self.model)
        self.throughput.peak = peak and peak * self.args.n_gpu * self.args.world_size

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.target is not None:
            step, batches = self.state.global_step, self.micro_step[1] + 1
            self.micro_step = (step, batches if step == self.micro_step[0] else 0)
            key = (self.args.seed, self.args.process_index, *self.micro_step)
            inputs = {**inputs, "generator": torch.Generator().manual_seed(seed_of(key))}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, StreamedImages):
            return self._stream_loader()
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(outlive_sigterm, inner.worker_init_fn)
        return loader

    def _stream_loader(self):
        """A stream gives each process its own images: accelerate must not divide them again, or hand them out."""
        args = self.args
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=partial(outlive_sigterm, None),
        )
        options = {"put_on_device": True, "non_blocking": self.accelerator.non_blocking, "dispatch_batches": False}
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, **options)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Sized) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = EpochSampler(len(dataset), seed)
        return self.sampler

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.lr_drops and self.lr_scheduler is None:
            warmup = max(1, self.args.get_warmup_steps(num_training_steps))
            drops = [share * num_training_steps for share in self.args.lr_drops]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: min(1, step / warmup) * 0.1 ** sum(step >= drop for drop in drops),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model=None):
        is_new, optimizer = self.optimizer is None, super().create_optimizer(model)
        if is_new and getattr(self.args, "lr_scales", None):
            named = (self.model if model is None else model).named_parameters()
            scale_rates(optimizer, {WRAPPERS.sub("", name): p for name, p in named}, self.args.lr_scales)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        if getattr(args, "optimizer", None) == "lamb":
            return lamb(args)
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model) -> list[str]:
        own = self.accelerator.unwrap_model(self.model)
        if not hasattr(own, "parameters_without_decay"):
            return super().get_decay_parameter_names(model)
        without = own.parameters_without_decay()
        return [name for name, _ in model.named_parameters() if WRAPPERS.sub("", name) not in without]


def seed_of(key: tuple[int, ...]) -> int:
    """One seed for several numbers, without overlap between neighbours."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


class TargetCallback(TrainerCallback):
    """Moves a target that follows the student after each optimizer step."""

    def __init__(self, target, sharded: bool):
        self.target, self.sharded = target, sharded

    def on_train_begin(self, args, state, control, **kwargs):
        # Before they were sharded the weights of all processes but the first may have been empty memory.
        if self.sharded and state.global_step == 0:
            self.target.update(0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.target.update(state.global_step + 1)


class DamageCallback(TrainerCallback):
    """Says of each shard of a stream that turns out to be damaged, once, that it is."""

    def __init__(self, dataset: ImageDataset, console: Console):
        self.dataset, self.console, self.said = dataset, console, set()

    def on_log(self, args, state, control, **kwargs):
        for words in self.dataset.damaged_shards():
            if words not in self.said:
                self.said.add(words)
                self.console.print(f"{words}, the others are left out", style="yellow", soft_wrap=True)

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


class TrainingProgress(TrainerCallback):
    """A bar with step, loss, images per second and the time left; a line now and then where there is no terminal.

    Attributes:
        images_per_second: mean over the run so far, first step (which compiles and warms up) excluded.
    """

    COLUMNS = ("{task.description}", "{task.completed:.0f}/{task.total:.0f}", "loss {task.fields[loss]}")

    def __init__(self, console: Console):
        self.console, self.bar, self.loss, self.images_per_second = console, None, None, 0.0
        self.wait = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.started, self.printed = state.global_step, time.perf_counter(), 0
        if not self.console.is_terminal:
            return
        texts = [TextColumn(text) for text in (*self.COLUMNS, "{task.fields[speed]}")]
        left = (TimeRemainingColumn(compact=True), TextColumn("left"))
        self.bar = Progress(texts[0], BarColumn(), *texts[1:], *left, console=self.console, refresh_per_second=4)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=self.first, loss="-", speed="-")
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss, self.wait = (logs or {}).get("loss", self.loss), (logs or {}).get("data_wait", self.wait)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if state.global_step == self.first + 1:
            self.started = now
            return
        steps, seconds = state.global_step - self.first - 1, now - self.started
        self.images_per_second = steps * args.total_batch_size / max(seconds, 1e-9)
        if self.bar is not None:
            loss = "-" if self.loss is None else f"{self.loss:.4f}"
            self.bar.update(self.task, completed=state.global_step, loss=loss, speed=self._speed())
        elif state.global_step * LINES // state.max_steps > self.printed:
            self.printed = state.global_step * LINES // state.max_steps
            self._print(state, (state.max_steps - state.global_step) * seconds / steps)

    def _print(self, state, left: float):
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        self.console.print(f"{step}{loss}  {self._speed()}  {left // 60:.0f}:{left % 60:02.0f} left", highlight=False)
        sys.stdout.flush()

    def _speed(self) -> str:
        waits = f", {self.wait:.0%} of the time waiting for data" if self.wait > NOTABLE_WAIT else ""
        return f"{self.images_per_second:,.0f} images/s{waits}"

    def close(self):
        """Gives the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
