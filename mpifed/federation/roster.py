"""Who takes part in a round, and which rank trains whom: the same on every rank without a word between them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from mpifed.rng import numpy_generator

Sampling = Literal["uniform", "examples", "bernoulli"]


@dataclass(frozen=True)
class Assignment:
    """The clients of a phase by rank; ids ascend in `clients` and within each rank."""

    by_rank: tuple[tuple[int, ...], ...]

    @cached_property
    def clients(self) -> tuple[int, ...]:
        return tuple(sorted(client for clients in self.by_rank for client in clients))

    @cached_property
    def rank_of(self) -> dict[int, int]:
        return {client: rank for rank, clients in enumerate(self.by_rank) for client in clients}


def participants(participation: float | int, clients: int) -> int:
    """How many clients a round asks for: a count, or a fraction of all (at least one), rounded half up."""
    if isinstance(participation, int):
        return participation
    return max(1, int(participation * clients + 0.5))


class Roster:
    """Samples the clients of each round from the seed and deals them to the ranks.

    Rank 0 trains only when it is alone. `examples` (samples per client) is the cost by which clients are dealt, the
    largest first, each to the rank with the least so far. Where clients keep a state they are dealt once and for all,
    to the rank that keeps it; otherwise every round is dealt anew, so that no rank waits for another's many clients.
    """

    def __init__(
        self,
        seed: int,
        ranks: int,
        examples: Sequence[int],
        participation: float | int,
        sampling: Sampling,
        stateful: bool,
    ) -> None:
        self.examples = tuple(examples)
        self.clients = len(self.examples)
        self.ranks = ranks
        self._seed = seed
        self._participation = participation
        self._sampling = sampling
        self._home = self._deal(range(self.clients)) if stateful else None

    @property
    def fixed(self) -> bool:
        """A client is always trained by the same rank."""
        return self._home is not None or self._everybody

    @property
    def _everybody(self) -> bool:
        """Every client takes part in every round."""
        if self._sampling == "bernoulli":
            return self._probability >= 1.0
        return participants(self._participation, self.clients) >= self.clients

    @property
    def _probability(self) -> float:
        """With which a client comes where each is drawn by itself."""
        share = self._participation
        return share / self.clients if isinstance(share, int) else share

    @property
    def hosts(self) -> Sequence[int]:
        """The ranks that train clients."""
        return range(1, self.ranks) if self.ranks > 1 else (0,)

    def sample(self, round_: int) -> tuple[int, ...]:
        """Ids of the clients of this round, ascending."""
        if self._everybody:
            return tuple(range(self.clients))
        count = participants(self._participation, self.clients)
        random = numpy_generator(self._seed, "participation", round_)
        if self._sampling == "bernoulli":  # every client by itself, drawn again while nobody comes
            chosen = np.flatnonzero(random.random(self.clients) < self._probability)
            while chosen.size == 0:
                chosen = np.flatnonzero(random.random(self.clients) < self._probability)
        elif self._sampling == "examples":
            share = np.array(self.examples, np.float64) / sum(self.examples)
            chosen = random.choice(self.clients, count, replace=False, p=share)
        else:
            chosen = random.choice(self.clients, count, replace=False)
        return tuple(sorted(int(client) for client in chosen))

    def deal(self, clients: Iterable[int]) -> Assignment:
        """Which rank trains which of these clients."""
        if self._home is None:
            return self._deal(clients)
        asked = set(clients)
        return Assignment(tuple(tuple(c for c in home if c in asked) for home in self._home.by_rank))

    @property
    def usual_rank(self) -> Mapping[int, int]:
        """Client -> the rank that trains it when all are asked."""
        return self.deal(range(self.clients)).rank_of

    def _deal(self, clients: Iterable[int]) -> Assignment:
        load = [(0, rank) for rank in self.hosts]
        dealt: list[list[int]] = [[] for _ in range(self.ranks)]
        for client in sorted(clients, key=lambda c: (-self.examples[c], c)):
            cost, rank = heapq.heappop(load)
            dealt[rank].append(client)
            heapq.heappush(load, (cost + self.examples[client], rank))
        return Assignment(tuple(tuple(sorted(mine)) for mine in dealt))
