"""Losses that can be worked out by hand, and rounds of an algorithm on them without data set, job or ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mpifed.algorithms import fedavg, scaffold
from mpifed.algorithms.base import Absent, Algorithm, Auxiliary, Phase
from mpifed.codecs.identity import Identity
from mpifed.comm.exchange import Exchange
from mpifed.comm.inprocess import InProcess
from mpifed.federation.env import Context
from mpifed.federation.roster import Assignment
from mpifed.job import LocalTraining
from mpifed.learning import local as learning
from mpifed.models import initialise
from mpifed.models.flat import FlatModel
from mpifed.rng import torch_generator
from mpifed.types import DataSpec, State


class Quadratic(nn.Module):
    """A sample is curvatures a and centres e, `[2, n]`; its loss at w is sum a/2 (w - e)^2, its gradient a (w - e)."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0] / 2 * (self.w - x[:, 1]) ** 2).sum(dim=1)


class Slope(nn.Module):
    """A sample is a vector g `[n]`; its loss at w is <g, w>, its gradient g everywhere."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Prior(nn.Module):
    """Softmax regression that sees no input: the logits of every sample are the parameters b `[classes]`."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.b.expand(len(x), -1)


def output_is_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """For `Quadratic` and `Slope`, which put out the loss of each sample."""
    return outputs.mean()


class ToyEnv:
    """`Env` of a model that has its start written down."""

    def __init__(self, module: nn.Module, clients: int, rounds: int = 1000, seed: int = 0) -> None:
        self.seed, self.rounds, self.clients = seed, rounds, clients
        self.spec = DataSpec((1,), 3)
        self.device = torch.device("cpu")
        self.shared_buffers, self.own_buffers = True, False
        self.local = LocalTraining()
        self.transfer = None
        self.public = None
        self._model = FlatModel(module)
        self._auxiliary: dict[str, Auxiliary] = {}
        self._start = self._model.parameters.detach().clone(), self._model.buffers.clone()

    def model(self, client: int | None = None) -> FlatModel:
        return self._model

    def initial(self, client: int | None = None) -> tuple[Tensor, Tensor]:
        return self._start[0].clone(), self._start[1].clone()

    def auxiliary(self, name: str, factory: Callable[[], nn.Module]) -> Auxiliary:
        if name not in self._auxiliary:
            model = FlatModel(initialise(factory, self.seed))
            self._auxiliary[name] = Auxiliary(model, model.parameters.detach().clone(), model.buffers.clone())
        return self._auxiliary[name]

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        return torch_generator(self.seed, purpose, *key)

    def once(self, purpose: str, client: int, make: Callable[[], State]) -> State:
        return make()


def context(
    env: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    client: int = 0,
    round_: int = 1,
    mean_examples: float | None = None,
    **local: Any,
) -> Context:
    """One client with these samples; `local` are keys of the job's `[local]`."""
    labels = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    mean = len(x) if mean_examples is None else mean_examples
    return Context(env, client, round_, "train", lambda: (x, labels), mean, LocalTraining(**local))


class Simulation:
    """Rounds of an algorithm whose client i holds `samples[i]` (and `labels[i]`), on one rank.

    Without labels the clients minimise what the model puts out, instead of a cross-entropy.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        module: nn.Module,
        samples: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        **local: Any,
    ) -> None:
        self.algorithm, self.samples, self.labels, self.local = algorithm, samples, labels, local
        self.env: Any = ToyEnv(module, len(samples))
        self.server = algorithm.server_init(self.env)
        self.states: list[State] = [algorithm.client_init(self.env, client) for client in range(len(samples))]
        self.round = 0
        identity: Any = Identity()
        self._exchange = Exchange(InProcess.alone(), lambda way, name: identity, "ordered", self.env.device)

    def run(self, clients: Iterable[int]) -> None:
        """One round of these clients."""
        self.round += 1
        dealt = Assignment((tuple(sorted(clients)),))
        for phase in self.algorithm.phases(self.env):
            if phase.rounds(self.round):
                self._run_phase(phase, dealt)

    def _run_phase(self, phase: Phase, dealt: Assignment) -> None:
        fields = phase.up(self.round)
        shared, own, _ = self._exchange.download(
            phase.name,
            phase.down(self.round),
            phase.download(self.server, self.round),
            dealt,
            len(self.states),
            0.0,
        )
        self.server = self.algorithm.sent(self.server, shared, self.round)
        outgoing = {}
        mean = sum(map(len, self.samples)) / len(self.samples)
        for client in dealt.clients:
            y = None if self.labels is None else self.labels[client]
            ctx = context(
                self.env,
                self.samples[client],
                y,
                client=client,
                round_=self.round,
                mean_examples=mean,
                **self.local,
            )
            with self._loss():
                self.states[client], answer = phase.client(self.states[client], shared | own[client], ctx)
            assert not isinstance(answer, Absent)
            outgoing[client] = self._exchange.encode(fields, answer, {}, 0.0)
        known = self._exchange.announce(fields, outgoing, dealt)
        uploads = self._exchange.collect(phase.name, fields, outgoing, known, dealt)
        assert uploads is not None
        self.server = phase.server(self.server, uploads, self.round)

    def _loss(self) -> ExitStack:
        stack = ExitStack()
        if self.labels is None:
            for module, function in ((fedavg, learning.local_training), (scaffold, learning.full_gradient)):
                stack.enter_context(patch.object(module, function.__name__, partial(function, loss=output_is_loss)))
        return stack

    def mean_of_clients(self, name: str) -> Tensor:
        """The mean of a client state over all clients."""
        return torch.stack([state[name] for state in self.states]).mean(dim=0)


def quadratic(curvature: Sequence[float], centre: Sequence[float]) -> Tensor:
    """The only sample of a client whose loss is sum a/2 (w - e)^2."""
    return torch.tensor([[curvature, centre]], dtype=torch.float32)


def close(actual: Tensor, expected: Sequence[float], tolerance: float = 1e-6) -> Any:
    """Raises AssertionError where a tensor is not the list of numbers, up to an absolute tolerance."""
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=tolerance, check_dtype=False)
