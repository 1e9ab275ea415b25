"""How much memory a run will take, before it runs."""

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_mim.training.trainer.throughput import compute_gradients, unchanged


COUNTS = (2, 4)  # images of which a processor's memory is measured; what one more takes is the same for each
PROBE = 4096  # parameters by which the state of an optimizer is measured


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in this context, on whatever device, while they are alive.

    Attributes:
        now: how many there are.
        course: how many there were after each operation.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.course: list[int] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages_of((args, kwargs))}
        for storage in storages_of(out):
            self._count(storage, given)
        self.course.append(self.now)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in given:  # a view, or what was there before
            return
        self.known.add(key)
        self.now += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def storages_of(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one device.

    Attributes:
        weights: of the model, with its buffers, and of the start that it is kept near.
        optimizer: its state.
        step: gradients and activations, at the moment of a step that has the most.
    """

    weights: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step


def measure_memory(trainer, shape: tuple[int, int, int]) -> MemoryNeed | None:
    """What a training takes: weights, the optimizer's state, and forward and backward pass of a batch, which a GPU
    measures; on a processor it is extrapolated from two small batches. Images, a teacher and libraries come on top.

    Args:
        trainer: a `MIMTrainer`.
        shape: channels, height and width of the images.

    Returns:
        None where it cannot be told: of several processes, sharded or compiled models, or where it is more than there
        is.
    """
    args, model = trainer.args, trainer.model.to(trainer.args.device)
    if args.world_size > 1 or args.n_gpu > 1 or args.torch_compile or trainer.is_sharded:
        return None
    start = {} if trainer.distance is None else trainer.distance.start_weights()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *start.values()))
    with unchanged(trainer):
        try:
            step = step_on_gpu(trainer, shape) if args.device.type == "cuda" else step_by_counting(trainer, shape)
        except torch.OutOfMemoryError:
            return None
    return MemoryNeed(weights, state_of_optimizer(trainer), step)


def step_on_gpu(trainer, shape: tuple[int, int, int]) -> int:
    """Bytes that one step adds at its peak, as the allocator counts them."""
    device = trainer.args.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute_gradients(trainer, trainer.args.train_batch_size, shape)
    return torch.cuda.max_memory_allocated(device) - before


def step_by_counting(trainer, shape: tuple[int, int, int]) -> int:
    """The same, of tensors that are counted while they are alive. After each operation their bytes grow by the same
    with every image; the operation after which there are most is another one for few images, where gradients are
    most, than for many."""
    courses = []
    for count in (COUNTS[0], *COUNTS):  # the first one warms up: it fills tables that stay
        trainer.model.zero_grad(set_to_none=True)
        with LiveMemory() as memory:
            compute_gradients(trainer, count, shape)
        courses.append(memory.course)
    courses = courses[1:]
    if len(courses[0]) != len(courses[1]):  # as of a model that chooses its operations by the batch
        courses = [[max(course)] for course in courses]
    more = (trainer.args.train_batch_size - COUNTS[0]) / (COUNTS[1] - COUNTS[0])
    return int(max(few + (many - few) * more for few, many in zip(*courses)))


def state_of_optimizer(trainer) -> int:
    """Bytes of the state that the optimizer will hold, by what one of its kind holds of a few parameters."""
    optimizer: Any = trainer.create_optimizer()
    parameter = torch.nn.Parameter(torch.zeros(PROBE, device=trainer.args.device))
    parameter.grad = torch.zeros_like(parameter)
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    twin = type(optimizer)([parameter], **settings)
    twin.step()
    state = sum(value.nbytes for value in twin.state[parameter].values() if isinstance(value, torch.Tensor))
    trained = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
    count = sum(weight.numel() for weight in trained)
    return int(count * (state // PROBE))
