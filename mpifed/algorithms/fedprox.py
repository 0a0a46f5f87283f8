"""FedProx. Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020,
arXiv 1812.06127, Algorithm 2.

FedAvg with a local objective F_k(w) + (mu/2) ||w - x||^2, x being the model received in this round. The paper's
analysis samples clients by their numbers of samples and averages them equally (`sampling = "examples"`,
`weighting = "uniform"`); its experiments do as FedAvg does (the default here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import ClientContext, Payload, State
from mpifed.algorithms.fedavg import FedAvg
from mpifed.learning.local import Correction


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term; `mu = 0` is FedAvg bit for bit."""

    mu: Annotated[float, Range(ge=0)] = 0.01
    """Weight of the proximal term. The paper's grid is 0.001, 0.01, 0.1, 1."""

    def correction(self, state: State, down: Payload, ctx: ClientContext) -> Correction | None:
        """The gradient of (mu/2) ||w - x||^2 is mu (w - x)."""
        if self.mu == 0:
            return None
        received = down["model"]

        def proximal(parameters: Tensor, gradient: Tensor) -> None:
            gradient.add_(parameters - received, alpha=self.mu)

        return proximal
