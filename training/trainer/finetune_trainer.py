"""`FinetuneTrainer`: layer-wise rates, a frozen encoder, a moving average of the weights, the best checkpoint."""

from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import timm.optim
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from hf_mim.modeling.encoder_base import Encoder
from hf_mim.modeling.modeling_mim import MIMPreTrainedModel
from hf_mim.training.common.console import RunConsole
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments
from hf_mim.training.trainer.layer_decay import layer_of_parameters
from hf_mim.training.trainer.optimization import unwrapped_name
from hf_mim.training.trainer.trainer import MIMTrainer


AVERAGED = "ema.safetensors"  # beside the Trainer's own files in a checkpoint


class FinetuneTrainer(MIMTrainer):
    """What fine-tuning wants of a `MIMTrainer`, whatever the head.

    Args:
        options: see `FinetuneArguments`.
        encoder: the one inside the model. All other arguments are those of `MIMTrainer`.

    Raises:
        ValueError: `options.ema` where weights are sharded, or the encoder's layers cannot be told apart.
    """

    def __init__(
        self, *args, options: FinetuneArguments, encoder: Encoder, console: RunConsole | None = None, **kwargs
    ):
        super().__init__(*args, console=console, **kwargs)
        self.options, self.encoder = options, encoder
        self.average: AveragedModel | None = None
        self.layers = layer_of_parameters(self.bare_model, encoder) if options.layer_decay < 1 else None
        if options.freeze:
            encoder.freeze()
        if options.ema:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "finetune.ema needs whole weights in every process: it does not go with FSDP, DeepSpeed"
                )
            self.average = AveragedModel(
                self.bare_model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True
            )
            self.average.update_parameters(self.bare_model)  # the first copies: the average starts from these weights
        self.add_callback(FinetuneCallback(self, console if self.is_world_process_zero() else None))

    # ---- rates -----------------------------------------------------------------------------------------------------
    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        if self.optimizer is None:
            names = [unwrapped_name(name) for name, _ in model.named_parameters()]
            groups = self._layered_groups(model, self.layers or (dict.fromkeys(names, 0), 0), self.options.layer_decay)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if self.options.optimizer == "lamb":
                kind = timm.optim.Lamb
                settings = {"lr": self.args.learning_rate, "betas": (self.args.adam_beta1, self.args.adam_beta2)}
            self.optimizer = kind(groups, **settings)
            self._scale_rates(self.optimizer, model)
        return self.optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        without = MIMPreTrainedModel.parameters_without_decay(model)  # by names and shapes: of any model
        return [name for name, _ in model.named_parameters() if name not in without]

    def predict_arrays(self, dataset) -> tuple[np.ndarray, np.ndarray]:
        """As of `predict`, for a model with one output: what it predicts, and the labels."""
        output = self.predict(dataset)
        return cast(np.ndarray, output.predictions), cast(np.ndarray, output.label_ids)

    # ---- the moving average ----------------------------------------------------------------------------------------
    def evaluation_loop(self, *args, **kwargs):
        with self.averaged():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def averaged(self):
        """Inside, the model has the averaged weights, if there is an average."""
        if self.average is None:
            yield
            return
        weights = [tensor.detach().clone() for tensor in tensors(self.model)]
        copy(tensors(self.average.module), tensors(self.model))
        try:
            yield
        finally:
            copy(weights, tensors(self.model))

    def _save_extra_state(self, folder: Path) -> None:
        super()._save_extra_state(folder)
        if self.average is not None:
            state = {name: value.contiguous() for name, value in self.average.module.state_dict().items()}
            save_file(state, folder / AVERAGED)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None and (Path(resume_from_checkpoint) / AVERAGED).is_file():
            self.average.module.load_state_dict(load_file(Path(resume_from_checkpoint) / AVERAGED))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if self.average is not None and best is not None and (Path(best) / AVERAGED).is_file():
            self.average.module.load_state_dict(load_file(Path(best) / AVERAGED))


def tensors(model) -> list[torch.Tensor]:
    """All that the average has: parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


class FinetuneCallback(TrainerCallback):
    """Moves the average after each optimizer step, and logs the results of every evaluation."""

    def __init__(self, trainer: FinetuneTrainer, console: RunConsole | None):
        self.trainer, self.console = trainer, console

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint was written beside its place, and so names itself wrongly as the best; folders are moved, too.
        if state.best_model_checkpoint is not None:
            best = Path(args.output_dir) / Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def on_epoch_end(self, args, state, control, **kwargs):
        # Stopped in the middle of an epoch: what an evaluation finds here would be no candidate for the best in a run
        # without a break, and the checkpoint is written already.
        if state.global_step < state.max_steps and abs(state.epoch - round(state.epoch)) > 1e-6:
            control.should_evaluate = control.should_save = False

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.model)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.console is None or not metrics:
            return
        results = [f"loss {metrics['eval_loss']:.4f}"] if "eval_loss" in metrics else []
        name = args.metric_for_best_model
        if name and f"eval_{name}" in metrics:
            results.append(f"{name.replace('_', ' ')} {metrics[f'eval_{name}']:.2f}")
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        self.console.log(f"{step}, validation: {', '.join(results)}")
