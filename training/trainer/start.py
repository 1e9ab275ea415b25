"""The distance of an encoder to where its run started, as a part of the loss: what holds the start, forgets less."""

import copy
import hashlib
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mim.modeling.encoder_base import is_mask_parameter
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import unknown_choice
from hf_mim.modeling.outputs import MIMModelOutput
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.trainer.arguments import MIMTrainingArguments


class Distance:
    """How far a model's encoder is from its start.

    Args:
        model: as it starts.
        weight: of the distance in the loss; None is its default.
    """

    default_weight: float

    def __init__(self, model: MIMForPreTraining, weight: float | None = None):
        self.weight = self.default_weight if weight is None else weight

    def __call__(self, model: MIMForPreTraining, pixel_values: Tensor, masks: Tensor) -> Tensor:
        """The distance, not weighted, after a forward pass of the model that records gradients.

        Args:
            pixel_values: (batch, channels, height, width), normalised: what the model has seen.
            masks: bool (batch * masks of an image, tokens), those of that pass.
        """
        raise NotImplementedError

    def start_weights(self) -> dict[str, Tensor]:
        """Of the encoder, by name."""
        raise NotImplementedError

    @cached_property
    def digest(self) -> str:
        """What tells this start from others, for the manifests of checkpoints."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.start_weights().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class WeightDistance(Distance):
    """Half the squared distance of the encoder's weights to their start (L2-SP, 1802.01483, equation 2), without the
    mask token. In that paper it takes the place of weight decay, which would draw the weights to zero.
    """

    default_weight = 0.01

    def __init__(self, model: MIMForPreTraining, weight: float | None = None):
        super().__init__(model, weight)
        weights = model.mim.encoder.named_parameters()
        self.start = {name: value.detach().clone() for name, value in weights if not is_mask_parameter(name)}

    def __call__(self, model: MIMForPreTraining, pixel_values: Tensor, masks: Tensor) -> Tensor:
        weights = dict(model.mim.encoder.named_parameters())
        terms = [(weights[name] - start.to(weights[name])).square().sum() for name, start in self.start.items()]
        return torch.stack(terms).sum() / 2

    def start_weights(self) -> dict[str, Tensor]:
        return self.start


class FeatureDistance(Distance):
    """Distillation to the frozen start: the mean squared difference between the tokens that leave the encoder and those
    that leave the encoder as it was, of the same images with the same patches hidden; each token standardised, so that
    scales do not count. 0 at the start, 2 between unrelated tokens.
    """

    default_weight = 1.0

    def __init__(self, model: MIMForPreTraining, weight: float | None = None):
        super().__init__(model, weight)
        self.start = copy.deepcopy(model.mim).eval().requires_grad_(False)
        self.tokens: Tensor | None = None  # of the pass with gradients that has just been
        model.mim.register_forward_hook(self._record)

    def _record(self, module: nn.Module, inputs, output: MIMModelOutput) -> None:
        self.tokens = output.last_hidden_state if torch.is_grad_enabled() else None

    def __call__(self, model: MIMForPreTraining, pixel_values: Tensor, masks: Tensor) -> Tensor:
        pixel_values = pixel_values.repeat_interleave(len(masks) // len(pixel_values), dim=0)
        with torch.no_grad():
            start = self.start.to(pixel_values.device)
            before = start(pixel_values, masks if model.hides_tokens else None).last_hidden_state
        assert self.tokens is not None
        before, now = (F.layer_norm(tokens.float(), tokens.shape[-1:]) for tokens in (before, self.tokens))
        self.tokens = None
        return (now - before).square().mean()

    def start_weights(self) -> dict[str, Tensor]:
        return dict(self.start.encoder.named_parameters())


DISTANCES: dict[str, type[Distance]] = {"weights": WeightDistance, "features": FeatureDistance}


def check_start(section: dict, arguments: MIMTrainingArguments) -> None:
    """Checks what a recipe says of its start.

    Args:
        section: `model`, of a pretraining.

    Raises:
        ValueError: something is unknown or out of range, or is to be kept of a start that there is not.
    """
    keep, weight = section.get("keep"), section.get("keep_weight")
    if keep is not None and keep not in DISTANCES:
        raise unknown_choice("model.keep", keep, DISTANCES)
    if weight is not None and not 0 < weight < float("inf"):
        raise RecipeError(f"model.keep_weight must be more than 0, not {weight}", "model.keep_weight")
    if "init_from" in section and section["init_from"] is None:
        raise RecipeError("this recipe starts from an encoder: set model.init_from=CHECKPOINT", "model.init_from")
    kept = {"model.keep": keep, "training.lora": arguments.lora, "training.freeze_layers": arguments.freeze_layers}
    setting = next((key for key, value in kept.items() if value), None)
    if setting is not None and section.get("init_from") is None:
        raise RecipeError(f"{setting} keeps weights, which are still random: set model.init_from=CHECKPOINT", setting)


def describe_keeping(section: dict, arguments: MIMTrainingArguments) -> dict[str, str]:
    """{"keeping": what a run does so that its encoder does not forget}, for people; {} where it does nothing. Arguments
    as of `check_start`."""
    parts = []
    if arguments.freeze_layers:
        parts.append(f"embedding and first {arguments.freeze_layers} blocks frozen")
    if arguments.lora:
        parts.append(f"LoRA of rank {arguments.lora_rank}")
    if arguments.layer_decay < 1:
        parts.append(f"layer decay {arguments.layer_decay:g}")
    if (keep := section.get("keep")) is not None:
        weight = section.get("keep_weight") or DISTANCES[keep].default_weight
        parts.append(f"near the start's {keep}, with weight {weight:g}")
    return {"keeping": ", ".join(parts)} if parts else {}
