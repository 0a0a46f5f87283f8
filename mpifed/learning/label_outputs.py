"""A model's outputs averaged by the label of the sample, and how a client learns from the averages of others.

The mathematics of federated distillation (Jeong et al. 2018, arXiv 1811.11479, and what followed from it). L is the
number of classes; row l of a table `[L, L]` is the mean output on samples of label l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpifed.learning.local import Loss

Output = Literal["probs", "logits"]
Divergence = Literal["ce", "kl", "mse"]


def output_of(logits: Tensor, output: Output) -> Tensor:
    """Float32 `[batch, L]`: the softmax of the logits, or they themselves."""
    return logits.float().softmax(dim=1) if output == "probs" else logits.float()


class LabelOutputs:
    """Outputs added up by the label of the sample: `sums` float64 `[L, L]`, `counts` int64 `[L]`."""

    def __init__(self, output: Output, sums: Tensor, counts: Tensor) -> None:
        self.output, self.sums, self.counts = output, sums, counts

    @classmethod
    def none_yet(cls, output: Output, classes: int, device: torch.device) -> LabelOutputs:
        zeros = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        return cls(output, zeros, torch.zeros(classes, dtype=torch.int64, device=device))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count these samples: logits `[batch, L]`, labels int64 `[batch]`."""
        members = F.one_hot(labels, len(self.counts))  # by a product, which adds in the same order on any device
        self.sums = self.sums + members.T.double() @ output_of(logits.detach(), self.output).double()
        self.counts = self.counts + members.sum(dim=0)

    def mean(self, first_count: int = 0) -> Tensor:
        """Float32 `[L, L]`, zero where a label has no sample; `first_count` is added to every count."""
        return row_means(self.sums, self.counts + first_count).float()


def row_means(sums: Tensor, totals: Tensor) -> Tensor:
    """`sums` `[..., L, L]` divided row by row by `totals` `[..., L]`; a row whose total is zero is zero."""
    totals = totals.unsqueeze(-1)
    return torch.where(totals > 0, sums / totals.clamp(min=1), torch.zeros_like(sums))


@dataclass(frozen=True)
class Teacher:
    """Rows of others: `outputs` `[L, L]`, of which those count where `known` (bool `[L]`)."""

    outputs: Tensor
    known: Tensor


def divergence(logits: Tensor, labels: Tensor, teacher: Teacher, output: Output, kind: Divergence) -> Tensor:
    """How far a batch is from its teacher, the row of each sample's label; samples without one count as zero.

    `ce`: -sum t log p. `kl`: the same minus the entropy of t, so with the same gradient. `mse`: half the squared
    distance of the outputs, which the analysis by neural tangent kernels assumes. t is the row, or, of averaged logits,
    its softmax. The mean over the batch, scalar.
    """
    rows, known = teacher.outputs[labels], teacher.known[labels]
    if kind == "mse":
        each = (output_of(logits, output) - rows).square().sum(dim=1) / 2
    else:
        target = rows if output == "probs" else rows.softmax(dim=1)
        each = -(target * logits.float().log_softmax(dim=1)).sum(dim=1)
        if kind == "kl":  # a sum without one of its terms may be below zero by a rounding error
            each = each + torch.special.xlogy(target, target.clamp(min=torch.finfo(target.dtype).tiny)).sum(dim=1)
    return torch.where(known, each, torch.zeros_like(each)).mean()


def distilled(seen: LabelOutputs, teacher: Teacher | None, weight: float, kind: Divergence) -> Loss:
    """Cross-entropy plus `weight` times the divergence from the teacher; `seen` gets what the model puts out meanwhile.

    So outputs are those of the moving model, each sample's before the step that it takes part in.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.add(logits, labels)
        supervised = F.cross_entropy(logits, labels)
        if teacher is None or weight == 0:
            return supervised
        return supervised + weight * divergence(logits, labels, teacher, seen.output, kind)

    return loss
