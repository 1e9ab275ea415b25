"""Features brought to mean 0 and variance 1 by statistics of many images: per channel, or by PHI-S (2410.01680)."""

from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init


STANDARDISATIONS = ("standard", "phi_s")


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def quadratic_character(prime: int) -> Tensor:
    """(prime, prime): entry (i, j) is 1 where i - j is a square modulo the prime, -1 where it is none, 0 for i = j."""
    squares = {number * number % prime for number in range(1, prime)}
    values = torch.tensor([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))])
    index = torch.arange(prime)
    return values[(index[:, None] - index) % prime]


@cache
def hadamard(order: int) -> Tensor | None:
    """A matrix (order, order) of 1 and -1 with orthogonal rows, float64: of Sylvester's and both of Paley's
    constructions, with primes, and their products. None where these give none."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order & (order - 1) == 0:  # a power of two
        half = cast(Tensor, hadamard(order // 2))
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if order % 4:
        return None
    if is_prime(order - 1):
        return paley(order - 1)
    if is_prime(order // 2 - 1) and order // 2 % 4 == 2:
        return paley(order // 2 - 1)
    for factor in range(2, int(order**0.5) + 1):
        if order % factor == 0:
            left, right = hadamard(factor), hadamard(order // factor)
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def paley(prime: int) -> Tensor:
    """Paley's matrix of order prime + 1 for a prime 3 modulo 4, of order 2 (prime + 1) for one 1 modulo 4."""
    symmetric = prime % 4 == 1
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = 1 if symmetric else -1
    core[1:, 1:] = quadratic_character(prime)
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if not symmetric:
        return core + identity
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, plus.double()) + torch.kron(identity, minus.double())


class Moments:
    """Mean and covariance over tokens that come in batches, in double precision."""

    def __init__(self, dim: int):
        self.dim, self.count = dim, 0
        self.shift: Tensor | None = None  # near the mean: then the sums lose no digits

    def add(self, tokens: Tensor) -> None:
        """tokens (..., dim)"""
        tokens = tokens.reshape(-1, self.dim)
        tokens = (tokens.cpu() if tokens.device.type == "mps" else tokens).double()  # which has no double precision
        if self.shift is None:
            self.shift = tokens.mean(dim=0)
            self.sum, self.products = torch.zeros_like(self.shift), tokens.new_zeros(self.dim, self.dim)
        tokens = tokens - self.shift
        self.count += len(tokens)
        self.sum += tokens.sum(dim=0)
        self.products += tokens.T @ tokens

    def result(self) -> tuple[Tensor, Tensor]:
        """-> mean (dim,) and covariance (dim, dim), divided by the number of tokens."""
        assert self.shift is not None
        gap = self.sum / self.count
        return self.shift + gap, self.products / self.count - gap[:, None] * gap


def phi_s_matrix(covariance: Tensor) -> Tensor:
    """The matrix of PHI-S (dim, dim), for row vectors: (features - mean) @ matrix. The principal components come first,
    by descending variance, each with its largest weight positive; then the Hadamard matrix, which gives every channel
    the same variance; then one scalar, which makes it 1. Distances between features only change by that scalar."""
    matrix = hadamard(len(covariance))
    assert matrix is not None
    variances, directions = torch.linalg.eigh(covariance)
    directions = directions.flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()
    rotation = directions @ matrix.to(covariance.device).T / len(covariance) ** 0.5
    return rotation / variances.clamp(min=0).mean().sqrt()


class Standardiser(nn.Module):
    """Features of a layer, standardised. The statistics are buffers, so that they are saved with the model.

    Args:
        dim: channels.
        kind: `standard`: each channel less its mean, over its standard deviation; a channel that never varies becomes
            0. `phi_s`: as of `phi_s_matrix`.

    Raises:
        ValueError: there is no Hadamard matrix for so many channels here.
    """

    def __init__(self, dim: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "phi_s" and hadamard(dim) is None:
            raise ValueError(
                f"norm 'phi_s' needs a Hadamard matrix of order {dim}, the channels of the layer, and none is known "
                "here (orders are 1, 2 and most multiples of 4): choose norm 'standard'"
            )
        shape = (dim, dim) if kind == "phi_s" else (dim,)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.long))  # 0 until there are statistics
        self.known = False

    mean: Tensor
    scale: Tensor
    num_tokens: Tensor

    def init_parameters(self):
        for buffer in (self.mean, self.scale, self.num_tokens):
            init.zeros_(buffer)

    @property
    def is_fitted(self) -> bool:
        self.known = self.known or bool(self.num_tokens > 0)  # asked once: a GPU would be waited for
        return self.known

    @torch.no_grad()
    def fit(self, moments: Moments, source: str) -> None:
        """Raises:
        ValueError: the features are not finite, or all the same.
        """
        mean, covariance = moments.result()
        total = covariance.diagonal().mean()
        if not torch.isfinite(covariance).all() or not total > 1e-12 * mean.square().mean():
            raise ValueError(f"{source} gives features that are all the same or not finite on these images")
        if self.kind == "phi_s":
            scale = phi_s_matrix(covariance)
        else:
            deviation = covariance.diagonal().clamp(min=0).sqrt()
            scale = torch.where(deviation > 1e-6 * total.sqrt(), 1 / deviation, 0)
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.num_tokens.fill_(moments.count)

    def forward(self, features: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), float32"""
        if not self.is_fitted:
            raise ValueError(
                "the statistics of the teacher's features are not known yet: hf-mim pretrain estimates them before the "
                "first step; elsewhere call model.target.fit(batches of pixel_values) once"
            )
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float() - self.mean.float()
            scale = self.scale.float()
            return centred @ scale if self.kind == "phi_s" else centred * scale
