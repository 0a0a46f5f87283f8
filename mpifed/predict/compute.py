"""What a rank's work costs, as numbers that can be stored: lines over a client's work and over the replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


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


def work_of(local: Any, examples: int) -> float:
    """Samples that a client visits in a round of the job's local training."""
    if local.steps is not None:
        return float(local.steps * min(local.batch_size, max(1, examples)))
    return float((local.epochs or 1) * examples)


@dataclass(frozen=True)
class Compute:
    """Seconds and bytes of one rank's work, with no other rank."""

    client: Mapping[str, Sequence[Line]]  # by phase and architecture, over `work_of`
    first: Mapping[str, Sequence[Line]]  # likewise, where a client takes part for the first time
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

    def client_seconds(self, phase: str, client: int, work: float, first: bool) -> float:
        """Of one client in one round of a phase."""
        lines = (self.first if first else self.client).get(phase, ())
        return lines[client % len(lines)].at(work) if lines else 0.0

    def times(self, factor: float) -> Compute:
        """The same on a machine that takes so many times as long."""

        def scaled(lines: Mapping[str, Sequence[Line]]) -> dict[str, list[Line]]:
            return {name: [line.times(factor) for line in several] for name, several in lines.items()}

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

        def lines(of: Mapping[str, Any]) -> dict[str, list[Line]]:
            return {str(name): [line(one) for one in several] for name, several in of.items()}

        return cls(
            client=lines(value["client"]),
            first=lines(value["first"]),
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
