"""The student's own moving average as teacher (data2vec 2.0, 2212.07525)."""

import copy
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid, choose
from .mlp import MLP
from .target_teacher import FEATURE_DISTANCES, FeatureTarget, normalise_features


class MovingAverageTarget(FeatureTarget):
    """The mean over the last blocks of a moving average of the student, on the unmasked image; each block's MLP outputs
    normalised per channel over the tokens, their mean normalised per token (data2vec 2.0, 2212.07525).

    Options:
        top_k_blocks: how many of the last blocks (fewer where there are fewer).
        decay, end_decay, decay_steps: the average keeps `decay` of itself per optimizer step, moving linearly to
            `end_decay` over `decay_steps` steps. data2vec's 0.9998, 0.99999 and 100,000 are for long runs; short ones
            need less.
        loss: mse, l1, smooth_l1 (beta 2) or cosine.
        reduction: sum: the loss of a token, and of an image's class token, is the sum over channels divided by the
            root of their number, as released (27.7 times the mean for 768); mean: the mean over channels. It matters
            beside `max_grad_norm` only.
        global_weight: of the squared error between a prediction from the class token and the mean target, averaged over
            images. data2vec 2.0 sums over a GPU's 16 images with 16 masks each, with 0.01: here 2.56.
        global_head: none: the class token itself is the prediction, as released; mlp: two layers make one of it.
    """

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        top_k_blocks: int = 10,
        decay: float = 0.9998,
        end_decay: float = 0.99999,
        decay_steps: int = 100_000,
        loss: str = "mse",
        reduction: str = "sum",
        global_weight: float = 0.0,
        global_head: str = "none",
    ):
        super().__init__()
        num_blocks = len(mlps_of(encoder))
        if not num_blocks:
            raise ValueError("target 'moving_average' reads the blocks of encoder 'vit'; choose that encoder")
        for name, value in (("decay", decay), ("end_decay", end_decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        self.top_k_blocks = min(top_k_blocks, num_blocks)
        self.decay, self.end_decay, self.decay_steps = decay, end_decay, decay_steps
        self.distance = FEATURE_DISTANCES[choose("loss of target 'moving_average'", loss, FEATURE_DISTANCES)]
        self.loss_scale = encoder.hidden_size**0.5 if choose("reduction", reduction, ("sum", "mean")) == "sum" else 1.0
        self.global_weight = global_weight
        self.global_head = choose("global_head", global_head, ("none", "mlp"))
        self.block_dims = [encoder.hidden_size]
        self.outputs = {"patches": encoder.hidden_size} | ({"global": encoder.hidden_size} if global_weight else {})
        self.average = UnregisteredModules()

    def global_loss(self, predictions, targets) -> Tensor | float:
        if not self.global_weight:
            return 0.0
        error = predictions["global"].float() - targets["global"].float()
        return self.global_weight * self.loss_scale * error.square().mean()

    def token_losses(self, predicted: Tensor, target: Tensor) -> Tensor:
        return self.loss_scale * super().token_losses(predicted, target)

    def bind(self, encoder: Encoder) -> None:
        """Starts from the student's present weights, at the first call.

        Raises:
            ValueError: the weights are sharded by now, and cannot be copied; after the first call they may be.
        """
        self.average.student = encoder
        if self.average.teacher is None:
            if any(is_sharded(parameter) for parameter in encoder.parameters()):
                raise ValueError(
                    "target 'moving_average' copies whole weights: call target.bind(encoder) before they are sharded"
                )
            self.average.teacher = copy.deepcopy(encoder).eval().requires_grad_(False)
            if self.average.waiting:
                self.load_moving_state(self.average.waiting)

    def decay_at(self, step: int) -> float:
        share = min(1.0, step / max(1, self.decay_steps))
        return self.decay + (self.end_decay - self.decay) * share

    @torch.no_grad()
    def update(self, step: int) -> None:
        """teacher = decay * teacher + (1 - decay) * student, parameter by parameter; buffers are copied. Step 0 begins
        with the student. Weights sharded by FSDP2 are gathered one by one: every process must call this."""
        teacher, student = self.average.teacher, self.average.student
        if teacher is None or student is None:
            return
        share = 1 - self.decay_at(step) if step > 0 else 1.0
        kept: list[Tensor] = list(teacher.parameters())
        new: list[Tensor] = list(student.parameters())
        if any(map(is_sharded, new)):
            for old, parameter in zip(kept, new, strict=True):
                old.lerp_(whole(parameter).to(old), share)
        else:
            torch._foreach_lerp_(kept, [parameter.to(old) for old, parameter in zip(kept, new, strict=True)], share)
        for old_buffer, buffer in zip(teacher.buffers(), student.buffers()):
            old_buffer.copy_(buffer)

    def moving_state(self) -> dict[str, Tensor]:
        return {} if self.average.teacher is None else self.average.teacher.state_dict()

    def load_moving_state(self, state: dict[str, Tensor]) -> None:
        if self.average.teacher is None:
            self.average.waiting = state  # until the student is bound
        else:
            self.average.teacher.load_state_dict(state)
            self.average.waiting = None

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        teacher = self.average.teacher
        outputs: list[Tensor] = []
        if teacher is None:
            raise ValueError("target 'moving_average' follows a student: call bind(encoder) first")
        if next(teacher.parameters()).device != pixel_values.device:  # bound before the student was moved
            teacher.to(pixel_values.device)
        blocks = mlps_of(teacher)[-self.top_k_blocks :]
        hooks = [block.register_forward_hook(lambda m, i, out: outputs.append(out)) for block in blocks]
        try:
            teacher(pixel_values.to(next(teacher.parameters()).dtype))
        finally:
            for hook in hooks:
                hook.remove()
        prefix = teacher.num_prefix_tokens
        normalised = (normalise_features(out[:, prefix:].float(), "instance") for out in outputs)
        mean = reduce(torch.add, normalised) / len(outputs)
        patches = F.layer_norm(mean, mean.shape[-1:])
        return {"patches": patches} | ({"global": patches.mean(dim=1)} if self.global_weight else {})


def mlps_of(encoder: Encoder) -> list[MLP]:
    """The MLP of every block."""
    return [module for module in encoder.modules() if isinstance(module, MLP)]


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part."""
    return hasattr(parameter, "full_tensor")


def whole(parameter: Tensor) -> Tensor:
    """The parameter, its parts gathered from all processes where it is sharded."""
    return parameter.full_tensor() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]


class UnregisteredModules:
    """Keeps modules out of the module tree: they are neither trained nor saved with the model."""

    student: Encoder | None = None
    teacher: Encoder | None = None
    waiting: dict[str, Tensor] | None = None  # the state to be loaded once there is a teacher
