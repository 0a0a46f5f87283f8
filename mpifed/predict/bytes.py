"""The bytes of a run before it runs: the collectives of every exchange, and what each rank hands to them.

Exact where the declarations decide sizes: what is counted here is what the run's ledger will hold, to the byte, if
every client answers. Where a codec's sizes depend on the values (SVD by its energy), or only the clients know a length,
there are a least and a most. Of what mpifed itself says, the ranks' reports of a round are text and not foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mpifed.algorithms.base import Each, Field
from mpifed.comm.collection import by_route, exact_slice, gathered_slice, sums_are_gathered, sums_exactly, ways
from mpifed.comm.communicator import CONTROL
from mpifed.comm.ledger import label, unlabel
from mpifed.comm.routes import Route, Tree, tree_of
from mpifed.federation.federation import Federation
from mpifed.federation.plan import Step, steps
from mpifed.federation.roster import Assignment

Operation = Literal["broadcast", "scatter", "gather", "reduce", "sum"]
OfRanks: TypeAlias = npt.NDArray[np.int64]
"""A number of each rank, `[ranks]`."""

REPORT_WISHES = 2
"""Numbers that travel with the lengths of the ranks' reports: is a stop asked for, is a checkpoint due."""


# --- collectives ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Call:
    """A collective, or `pieces` of them in a row, and the bytes of the buffers that each rank hands to it by label."""

    operation: Operation
    sent: Mapping[str, OfRanks]
    received: Mapping[str, OfRanks]
    pieces: int = 1
    route: Route = "library"


@dataclass(frozen=True)
class Exchange:
    """A step of the run with who is where: its collectives, in order, with the least bytes and with the most."""

    step: Step
    dealt: Assignment
    clients: OfRanks  # that each rank trains
    least: Sequence[Call]
    most: Sequence[Call]
    unbounded: frozenset[tuple[str, str]]  # direction and kind of what may be more than `most`


class Planner:
    """The exchanges of a federation on its ranks; what is the same in many rounds is worked out once."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.ranks = federation.comm.size
        self._dealt: dict[tuple[int, ...], Assignment] = {}
        self._calls: dict[object, tuple[Sequence[Call], Sequence[Call]]] = {}

    def exchanges(self, rounds: Sequence[int] | None = None) -> Iterator[Exchange]:
        """Of these rounds, of all for None."""
        for step in steps(self.federation, rounds):
            dealt = self._deal(step)
            clients = np.array([len(mine) for mine in dealt.by_rank], np.int64)
            unbounded = frozenset(key for key, size in step.sizes.items() if size.most is None)
            key = step.phase.name, tuple(step.sizes.items()), clients.tobytes()
            if key not in self._calls:
                exact = all(size.exact for size in step.sizes.values())
                least = self._of_step(step, clients, lambda direction, name: step.sizes[direction, name].least)  # noqa: B023
                most = least if exact else self._of_step(step, clients, lambda *of: _most(step, *of))  # noqa: B023
                self._calls[key] = least, most
            yield Exchange(step, dealt, clients, *self._calls[key], unbounded)

    def _deal(self, step: Step) -> Assignment:
        """An assignment of everybody is kept, as all rounds share it."""
        asked = tuple(step.asked)
        if len(asked) < step.everybody:
            return self.federation.roster.deal(asked)
        if asked not in self._dealt:
            self._dealt[asked] = self.federation.roster.deal(asked)
        return self._dealt[asked]

    def usual_clients(self) -> OfRanks:
        """Clients of each rank when all are asked."""
        everybody = tuple(range(self.federation.clients))
        if everybody not in self._dealt:
            self._dealt[everybody] = self.federation.roster.deal(everybody)
        return np.array([len(mine) for mine in self._dealt[everybody].by_rank], np.int64)

    # --- what `mpifed.comm.exchange` does -----------------------------------------------------------------------------
    def _of_step(self, step: Step, clients: OfRanks, size: Callable[[str, str], int]) -> Sequence[Call]:
        return [*self._download(step, clients, size), self._announcement(step), *self._upload(step, clients, size)]

    def _download(self, step: Step, clients: OfRanks, size: Callable[[str, str], int]) -> Iterator[Call]:
        shared = [name for name, declared in step.down.items() if declared.to != "each"]
        own = [name for name, declared in step.down.items() if declared.to == "each"]
        if not all(step.sizes["down", name].exact for name in step.down):
            yield self._broadcast({CONTROL: 16 * (len(shared) + len(own) * len(step.asked))})
        down = partial(self.federation.route, "down")
        for route, names in by_route(shared, down).items():
            yield self._broadcast({label(step.phase.name, "down", name): size("down", name) for name in names}, route)
        for route, names in by_route(own, down).items():
            mine = {label(step.phase.name, "down", name): size("down", name) * clients for name in names}
            sent, received = self._parts(mine, route)
            yield Call("scatter", received, sent, route=route)  # a gather the other way round

    def _announcement(self, step: Step) -> Call:
        exact = sum(self._is_exact(step, name) for name in step.up)
        columns = 2 + 2 * len(step.up) + exact
        return self._sum(len(step.asked) * columns)

    def _upload(self, step: Step, clients: OfRanks, size: Callable[[str, str], int]) -> Iterator[Call]:
        def kind(name: str) -> str:
            return label(step.phase.name, "up", name)

        def gather(names: Sequence[str], pieces: int, route: Route) -> Call:
            return Call("gather", *self._parts({kind(n): size("up", n) * clients for n in names}, route), pieces, route)

        plain = {name: self.federation.codec("up", name).plain for name in step.up}
        exact = {name: self._is_exact(step, name) for name in step.up}
        found = ways(step.up, self.federation.job.reduce, exact.__getitem__, plain.__getitem__)
        up = partial(self.federation.route, "up")
        for route, names in by_route(found.whole, up).items():
            yield gather(names, 1, route)
        gives = clients > 0
        givers = int(gives.sum())
        for name in found.exact:
            elements, route = declared_elements(step.up[name]), up(name)
            gathered = sums_are_gathered(givers, route)
            pieces = -(-elements // exact_slice(givers if gathered else 1))
            if gathered:
                yield Call("gather", *self._parts({kind(name): 8 * elements * gives}, route), pieces)
            else:
                yield self._reduce({kind(name): 8 * elements}, pieces, route, gives)
        for route, names in by_route(found.sliced, up).items():
            row = sum(size("up", name) for name in names)
            yield gather(names, max(1, -(-row // gathered_slice(len(step.asked)))), route)
        for reduced, width in ((found.single, 4), (found.double, 8)):
            for route, names in by_route(reduced, up).items():
                kinds = {kind(name): width * declared_elements(step.up[name]) for name in names}
                yield self._reduce(kinds, 1, route, np.ones(self.ranks, bool))

    def _is_exact(self, step: Step, name: str) -> bool:
        return sums_exactly(step.up[name], self.federation.job.reduce, self.federation.codec("up", name).plain)

    def adds_on_ranks(self, step: Step, name: str) -> bool:
        """Whether each rank adds its own clients' before anything is sent, so that one vector a rank is collected."""
        tree = self.federation.job.reduce == "tree" and not isinstance(step.up[name].reduce, Each)
        return tree or self._is_exact(step, name)

    def sums_at_root(self, exchange: Exchange, name: str) -> int:
        """How many ranks' exact sums rank 0 adds itself."""
        givers = int((exchange.clients > 0).sum())
        gathered = sums_are_gathered(givers, self.federation.route("up", name))
        return givers if gathered and self._is_exact(exchange.step, name) else 0

    def is_gathered_in_slices(self, step: Step, name: str) -> bool:
        """Whether replies are gathered slice by slice, and added by rank 0 without all of them being there at once."""
        rule, plain = step.up[name].reduce, self.federation.codec("up", name).plain
        return plain and not isinstance(rule, Each) and not self.adds_on_ranks(step, name)

    def report(self, lengths: int) -> Sequence[Call]:
        """The end of a round: the lengths of the reports with the wishes, and then reports of that many bytes each."""
        every = np.full(self.ranks, lengths, np.int64)
        gathered = Call("gather", {CONTROL: every}, {CONTROL: self._at_root(int(every.sum()))})
        return [self._sum(self.ranks + REPORT_WISHES), gathered]

    # --- who hands over what ------------------------------------------------------------------------------------------
    def _at_root(self, size: int) -> OfRanks:
        of_ranks = np.zeros(self.ranks, np.int64)
        of_ranks[0] = size
        return of_ranks

    def _at_others(self, size: int) -> OfRanks:
        of_ranks = np.full(self.ranks, size, np.int64)
        of_ranks[0] = 0
        return of_ranks

    def _tree(self, route: Route, parts: bool = False) -> Tree:
        return tree_of(route, self.federation.comm.nodes, parts)

    def _broadcast(self, kinds: Mapping[str, int], route: Route = "library") -> Call:
        copies = self._at_root(1)
        if route != "library":
            copies = np.array([len(children) for children in self._tree(route).children], np.int64)
        received = {kind: self._at_others(size) for kind, size in kinds.items()}
        return Call("broadcast", {kind: size * copies for kind, size in kinds.items()}, received, route=route)

    def _parts(self, kinds: Mapping[str, OfRanks], route: Route) -> tuple[dict[str, OfRanks], dict[str, OfRanks]]:
        """Sent and received by each rank where rank 0 gathers what is every rank's own."""
        if route == "library":
            return dict(kinds), {kind: self._at_root(int(own.sum())) for kind, own in kinds.items()}
        below = self._tree(route, parts=True).below
        received = {
            kind: np.array([own[list(others)].sum() for others in below], np.int64) for kind, own in kinds.items()
        }
        return {kind: (own + received[kind]) * self._at_others(1) for kind, own in kinds.items()}, received

    def _reduce(self, kinds: Mapping[str, int], pieces: int, route: Route, gives: npt.NDArray[np.bool_]) -> Call:
        sends, hears = np.ones(self.ranks, np.int64), self._at_root(1)
        if route != "library":
            tree = self._tree(route)
            active = np.array([any(gives[[rank, *below]]) for rank, below in enumerate(tree.below)], np.int64)
            sends = active * self._at_others(1)
            hears = np.array([active[list(children)].sum() for children in tree.children], np.int64)
        sent, received = ({kind: size * of for kind, size in kinds.items()} for of in (sends, hears))
        return Call("reduce", sent, received, pieces, route)

    def _sum(self, numbers: int) -> Call:
        every = {CONTROL: np.full(self.ranks, 8 * numbers, np.int64)}
        return Call("sum", every, every)


def _most(step: Step, direction: str, name: str) -> int:
    size = step.sizes[direction, name]
    return size.least if size.most is None else size.most


def declared_elements(declared: Field) -> int:
    """Elements of a field; 0 where only the clients know."""
    return math.prod(length or 0 for length in declared.shape)


# --- ledger -----------------------------------------------------------------------------------------------------------
class Amount(NamedTuple):
    """Bytes: logical, and handed to MPI to send and to fill; numbers, or arrays `[ranks]`."""

    logical: int = 0
    sent: int = 0
    received: int = 0

    def plus(self, other: Amount) -> Amount:
        return Amount(*(mine + its for mine, its in zip(self, other, strict=True)))


def amounts(
    exchange: Exchange, usual: OfRanks, most: bool = False
) -> dict[tuple[str, str, str], tuple[OfRanks, OfRanks, OfRanks]]:
    """By phase, direction and kind: logical bytes, sent and filled, each `[ranks]`, of one exchange, as in the ledger.

    `usual` are the clients of each rank when all are asked: bytes to an absent client stand there.
    """
    step, name = exchange.step, exchange.step.phase.name
    none = np.zeros(len(usual), np.int64)
    found: dict[tuple[str, str, str], list[OfRanks]] = {}
    for direction, kind, size, clients in step.logical():
        of_ranks = exchange.clients if clients == len(step.asked) else usual
        each = size.most if most and size.most is not None else size.least
        found[name, direction, kind] = [each * of_ranks, none, none]
    for call in exchange.most if most else exchange.least:
        for column, kinds in ((1, call.sent), (2, call.received)):
            for text, of_ranks in kinds.items():
                entry = found.setdefault(unlabel(text), [none, none, none])
                entry[column] = entry[column] + of_ranks
    return {key: (entry[0], entry[1], entry[2]) for key, entry in found.items()}


@dataclass
class Bytes:
    """The bytes of some rounds by direction ("down", "up", "control") and kind; `most` is None where nothing bounds."""

    least: dict[tuple[str, str], Amount] = field(default_factory=dict)
    most: dict[tuple[str, str], Amount | None] = field(default_factory=dict)

    def add(self, exchange: Exchange, usual: OfRanks) -> None:
        """The bytes of one exchange."""
        least, most = (amounts(exchange, usual, which) for which in (False, True))
        for (phase, direction, kind), of_ranks in least.items():
            more = most[phase, direction, kind]
            bounded = (direction, kind) not in exchange.unbounded
            self._plus((direction, kind), _total(of_ranks), _total(more) if bounded else None)

    def add_calls(self, calls: Iterable[Call]) -> None:
        """The bytes of mpifed's own messages."""
        for call in calls:
            of_all = Amount(0, *(int(sum(part.sum() for part in way.values())) for way in (call.sent, call.received)))
            self._plus(("control", CONTROL), of_all, of_all)

    def _plus(self, key: tuple[str, str], least: Amount, most: Amount | None) -> None:
        before = self.most.get(key, Amount())
        self.least[key] = self.least.get(key, Amount()).plus(least)
        self.most[key] = None if before is None or most is None else before.plus(most)

    def total(self, direction: str | None = None) -> tuple[Amount, Amount | None]:
        """Least and most of a direction, or of all."""
        least, most = Amount(), Amount()
        bounded = True
        for key, amount in self.least.items():
            if direction in (None, key[0]):
                least = least.plus(amount)
                above = self.most[key]
                bounded = bounded and above is not None
                most = most.plus(above or Amount())
        return least, most if bounded else None


def _total(of_ranks: Sequence[OfRanks]) -> Amount:
    return Amount(*(int(part.sum()) for part in of_ranks))
