"""`MIMTrainer`: the Hugging Face Trainer with what masked image modeling wants by default."""

import signal
import time
from collections.abc import Sized
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMForPreTraining, MIMPreTrainedModel
from hf_mim.modeling.options import pair
from hf_mim.modeling.teachers import teachers_of
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.foreign_errors import is_lost_worker
from hf_mim.training.data.base import ImageDataset
from hf_mim.training.data.batches import normalize_batch
from hf_mim.training.data.streaming import StreamedImages
from hf_mim.training.trainer.callbacks import DamagedShardsCallback, EpochCallback, EpochSampler, TargetCallback
from hf_mim.training.trainer.layer_decay import freeze_layers, layer_of_parameters, parameter_groups
from hf_mim.training.trainer.lora import inject_lora
from hf_mim.training.trainer.optimization import (
    WeightDecayCallback,
    divide_for_muon,
    named_optimizer,
    scale_rates,
    unwrapped_name,
)
from hf_mim.training.trainer.progress import TrainingProgress
from hf_mim.training.trainer.saving import CheckpointingTrainer
from hf_mim.training.trainer.start import DISTANCES, Distance, WeightDistance
from hf_mim.training.trainer.stopping import defer_sigterm, end_workers, lost_worker, set_child_handler
from hf_mim.training.trainer.throughput import Throughput, flops_per_image, peak_flops


class MIMTrainer(CheckpointingTrainer):
    """A `Trainer` without weight decay for biases, norms, tokens and positions, whose data set is told the epoch, and
    whose order of the images, crops and masks follows from (seed, epoch) alone. It normalises `pixel_values` that come
    as uint8, on the device.

    Args:
        args: `MIMTrainingArguments`.
        console: where progress is shown; None shows nothing. All other arguments are those of `Trainer`.
        keep: of a pretraining model, what is to stay near its start, `weights` or `features` (see `start.py`).
        keep_weight: of that distance in the loss; None is its default.

    Raises:
        ValueError: what is to be frozen, added or kept does not fit the model, or each other.
    """

    layers: tuple[dict[str, int], int] | None = None  # as of `layer_of_parameters`, where rates differ between them
    distance: Distance | None = None  # to the start, where it is a part of the loss

    def __init__(
        self,
        *args,
        console: RunConsole | None = None,
        keep: str | None = None,
        keep_weight: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.distances: list[Tensor] = []  # since the last log
        self._adapt(keep, keep_weight)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.sampler: EpochSampler | None = None
        self.add_callback(EpochCallback(self))
        if self.args.weight_decay_end is not None:
            self.add_callback(WeightDecayCallback())
        if isinstance(self.train_dataset, StreamedImages):
            self.args.ignore_data_skip = True  # the stream goes to its place itself
            self.train_dataset.arrange(
                self.args.train_batch_size,
                self.args.process_index,
                self.args.world_size,
                self.args.dataloader_num_workers,
            )
        self.throughput = Throughput(self.args.total_batch_size)
        self.pixels: Tensor | None = None
        self.micro_step = (-1, 0)  # optimizer step, and batches seen in it
        if self.target is not None:
            self._bind_before_sharding()
            for teacher in teachers_of(self.target) if self.args.torch_compile else ():
                teacher.compile()
            self.add_callback(TargetCallback(self.target, self.is_fsdp_enabled))
        self.progress: TrainingProgress | None = None
        if console is not None:
            self.warn = console.warn
        if console is not None and self.is_world_process_zero():
            self.progress = TrainingProgress(console)
            self.add_callback(self.progress)
            if isinstance(self.train_dataset, ImageDataset):
                self.add_callback(DamagedShardsCallback(self.train_dataset, console))

    def _adapt(self, keep: str | None, keep_weight: float | None) -> None:
        """Sets up what is frozen, added and kept of a pretraining model."""
        model = self.bare_model
        if not isinstance(model, MIMForPreTraining):
            return
        if (keep or self.args.lora) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            setting = "training.lora" if self.args.lora else "model.keep"
            raise ValueError(f"{setting} needs whole weights in every process: it does not go with FSDP, DeepSpeed")
        if keep == "weights" and self.args.lora:
            raise ValueError(
                "model.keep=weights has no effect with training.lora=true, which leaves the weights as they are: set "
                "model.keep=features, or leave one out"
            )
        if keep is not None:
            self.distance = DISTANCES[keep](model, keep_weight)
        if self.args.freeze_layers:
            freeze_layers(model, model.mim.encoder, self.args.freeze_layers)
        if self.args.lora:
            inject_lora(model, self.args)
        if self.args.layer_decay < 1:
            self.layers = layer_of_parameters(model, model.mim.encoder, "training.layer_decay=1")

    def _bind_before_sharding(self) -> None:
        """Raises:
        ValueError: the target follows the student, whose weights it would not see whole.
        """
        model = self.bare_model
        if self.is_sharded and isinstance(model, MIMForPreTraining):
            model.target.bind(model.mim.encoder)
            if model.target.moving_state() and not self.accelerator.is_fsdp2:
                raise ValueError(
                    f"target {model.config.target!r} follows the student's whole weights: it works with FSDP2 "
                    "(--fsdp_version 2), DeepSpeed's stages 1 and 2 and without sharding"
                )

    def run_record(self) -> dict[str, Any]:
        start = {} if self.distance is None else {"start": self.distance.digest}
        return {**super().run_record(), **start}

    # ---- the run ---------------------------------------------------------------------------------------------------
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
            reason, handler = str(error).strip(), set_child_handler(signal.SIG_DFL)
        finally:
            if self.progress is not None:
                self.progress.close()
            end_workers(self.callback_handler.train_dataloader)
        # Here the loader is gone, with the workers that were left: the error, which held it, is forgotten.
        set_child_handler(handler)
        raise lost_worker(self, reason)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step, in the middle of an epoch: `Trainer` would take one more and save it.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        if self.target is not None:
            step, batches = self.state.global_step, self.micro_step[1] + 1
            self.micro_step = (step, batches if step == self.micro_step[0] else 0)
            key = (self.args.seed, self.args.process_index, *self.micro_step)
            inputs = {**inputs, "generator": torch.Generator().manual_seed(seed_of(key))}
        if self.distance is not None and model.training:
            return self._loss_with_distance(model, inputs, self.distance)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss_with_distance(self, model: nn.Module, inputs: dict[str, Any], distance: Distance) -> Tensor:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        bare = cast(MIMForPreTraining, self.bare_model)
        kept = distance.weight * distance(bare, inputs["pixel_values"], outputs.bool_masked_pos)
        self.distances.append(kept.detach())
        return loss + kept

    # ---- speed -----------------------------------------------------------------------------------------------------
    def get_batch_samples(self, *args, **kwargs):
        try:
            return self.throughput.fetch(partial(super().get_batch_samples, **kwargs), *args)
        except (ConnectionError, EOFError, FileNotFoundError):
            time.sleep(1)  # a killed worker's pipe breaks first; then torch's handler raises its own error in here
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.throughput.read(self.state.global_step)
            if self.distances:  # in every process, as for the loss
                logs["keep_loss"] = self.accelerator.reduce(torch.stack(self.distances).mean(), "mean").item()
                self.distances.clear()
        super().log(logs, start_time)

    def count_flops(self) -> None:
        """From now on the log says what a pretraining model computes and, where the device's peak is known, uses."""
        device, model = self.args.device, self.bare_model
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, bool(self.args.bf16))
        self.throughput.flops = flops_per_image(model) if isinstance(model, MIMForPreTraining) else None
        self.throughput.peak = peak and peak * self.args.n_gpu * self.args.world_size

    # ---- data ------------------------------------------------------------------------------------------------------
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        images = inputs.get("pixel_values")
        if images is None or images.dtype != torch.uint8:
            return inputs
        config = cast(MIMConfig, self.bare_model.config)
        shape = (*images.shape[:2], *pair(config.image_size)) if "crops" in inputs else images.shape
        if self.pixels is None or (self.pixels.shape, self.pixels.device) != (shape, images.device):
            # Kept for the next step: fresh pages of memory would cost a processor more than the arithmetic.
            self.pixels = torch.empty(shape, device=images.device)
        return normalize_batch(inputs, config, out=self.pixels)

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, StreamedImages):
            return self._stream_loader(self.train_dataset)
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # of accelerate's wrapper
        inner.worker_init_fn = partial(defer_sigterm, inner.worker_init_fn)
        return loader

    def _stream_loader(self, stream: StreamedImages) -> DataLoader:
        """A stream gives each process its own images: accelerate must not divide them again, or hand them out."""
        args = self.args
        loader: DataLoader = DataLoader(
            stream,
            args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=partial(defer_sigterm, None),
        )
        options = {"put_on_device": True, "non_blocking": self.accelerator.non_blocking, "dispatch_batches": False}
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, **options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Sized) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = EpochSampler(len(dataset), seed)
        return self.sampler

    # ---- optimizer -------------------------------------------------------------------------------------------------
    def create_scheduler(self, num_training_steps: int, optimizer=None):
        optimizer = self.optimizer if optimizer is None else optimizer
        if self.args.lr_drops and self.lr_scheduler is None:
            warmup = max(1, self.args.get_warmup_steps(num_training_steps))
            drops = [share * num_training_steps for share in self.args.lr_drops]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1, step / warmup) * 0.1 ** sum(step >= drop for drop in drops)
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        if self.optimizer is None:
            if self.layers is None:
                super().create_optimizer(model)
            else:
                kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
                self.optimizer = kind(self._layered_groups(model, self.layers, self.args.layer_decay), **settings)
            if self.args.optimizer == "muon":
                if self.is_deepspeed_enabled or self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
                    raise ValueError("training.optimizer=muon needs whole matrices: FSDP1 and DeepSpeed flatten them")
                divide_for_muon(self.optimizer, self.bare_model, self.args.muon_scale)
            self._scale_rates(self.optimizer, model)
        return self.optimizer

    def _layered_groups(self, model: nn.Module, layers: tuple[dict[str, int], int], decay: float) -> list[dict]:
        """The groups of an optimizer, with layer-wise rates; `layers` as of `layer_of_parameters`."""
        decayed = set(self.get_decay_parameter_names(model))
        weights = {name: self.args.weight_decay * (name in decayed) for name, _ in model.named_parameters()}
        return parameter_groups(model, *layers, decay, cast(float, self.args.learning_rate), weights)

    def _scale_rates(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        parameters = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
        scale_rates(optimizer, parameters, self.args.lr_scales or {})

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return named_optimizer(args) if args.optimizer else Trainer.get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        bare = self.bare_model
        if not isinstance(bare, MIMPreTrainedModel):
            return super().get_decay_parameter_names(model)
        without = bare.parameters_without_decay()
        if isinstance(self.distance, WeightDistance):  # takes the place of decay
            without = without | {f"mim.encoder.{name}" for name in self.distance.start}
        return [name for name, _ in model.named_parameters() if unwrapped_name(name) not in without]


def seed_of(key: tuple[int, ...]) -> int:
    """One seed for several numbers, without overlap between neighbours."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
