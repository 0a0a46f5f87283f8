"""What data-free systems have in common that train a conditional generator against the clients' classifiers.

Letters of shapes: K clients, B samples, C classes, n length of the noise. Label counts are whole numbers `[K, C]`:
samples of each client by class.

Zhu, Hong, Zhou (FedGen), ICML 2021, arXiv 2105.10056; Zhang, Shen, Ding, Tao, Duan (FedFTG), CVPR 2022, arXiv
2203.09249; Mao, Lee, Tseng, Ma, Yang, "Mode Seeking Generative Adversarial Networks for Diverse Image Synthesis", CVPR
2019, arXiv 1903.05628, for the idea of the diversity loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mpifed.errors import BadInput
from mpifed.types import DataSpec

Noise = Literal["normal", "uniform"]
Distances = Literal["mean", "norm"]


def refuse_texts(spec: DataSpec, algorithm: str) -> None:
    """Raise `BadInput` where inputs are token ids: generators here make real numbers."""
    if spec.vocabulary:
        raise BadInput(
            f"algorithm.name: {algorithm} generates inputs of real numbers, and texts are token ids; choose an "
            "algorithm that generates none"
        )


def diversity_loss(noise: Tensor, samples: Tensor, distances: Distances = "mean") -> Tensor:
    """exp(-mean over all pairs of d(samples_i, samples_j) d(noise_i, noise_j)), in (0, 1]: noise that differs shall
    make samples that differ.

    `noise` `[B, n]`, `samples` `[B, ...]`; the B pairs of a sample with itself count as zeros. `mean`: the mean
    absolute difference of the samples and the mean squared difference of the noise (the code of both papers), which
    depend on no size. `norm`: Euclidean norms of both (FedFTG, equation 7).
    """
    samples, noise = samples.flatten(1), noise.flatten(1)
    if distances == "norm":
        apart = torch.cdist(samples, samples) * torch.cdist(noise, noise)
    else:
        apart = _pairs(samples).abs().mean(dim=2) * _pairs(noise).square().mean(dim=2)
    return torch.exp(-apart.mean())


def _pairs(x: Tensor) -> Tensor:
    """`[B, n]` -> all differences `[B, B, n]`."""
    return x[:, None] - x[None]


def label_weights(counts: Tensor, smoothing: float = 0.0) -> Tensor:
    """omega_{k,y} = (c_{k,y} + s) / sum_j (c_{j,y} + s): how much client k is to say about label y, float32 `[K, C]`.

    The weights of a label sum to 1 over the clients; without smoothing s a client that has none of it has weight 0, and
    a label that nobody has gets zeros.
    """
    counts = counts.to(torch.float64) + smoothing
    total = counts.sum(dim=0)
    return (counts / torch.where(total > 0, total, 1.0)).to(torch.float32)


def label_prior(counts: Tensor) -> Tensor:
    """p(y) proportional to the samples of y that all clients have together, float32 `[C]`; zeros if there is none."""
    total = counts.to(torch.float64).sum(dim=0)
    return (total / total.sum().clamp(min=1.0)).to(torch.float32)


def sample_labels(prior: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Labels int64 `[size]` drawn from `prior` `[C]` (need not sum to 1), on the CPU as `generator` is."""
    return torch.multinomial(prior.cpu(), size, replacement=True, generator=generator)


def draw_noise(kind: Noise, size: int, length: int, generator: torch.Generator) -> Tensor:
    """float32 `[size, length]`, standard normal or uniform in [0, 1), on the CPU as `generator` is."""
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(size, length, generator=generator)
