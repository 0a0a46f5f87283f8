"""What a rank's work costs, as numbers that can be stored: lines over a client's work and over the replies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Line:
    """Seconds = base + slope * x."""

    base: float
    slope: float

    def at(self, x: float) -> float:
        return self.base + self.slope * x

    def plus(self, seconds: float) -> Line:
        return Line(self.base + seconds, self.slope)

    def times(self, factor: float) -> Line:
        return Line(self.base * factor, self.slope * factor)


def of_two(points: Sequence[tuple[float, float]]) -> Line:
    """The line through the first and the last of some points `(x, seconds)`, ascending in x, neither part below zero.

    Of points that are less than a fifth apart, or one, the line through the origin: what is measured is then too little
    to tell base and slope apart. Without a point nothing costs anything.
    """
    if not points:
        return Line(0.0, 0.0)
    (x0, y0), (x1, y1) = min(points), max(points)
    if x1 < 1.2 * x0 or x1 <= 0:
        return Line(0.0, (y0 + y1) / (x0 + x1)) if x0 + x1 > 0 else Line((y0 + y1) / 2, 0.0)
    slope = min(max(0.0, (y1 - y0) / (x1 - x0)), y1 / x1)
    return Line(max(0.0, y1 - slope * x1), slope)


class Work(NamedTuple):
    """What a client does in a round of the job's local training."""

    steps: float
    samples: float  # visited, each as often as it is


def work_of(local: Any, examples: int) -> Work:
    """Of a client with so many samples."""
    if local.steps is not None:
        return Work(local.steps, local.steps * min(local.batch_size, max(1, examples)))
    epochs = local.epochs or 1
    return Work(epochs * math.ceil(examples / local.batch_size), epochs * examples)


@dataclass(frozen=True)
class ClientCost:
    """Seconds of one client in a phase: of any client, of every step, of every sample that it visits."""

    base: float
    step: float = 0.0
    sample: float = 0.0

    def at(self, work: Work) -> float:
        return self.base + self.step * work.steps + self.sample * work.samples

    def plus(self, seconds: float) -> ClientCost:
        return replace(self, base=self.base + seconds)

    def times(self, factor: float) -> ClientCost:
        return ClientCost(self.base * factor, self.step * factor, self.sample * factor)


def of_clients(points: Sequence[tuple[Work, float]]) -> ClientCost:
    """The cost of least relative squares through what some clients took, no part below zero.

    Of clients of one size it is proportional to their samples.
    """
    taken = np.array([max(seconds, 1e-9) for _, seconds in points])
    columns = np.array([[1.0, work.steps, work.samples] for work, _ in points])
    if len({work for work, _ in points}) == 1:
        samples = columns[0, 2]
        return ClientCost(0.0, 0.0, float(taken.mean() / samples)) if samples else ClientCost(float(taken.mean()))
    best, least = np.zeros(3), np.inf
    for parts in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        scaled = columns[:, parts] / taken[:, None]
        found, *_ = np.linalg.lstsq(scaled, np.ones_like(taken), rcond=None)
        error = float(((scaled @ found - 1.0) ** 2).sum())
        if (found >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(3), error
            best[list(parts)] = found
    return ClientCost(*map(float, best))


@dataclass(frozen=True)
class Compute:
    """Seconds and bytes of one rank's work, with no other rank."""

    client: Mapping[str, Sequence[ClientCost]]  # by phase and architecture
    first: Mapping[str, Sequence[ClientCost]]  # likewise, where a client takes part for the first time
    server: Mapping[str, Line]  # the server's step by phase, over the replies
    communicate: Line  # codecs, buffers and sums of a round without a network, over the replies
    server_test: float  # a test of the server's model
    client_test: float  # a test of one client's
    other: float  # what a round takes besides
    checkpoint: float
    server_state: int  # bytes
    client_state: int
    workspace: int  # bytes by which the process grew: models, batches, activations, the test set
    sizes: Mapping[str, float]  # mean encoded bytes of a client by "direction.kind"

    def client_seconds(self, phase: str, client: int, work: Work, first: bool) -> float:
        """Of one client in one round of a phase."""
        lines = (self.first if first else self.client).get(phase, ())
        return lines[client % len(lines)].at(work) if lines else 0.0

    def times(self, factor: float) -> Compute:
        """The same on a machine that takes so many times as long."""

        def scaled(costs: Mapping[str, Sequence[ClientCost]]) -> dict[str, list[ClientCost]]:
            return {name: [line.times(factor) for line in several] for name, several in costs.items()}

        return replace(
            self,
            client=scaled(self.client),
            first=scaled(self.first),
            server={name: line.times(factor) for name, line in self.server.items()},
            communicate=self.communicate.times(factor),
            server_test=self.server_test * factor,
            client_test=self.client_test * factor,
            other=self.other * factor,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Compute:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError where it is none."""

        def line(of: Mapping[str, Any]) -> Line:
            return Line(float(of["base"]), float(of["slope"]))

        def costs(of: Mapping[str, Any]) -> dict[str, list[ClientCost]]:
            parts = ("base", "step", "sample")
            return {
                str(name): [ClientCost(*(float(one[part]) for part in parts)) for one in several]
                for name, several in of.items()
            }

        return cls(
            client=costs(value["client"]),
            first=costs(value["first"]),
            server={str(name): line(one) for name, one in value["server"].items()},
            communicate=line(value["communicate"]),
            server_test=float(value["server_test"]),
            client_test=float(value["client_test"]),
            other=float(value["other"]),
            checkpoint=float(value["checkpoint"]),
            server_state=int(value["server_state"]),
            client_state=int(value["client_state"]),
            workspace=int(value["workspace"]),
            sizes={str(kind): float(size) for kind, size in value["sizes"].items()},
        )
