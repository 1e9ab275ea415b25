"""Poolers and linear classifiers on frozen features: all of them trained together, in one pass over the batches."""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from hf_mim.modeling.poolers import AbmilpPooler
from hf_mim.training.data.splits import hold_out
from hf_mim.training.evaluation.features import PoolerChoice, pool


WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls to zero along a cosine
FEWEST_STEPS = 8  # an epoch has; where there are few images the batches are smaller
OPTIMIZERS = ("adamw", "lars")
# AdamW's as they are; LARS' for a batch of 256, times which they grow (Beyond [cls] and MAE: 0.1).
LEARNING_RATES = {"adamw": [1e-3, 3e-3, 1e-2], "lars": [0.1, 0.3, 1.0]}


@dataclass
class Schedule:
    """How the heads are trained.

    Args:
        epochs: at most.
        patience: epochs without a better validation accuracy after which a head is done.
        batch_size: images in a step, fewer where there would be less than `FEWEST_STEPS` steps.
        optimizer, weight_decay: see `make_optimizer`.
    """

    epochs: int
    patience: int
    batch_size: int
    optimizer: str
    weight_decay: float


class Head(nn.Module):
    """Pooler, normalisation without parameters and linear classifier (Beyond [cls], 2412.03215; MAE, 2111.06377).

    `pooler` None takes vectors that are pooled already. `as_linear` draws the classifier and the pooler's layers as
    `nn.Linear` does, as Beyond [cls] does for LARS: a score that starts at zero would take the raw first gradient
    there, since the trust ratio is 1 at norm 0. Else the classifier starts small, as in MAE.
    """

    def __init__(self, pooler, dim: int, classes: int, as_linear: bool = False):
        super().__init__()
        self.pooler = pooler
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.classifier = nn.Linear(dim, classes)
        if as_linear:
            draw_as_linear(pooler)
        else:
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def classify(self, vectors: Tensor) -> Tensor:
        """(batch, dim) -> logits (batch, classes)."""
        return self.classifier(self.norm(vectors))


def draw_as_linear(pooler: nn.Module | None) -> None:
    for module in () if pooler is None else pooler.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        if isinstance(module, AbmilpPooler):
            for parameter in (module.score, module.score_bias):
                nn.init.uniform_(parameter, -(module.score.shape[1] ** -0.5), module.score.shape[1] ** -0.5)


@dataclass
class Trained:
    """A head, as good as it got.

    accuracy, loss: on the validation images, percent and nats, at `epoch`, counted from 1.
    parameters: that were trained, without the classifier's.
    """

    name: str
    layer: int
    learning_rate: float
    seed: int
    head: Head
    accuracy: float = -1.0
    loss: float = math.inf
    epoch: int = 0
    state: dict | None = None

    @property
    def setting(self) -> tuple[str, int, float]:
        return self.name, self.layer, self.learning_rate

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.head.pooler.parameters()) if self.head.pooler is not None else 0

    def at_its_best(self) -> "Trained":
        """Itself, with the parameters of its best epoch, frozen."""
        if self.state is not None:
            self.head.load_state_dict(self.state)
        self.head.eval().requires_grad_(False)
        return self

    def keep_if_better(self, accuracy: float, loss: float, epoch: int) -> None:
        if (accuracy, -loss) > (self.accuracy, -self.loss):
            self.accuracy, self.loss, self.epoch = accuracy, loss, epoch
            self.state = copy.deepcopy(self.head.state_dict())


class Group:
    """The heads of one pooler on one layer. They share its vectors where it has no parameters.

    A loop over the heads of different learning rates, and not one stacked by `torch.func.vmap`: on a CPU that takes
    1.1 to 6 times as long for AbMILP and multi-query pooling.

    Args:
        bf16: train poolers that take it (`Pooler.trains_in_bf16`) in bfloat16; they are validated in float32.
    """

    def __init__(self, choice: PoolerChoice, layer: int, model, vectors_only: bool, *, bf16: bool = False):
        self.choice, self.layer, self.model = choice, layer, model
        self.prefix = model.encoder.num_prefix_tokens
        self.grid = model.encoder.token_grid(*_pair(model.config.image_size))
        self.fixed = choice.make(model)
        self.learned = any(True for _ in self.fixed.parameters())
        self.vectors_only = vectors_only
        self.bf16 = bf16 and self.fixed.trains_in_bf16

    def make(self, classes: int, learning_rate: float, seed: int, as_linear: bool = False) -> Trained:
        pooler = self.choice.make(self.model) if self.learned else None
        head = Head(pooler, self.fixed.out_dim, classes, as_linear).to(self.model.device)
        return Trained(self.choice.name, self.layer, learning_rate, seed, head)

    def pool(self, features: dict[str, Tensor], pooler=None) -> tuple[Tensor, Tensor | None]:
        """Features of a source -> vectors (batch, dim), and the pooler's weights."""
        if self.vectors_only:
            return features[f"{self.choice.name}/{self.layer}"], None
        row = features.get(f"attention/{self.layer}")
        attention = None if row is None else row[:, :, None]
        tokens = features[f"tokens/{self.layer}"]
        pooler = self.fixed if pooler is None else pooler
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16 and pooler.training):
            return pool(pooler, tokens, self.prefix, self.grid, attention)

    def vectors(self, features: dict[str, Tensor], heads: list[Trained]):
        """The vectors (batch, dim) of every head."""
        if not self.learned:
            shared = self.pool(features)[0].detach()
            return (shared for _ in heads)
        return (self.pool(features, head.head.pooler)[0] for head in heads)


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


# ---- training ------------------------------------------------------------------------------------------------------
def make_optimizer(trained: list[Trained], schedule: Schedule, batch_size: int) -> torch.optim.Optimizer:
    """One optimizer with a learning rate for every head.

    AdamW takes rates as they are. LARS is that of the papers: rates for a batch of 256, parameters of one dimension
    without its trust ratio, which lets the biases of a deep pooler see the raw rate: prefer AdamW for those.
    """
    groups = []
    for member in trained:
        for matrices in (True, False):
            parameters = [p for p in member.head.parameters() if (p.ndim > 1) == matrices]
            rate = member.learning_rate * (batch_size / 256 if schedule.optimizer == "lars" else 1)
            extra = {"always_adapt": matrices} if schedule.optimizer == "lars" else {}
            decay = schedule.weight_decay if matrices else 0.0
            groups.append({"params": parameters, "lr": rate, "base": rate, "weight_decay": decay, **extra})
    if schedule.optimizer == "lars":
        return Lars(groups, momentum=0.9, trust_coeff=0.001)
    return torch.optim.AdamW(groups, fused=True)


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_heads(
    source,
    labels: Tensor,
    classes: int,
    rates: dict[Group, list[float]],
    schedule: Schedule,
    share: float,
    seed: int,
    advance=None,
) -> list[Trained]:
    """Trains the poolers of every group, each with all its learning rates, in one pass over a source's features.

    Args:
        source: of the training images; see `CachedSource`. Epoch e sees the view e modulo their number.
        labels: (images,), class numbers.
        rates: the learning rates of each group.
        share: of the images held out for validation, which see view 0.
        seed: of the held-out images, the order and the parameters.
        advance: told the share of the work done, a number that adds up to 1.

    Returns:
        one entry for each head, with the parameters of its best epoch.
    """
    train, validation = map(torch.from_numpy, hold_out(labels.numpy(), share, seed))
    generator = torch.Generator().manual_seed(seed)
    heads = make_heads(rates, classes, seed, as_linear=schedule.optimizer == "lars")
    everything = [member for members in heads.values() for member in members]
    batch_size = max(2, min(schedule.batch_size, len(train) // FEWEST_STEPS))
    optimizer = make_optimizer(everything, schedule, batch_size)
    for epoch in range(schedule.epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        batches = [batch.sort().values for batch in order.split(batch_size) if len(batch) == batch_size]
        train_epoch(source, labels, batches, heads, optimizer, epoch, schedule.epochs)
        validate(source, labels, validation, heads, epoch + 1, batch_size)
        heads = still_learning(heads, epoch + 1, schedule.patience)
        if advance is not None:
            advance(1 / schedule.epochs if heads else 1 - epoch / schedule.epochs)
        if not heads:
            break
    return [member.at_its_best() for member in everything]


def make_heads(
    rates: dict[Group, list[float]], classes: int, seed: int, as_linear: bool = False
) -> dict[Group, list[Trained]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {group: [group.make(classes, rate, seed, as_linear) for rate in of] for group, of in rates.items()}


def set_rates(optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def train_epoch(source, labels: Tensor, batches: list[Tensor], heads, optimizer, epoch: int, epochs: int) -> None:
    """One step for each of the batches: positions in order, so that neighbours on the disk are read together."""
    for step, batch in enumerate(batches, start=epoch * len(batches)):
        set_rates(optimizer, learning_rate_factor(step, epochs * len(batches)))
        train_step(source.fetch(epoch, batch), labels[batch], heads, optimizer)


def train_step(features: dict[str, Tensor], labels: Tensor, heads: dict[Group, list[Trained]], optimizer) -> None:
    for group, members in heads.items():
        for member in members:
            member.head.train()
        for member, vectors in zip(members, group.vectors(features, members), strict=True):
            # One backward pass for each head, not one for their sum: only one head's activations are there at a time.
            F.cross_entropy(member.head.classify(vectors), labels.to(vectors.device)).backward()
    optimizer.step()
    optimizer.zero_grad()


def still_learning(heads: dict[Group, list[Trained]], epoch: int, patience: int) -> dict[Group, list[Trained]]:
    """Those that have improved in the last `patience` epochs. Others get no gradient, which their optimizer skips."""
    improving = {group: [m for m in members if epoch - m.epoch < patience] for group, members in heads.items()}
    return {group: members for group, members in improving.items() if members}


@torch.no_grad()
def predict(source, positions: Tensor, heads: dict[Group, list[Trained]], batch_size: int):
    """Logits of every head for the whole images at `positions`, batch by batch: (positions, {id of head: logits})."""
    for chosen in positions.split(batch_size):
        features, logits = source.fetch(0, chosen), {}
        for group, members in heads.items():
            for member in members:
                member.head.eval()
            for member, vectors in zip(members, group.vectors(features, members), strict=True):
                logits[id(member)] = member.head.classify(vectors).cpu()
        yield chosen, logits


def validate(source, labels: Tensor, validation: Tensor, heads, epoch: int, batch_size: int) -> None:
    right: dict[int, int] = {}
    loss: dict[int, float] = {}
    for chosen, logits in predict(source, validation, heads, batch_size):
        for key, values in logits.items():
            right[key] = right.get(key, 0) + (values.argmax(1) == labels[chosen]).sum().item()
            loss[key] = loss.get(key, 0.0) + F.cross_entropy(values, labels[chosen], reduction="sum").item()
    for members in heads.values():
        for member in members:
            member.keep_if_better(100 * right[id(member)] / len(validation), loss[id(member)] / len(validation), epoch)


def test_heads(source, labels: Tensor, heads: dict[Group, list[Trained]], batch_size: int) -> dict[int, Tensor]:
    """{id of head: whether each of a source's images is classified right, bool (images,)}."""
    right = {id(m): torch.zeros(len(labels), dtype=torch.bool) for members in heads.values() for m in members}
    for chosen, logits in predict(source, torch.arange(len(labels)), heads, batch_size):
        for key, values in logits.items():
            right[key][chosen] = values.argmax(1) == labels[chosen]
    return right
