"""Optimizers, and rates and decays that follow the batch or the step, as the released code of the methods has them."""

import math
import re
from dataclasses import dataclass, field

from timm.optim import Lamb, Muon
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_mim.modeling.decoder_base import Decoder
from hf_mim.modeling.encoder_base import Encoder
from hf_mim.modeling.options import unknown_choice


# What wrappers put before a parameter's name.
WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OPTIMIZERS = ("lamb", "muon")
SCALINGS = {"linear": lambda share: share, "sqrt": math.sqrt}


@dataclass
class OptimizationArguments(TrainingArguments):
    """Of `MIMTrainingArguments`.

    Args:
        base_learning_rate: for a total batch of `base_batch_size`.
        base_batch_size: images.
        lr_scaling: how the learning rate follows the total batch, which is that of one device times devices,
            processes and accumulation steps: linear, or sqrt (DTM).
        optimizer: lamb (timm's, without its own clipping: `max_grad_norm` clips); muon (timm's) for the matrices of
            blocks, with AdamW's size of steps, and AdamW for the rest, both with Nesterov momentum; or None for that of
            `optim`.
        muon_scale: factor of the learning rate for what Muon steps.
        lr_scales: factors of the learning rate by the last name of a parameter, such as {"mask_token": 0.1} (A2MIM).
        weight_decay_end: where `weight_decay` moves to along half a cosine over the whole training (SparK); None: it
            stays.
    """

    base_learning_rate: float = field(
        default=1.5e-4, metadata={"help": "Learning rate for a batch of base_batch_size."}
    )
    base_batch_size: int = field(default=256, metadata={"help": "Images that base_learning_rate is for."})
    lr_scaling: str = field(default="linear", metadata={"help": "How the rate follows the batch: linear or sqrt."})
    optimizer: str | None = field(default=None, metadata={"help": "lamb, muon, or None for that of optim."})
    muon_scale: float = field(default=1.0, metadata={"help": "Factor of the learning rate for what Muon steps."})
    lr_scales: dict | None = field(default=None, metadata={"help": "Factors of the learning rate by parameter name."})
    weight_decay_end: float | None = field(default=None, metadata={"help": "What weight_decay moves to."})

    def check_optimization(self) -> None:
        """Raises:
        ValueError: a name is unknown, or values do not fit together.
        """
        if self.lr_scaling not in SCALINGS:
            raise unknown_choice("training.lr_scaling", self.lr_scaling, SCALINGS)
        if self.base_batch_size < 1:
            raise ValueError(f"training.base_batch_size must be at least 1, not {self.base_batch_size}")
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise unknown_choice("training.optimizer", self.optimizer, OPTIMIZERS)
        if not 0 < self.muon_scale < math.inf:
            raise ValueError(f"training.muon_scale must be above 0, not {self.muon_scale}")
        for name, scale in (self.lr_scales or {}).items():
            if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
                raise ValueError(f"training.lr_scales.{name} must be a number of at least 0, not {scale!r}")
        if self.weight_decay_end is not None and not (self.weight_decay > 0 and self.weight_decay_end >= 0):
            raise ValueError(
                "training.weight_decay_end, at least 0, needs a weight_decay above 0 to start from: "
                f"got {self.weight_decay_end} and {self.weight_decay}"
            )

    def scaled_learning_rate(self, batch_size: int) -> float:
        """For this many images per optimizer step."""
        return self.base_learning_rate * SCALINGS[self.lr_scaling](batch_size / self.base_batch_size)


def unwrapped_name(name: str) -> str:
    """What a parameter of a wrapped model is called in the model itself."""
    return WRAPPERS.sub("", name)


def named_optimizer(args: OptimizationArguments) -> tuple[type, dict]:
    """-> the class and settings of `args.optimizer`."""
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    if args.optimizer == "lamb":
        return Lamb, {**settings, "max_grad_norm": None}
    return Muon, {**settings, "nesterov": True}


def divide_for_muon(optimizer: Muon, model: nn.Module, scale: float) -> None:
    """Has Muon step the matrices of the blocks of encoder and decoder only, at `scale` times the learning rate. AdamW
    takes vectors, and embeddings and heads, whose inputs or outputs are not features."""
    encoders = (module for module in model.modules() if isinstance(module, Encoder))
    decoders = (module for module in model.modules() if isinstance(module, Decoder))
    blocks = [module for encoder in encoders for block in encoder.blocks() for module in block]
    lists = (getattr(decoder, "layers", None) for decoder in decoders)
    blocks += [layers for layers in lists if isinstance(layers, nn.ModuleList)]
    weights = (p for block in blocks for p in block.parameters() if p.ndim > 1)
    matrices = {id(p) for p in weights if min(p.shape[:2]) > 1}  # not the vectors and depthwise kernels of ConvNets
    for group in list(optimizer.param_groups):
        rest = [p for p in group["params"] if id(p) not in matrices]
        group["params"] = [p for p in group["params"] if id(p) in matrices]
        if rest:
            optimizer.add_param_group({**group, "params": rest, "use_fallback": True})
        group["lr"] *= scale
    # Of a group without parameters, sharded checkpoints keep nothing. The rate of the first group is logged: AdamW's.
    groups = [group for group in optimizer.param_groups if group["params"]]
    optimizer.param_groups[:] = sorted(groups, key=lambda group: not group.get("use_fallback"))


def scale_rates(optimizer, parameters: dict, scales: dict[str, float]) -> None:
    """Gives the parameters that `scales` names groups of their own, with that share of the learning rate.

    Args:
        parameters: by name.

    Raises:
        ValueError: no parameter has one of the names.
    """
    for last, scale in scales.items():
        chosen = {id(p) for name, p in parameters.items() if name.rsplit(".", 1)[-1] == last}
        if not chosen:
            raise ValueError(f"training.lr_scales names {last!r}, and no parameter of the model ends in that name")
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in chosen]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * scale})


class WeightDecayCallback(TrainerCallback):
    """Moves the weight decay of what has any from `args.weight_decay` to `args.weight_decay_end`."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        share = state.global_step / max(1, state.max_steps)
        start, end = args.weight_decay, args.weight_decay_end
        decay = end + (start - end) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            if group["weight_decay"] > 0:
                group["weight_decay"] = decay
