"""How fast a run is: images per second, the share of time it waits for data, and how much of the device it uses."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair


TIMED = 8  # images of which a processor is timed before training
LONG = 2.0  # seconds: a batch that takes less is timed whole, since a few images of a small model take almost as long
# Dense bfloat16 FLOP/s from the vendors' data sheets (without sparsity), by a part of the device's name.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(name: str, bf16: bool) -> float | None:
    """FLOP/s that a device can do at most in the arithmetic that is used; None where it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None) if bf16 else None


def flops_per_image(model: MIMForPreTraining) -> float:
    """FLOPs of the forward and backward pass of one image through encoder and decoder, at the config's image size, mask
    ratio and number of masks: matrix products, attention and convolutions, two for a multiplication and addition. The
    target is not counted, nor what is computed twice to save memory.

    They are counted on a twin of the model without memory, on the meta device, whose attention is made of plain matrix
    products: torch's counter knows the fused kernels of some devices and versions only.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.random.fork_rng([]), FlopCounterMode(display=False) as counter:
        with torch.device("meta"):
            twin = type(model)(config).eval()  # in eval mode no path is dropped
            pixel_values = torch.zeros(1, config.num_channels, *pair(config.image_size))
        logits = twin(pixel_values, return_loss=False).logits
        parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return float(counter.get_total_flops())


def seconds_per_step(trainer, shape: tuple[int, int, int]) -> float | None:
    """How long a device computes for one optimizer step, measured on a few images of noise before training. Neither
    weights nor gradients, modes or random states are changed.

    Args:
        trainer: a `MIMTrainer`.
        shape: channels, height and width of the images.

    Returns:
        None where it cannot be told: of several processes, sharded or compiled models, or without the memory.
    """
    args = trainer.args
    if args.world_size > 1 or args.n_gpu > 1 or args.torch_compile or trainer.is_sharded:
        return None
    few = min(args.train_batch_size, TIMED) if args.device.type == "cpu" else args.train_batch_size
    seconds = 0.0
    with unchanged(trainer):
        try:
            for count in (few, few, args.train_batch_size):  # the first one warms up
                if count > few and seconds > LONG:
                    break
                started = time.perf_counter()
                compute_gradients(trainer, count, shape)
                seconds = (time.perf_counter() - started) * args.train_batch_size / count
        except torch.OutOfMemoryError:
            return None
    return seconds * args.gradient_accumulation_steps


@contextmanager
def unchanged(trainer) -> Iterator[None]:
    """A context that computes gradients and leaves the model of a trainer, its mode and the random states as they
    were. Batch norms, and what counts codes, see nothing: the model is in eval mode."""
    training = trainer.model.training
    with torch.random.fork_rng():
        trainer.model.eval()
        try:
            yield
        finally:
            trainer.model.zero_grad(set_to_none=True)
            trainer.model.train(training)


def compute_gradients(trainer, count: int, shape: tuple[int, int, int]) -> None:
    """Forward and backward pass of `count` images of noise; waits for the device."""
    pixel_values = torch.randn(count, *shape, device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        outputs = trainer.model(pixel_values=pixel_values)
        loss = outputs.loss if outputs.loss is not None else outputs.logits.float().mean()
        if trainer.distance is not None:
            distance = trainer.distance(trainer.bare_model, pixel_values, outputs.bool_masked_pos)
            loss = loss + trainer.distance.weight * distance
    loss.backward()
    loss.item()


class Throughput:
    """Counts between two calls of `read`.

    Args:
        images_per_step: of all devices together.
        flops: per image, or None.
        peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, images_per_step: int, flops: float | None = None, peak: float | None = None):
        self.images_per_step, self.flops, self.peak = images_per_step, flops, peak
        self.waited, self.started = 0.0, 0.0
        self.step: int | None = None

    def fetch(self, function: Callable, *args):
        """Calls `function`, whose time is waiting for data."""
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            self.waited += time.perf_counter() - started

    def read(self, step: int) -> dict[str, float]:
        """-> `images_per_second`, `data_wait` (share of the time) and, where they are known, `gflops_per_image` and
        `mfu` (share of the peak) since the call before; nothing at the first call, nor without a step between."""
        now, before = time.perf_counter(), self.step
        readings: dict[str, float] = {}
        seconds = now - self.started
        if before is not None and step > before and seconds > 0:
            speed = (step - before) * self.images_per_step / seconds
            readings = {"images_per_second": round(speed, 1), "data_wait": round(min(1.0, self.waited / seconds), 4)}
            if self.flops:
                readings["gflops_per_image"] = round(self.flops / 1e9, 3)
            if self.flops and self.peak:
                readings["mfu"] = round(speed * self.flops / self.peak, 4)
        self.waited, self.step, self.started = 0.0, step, now
        return readings


def mean_throughput(history: list[dict]) -> dict[str, float]:
    """Means of `data_wait`, `gflops_per_image` and `mfu` over a run's log, for `metrics.json`."""
    logged = {name: [e[name] for e in history if name in e] for name in ("data_wait", "gflops_per_image", "mfu")}
    return {name: round(sum(values) / len(values), 4) for name, values in logged.items() if values}
