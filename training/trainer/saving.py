"""Checkpoints that are whole or not there."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints

from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.target_base import Target
from hf_mim.training.common.foreign_errors import is_torch_write_error
from hf_mim.training.common.resources import ResourceError, explain_shortage
from hf_mim.training.data.fingerprint import fingerprint
from hf_mim.training.data.streaming import StreamedImages
from hf_mim.training.trainer.lora import lora_layers, plain_state
from hf_mim.training.trainer.manifest import find_damage, flatten, versions, write_manifest
from hf_mim.training.trainer.pushing import PushingTrainer


UNFINISHED = "unfinished"  # the folder in a run's folder that checkpoints are written into before they get their name
MOVING_STATE = "moving_target.safetensors"  # beside the Trainer's own files in a checkpoint
STREAM_STATE = "stream.json"
LORA_STATE = "lora.safetensors"  # the model with its additions apart; the checkpoint's own weights have them in them


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step in a run's folder; None without one. Unfinished ones do not count."""
    checkpoints = {}
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        # Written by others than MIMTrainer it may be half there; the Trainer's state is what comes last.
        if step and (path / "trainer_state.json").is_file():
            checkpoints[int(step[1])] = path
    return checkpoints[max(checkpoints)] if checkpoints else None


class CheckpointingTrainer(PushingTrainer):
    """Writes a checkpoint beside its place, renames it when it is complete, and only then removes older ones. A run
    goes on from it exactly, moving targets and streams included."""

    _staging: Path | None = None  # where a checkpoint is being written
    _to_push: str | None = None  # the checkpoint to push when it has its name
    recipe: dict[str, Any] | None = None  # of the run, for the manifests
    data_digest: str = ""  # of the names and sizes of its data's files, for them too
    warn: Callable[[str], None] = staticmethod(print)  # prints a line

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without the wrappers of accelerate and torch."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def target(self) -> Target | None:
        """The target of a `MIMForPreTraining`; None for other models."""
        model = self.bare_model
        return model.target if isinstance(model, MIMForPreTraining) else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Raises:
        ValueError: the loss is not finite; every process sees the same, since it is their mean.
        """
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise not_finite(self, "the loss is")

    def _get_output_dir(self, trial) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        """Raises:
        OSError: it could not be written, perhaps because the disk is full; the older checkpoints are all there.
        ValueError: the weights are not finite, and would replace a good checkpoint.
        """
        folder, name = self.folder, f"checkpoint-{self.state.global_step}"
        self._check_finite(folder)
        if isinstance(self.train_dataset, StreamedImages):
            self.train_dataset.gather(self.args.device)
        self._staging, self._to_push = folder / UNFINISHED, None
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)  # what a killed process left
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._save_extra_state(self._staging / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(self._staging / name, self.run_record())
                publish(self._staging / name, folder / name)
        except Exception as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            if not failed_to_write(error):
                raise
            raise cannot_save(folder, name, error) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self._to_push is not None:
            self._push_from_checkpoint(str(folder / name))
        best = self.state.best_model_checkpoint
        if best is not None:  # in every process: it was looked for where the new one was being written
            best = self.state.best_model_checkpoint = str(folder / Path(best).name)
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, best)

    def run_record(self) -> dict[str, Any]:
        """What a manifest says of the run; see `manifest.MEANINGS`."""
        return {
            "data": {**self._fingerprint, "files": self.data_digest},
            "total_batch": self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            "processes": self.args.world_size,
            "versions": versions(),
            **({} if self.recipe is None else {"recipe": flatten(self.recipe)}),
        }

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.train_dataset)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a shard of the weights: only all of them together can run the model."""
        return self.is_fsdp_enabled or (self.is_deepspeed_enabled and is_deepspeed_zero3_enabled())

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes its shard of a checkpoint (FSDP with SHARDED_STATE_DICT)."""
        return self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole, also where checkpoints are written in shards: `Trainer` would write nothing then."""
        model = self.bare_model
        if isinstance(model, torch.distributed.fsdp.FSDPModule):
            # FSDP2 made a class of its own of the model's, and torch's files would be saved as the model's code.
            type(model).__module__ = type(model).__bases__[-1].__module__
        if self.saves_shards and not _internal_call:
            state = self.accelerator.get_state_dict(self.model)  # in every process; it is there in the first
            self._save(output_dir, state_dict=state)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """A pretraining model with additions is saved as the plain model that it stands for."""
        super()._save(output_dir, plain_state(self.bare_model) if self.has_additions else state_dict)

    @property
    def has_additions(self) -> bool:
        """Whether it is a pretraining model with LoRA, which is not merged yet."""
        model = self.bare_model
        return isinstance(model, MIMForPreTraining) and bool(lora_layers(model))

    def _check_finite(self, folder: Path) -> None:
        """A device is waited for here, which is why it is done once per checkpoint and not at every step."""
        bad = next((n for n, p in self.bare_model.named_parameters() if not torch.isfinite(p.detach()).all()), None)
        if bad is not None:
            raise not_finite(self, f"the weights ({bad}) are")

    def _save_extra_state(self, folder: Path) -> None:
        moving = {} if self.target is None else self.target.moving_state()
        if self.saves_shards:  # what the merged weights will need beside them
            self.bare_model.config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        if self.has_additions:
            save_file(self.bare_model.state_dict(), folder / LORA_STATE)
        if moving:
            save_file({name: value.contiguous() for name, value in moving.items()}, folder / MOVING_STATE)
        if isinstance(self.train_dataset, StreamedImages):
            (folder / STREAM_STATE).write_text(json.dumps(self.train_dataset.position(self._images_seen())))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:  # an upload in the background would find it renamed
            self._to_push = checkpoint_folder
            return
        super()._push_from_checkpoint(checkpoint_folder)

    def _images_seen(self) -> int:
        """By all processes, since this call of `train` began."""
        return (self.state.global_step - self._initial_global_step) * self.args.total_batch_size

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.has_additions:
            self.bare_model.load_state_dict(load_file(folder / LORA_STATE))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_renamed(folder)
        if self.target is not None and (folder / MOVING_STATE).is_file():
            self.target.load_moving_state(load_file(folder / MOVING_STATE))
        if (folder / STREAM_STATE).is_file() and isinstance(self.train_dataset, StreamedImages):
            self.train_dataset.seek(json.loads((folder / STREAM_STATE).read_text()))

    # transformers saves the weights of some models (Swin) under older names. `from_pretrained` knows them, but Trainer
    # does not: it leaves what it does not find in the file as it is, with a warning.
    _renamed = False

    def _issue_warnings_after_load(self, load_result) -> None:
        self._renamed = bool(load_result.missing_keys and load_result.unexpected_keys)
        if not self._renamed:
            super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        """Of a best checkpoint that was damaged meanwhile nothing is loaded: the last weights stay, which is said."""
        best = Path(self.state.best_model_checkpoint or self.folder)
        if self.state.best_model_checkpoint is not None and (damage := find_damage(best)) is not None:
            self.warn(f"warning: {best}, the best checkpoint, cannot be used: {damage}; the last weights are kept")
            self.state.best_model_checkpoint = None
            return
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_renamed(best)

    def _load_renamed(self, folder: Path) -> None:
        if self._renamed:
            self._renamed = False
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.load_state_dict(type(model).from_pretrained(folder, config=model.config).state_dict())

    # A stream finds its place itself, without decoding what it skips; Trainer would fetch every batch again. But
    # Trainer then restores the random state before it opens the loader, which draws a number: it must do so after.
    _rng_checkpoint: str | None = None

    def _load_rng_state(self, checkpoint) -> None:
        if isinstance(self.train_dataset, StreamedImages):
            self._rng_checkpoint = checkpoint
        else:
            super()._load_rng_state(checkpoint)

    def get_batch_samples(self, *args, **kwargs):
        samples = super().get_batch_samples(*args, **kwargs)
        if self._rng_checkpoint is not None:
            super()._load_rng_state(self._rng_checkpoint)
            self._rng_checkpoint = None
        return samples


def publish(source: Path, target: Path) -> None:
    """Gives a complete folder its name; one of that name, of the same step, makes room first."""
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave empty files under the final name
    if target.exists():
        target.rename(source.parent / "replaced")
    source.rename(target)
    shutil.rmtree(source.parent, ignore_errors=True)


def failed_to_write(error: Exception) -> bool:
    """Whether it comes from the disk: torch and safetensors have errors of their own for that."""
    return isinstance(error, OSError | SafetensorError) or is_torch_write_error(error)


def cannot_save(folder: Path, name: str, error: Exception) -> OSError:
    """The error that ends a run, with what is left."""
    reason = explain_shortage(error, [folder]) or str(error).partition("\n")[0] or type(error).__name__
    last = last_checkpoint(folder)
    left = f"the last complete one is {last}" if last else "there is no older one"
    return ResourceError(f"cannot save {folder / name}: {reason}; {left}")


def not_finite(trainer: CheckpointingTrainer, what: str) -> ValueError:
    """The error that ends a run, with what is needed to go on."""
    state, last = trainer.state, last_checkpoint(trainer.folder)
    rates = [entry["learning_rate"] for entry in state.log_history if "learning_rate" in entry]
    rate = f" at learning rate {rates[-1]:.3g}" if rates else ""
    advice = "lower training.base_learning_rate, lengthen training.warmup_steps or set training.bf16=false"
    start = f"the last good checkpoint is {last}: start from it with model.init_from={last}, and " if last else ""
    return ValueError(f"{what} not finite at step {state.global_step}{rate}; {start}{advice}")
