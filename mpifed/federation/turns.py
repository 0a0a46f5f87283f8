"""Turns: where more ranks of a node train than it has cores, each trains a client while it holds one of a few tokens.

Ten ranks on two cores would otherwise train ten models at once, and every few milliseconds one of them would find its
model, gradients and batch evicted from the caches by the others. In turns as many models are at work as there are
cores, and the others' ranks sleep. What a client computes does not change, only when.

The tokens are bytes in a pipe that all ranks of a node have open: to read one is to take a turn, to write it back ends
it, and who finds none sleeps in the kernel until there is one. (It is how `make` shares its jobs.) A rank that dies
takes its token along, and the job ends with it, or the others make a new pipe; nothing else is left, as the pipe has
lost its name before round 1. While a rank waits it is not the one that hangs: its watchdog pauses, as in an exchange.
"""

from __future__ import annotations

import heapq
import logging
import os
import secrets
import select
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from mpifed.comm.communicator import Communicator
from mpifed.federation.roster import Assignment

log = logging.getLogger("mpifed")

LOSS = 1.1
"""Turns are taken where they make the longest core at most so much busier than sharing all cores evenly would."""

LOOK_UP_S = 0.5
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

Timed = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Turns:
    """The turns of this rank's node; `Turns.none(comm)` where nobody has to wait."""

    comm: Communicator
    node: Sequence[int]  # ranks
    training: int  # ranks of the node that train
    cost: Callable[[int], float]  # of a client's training, in any unit
    tokens: int = 0
    pipe: int = -1  # its descriptor

    @classmethod
    def none(cls, comm: Communicator) -> Turns:
        """Every rank trains when it likes."""
        return cls(comm, (), 0, lambda client: 1.0)

    @classmethod
    def agree(
        cls,
        comm: Communicator,
        hosts: Sequence[str],
        training: Sequence[int],
        on_cores: bool,
        threads: int,
        cost: Callable[[int], float],
        folder: Path | None = None,
    ) -> Turns:
        """The turns of every node, all ranks together.

        A node has none where a rank trains elsewhere than on its cores, or where all that train fit on them. Nor has
        any node where a pipe cannot be shared, as between containers; that costs time alone, and one line says so.

        Args:
            hosts: by rank, the node.
            training: the ranks that train.
            on_cores: whether this rank trains on the CPU.
            threads: cores that a training rank uses.
            cost: of training a client, in any unit.
            folder: where the pipe is made; shared memory, where there is some.
        """
        known = comm.gather_json(sorted(usable_cores()) if on_cores else [])
        token = secrets.token_hex(16)  # a name that nobody else can have taken
        token, cores = comm.broadcast_json([token, known])
        node = [rank for rank, host in enumerate(hosts) if host == hosts[comm.rank]]
        usable = len({core for rank in node for core in cores[rank]})
        tokens = max(1, usable // threads)
        busy = sum(rank in training for rank in node)
        wanted = all(cores[rank] for rank in node) and busy > tokens
        path = (folder or _shared_memory()) / f"mpifed-turns-{token}-{node[0]}"
        pipe, problem = _open_together(comm, path, tokens if wanted else 0, first=comm.rank == node[0])
        turns = cls(comm, node, busy, cost, tokens, pipe) if wanted else cls.none(comm)
        if problem is not None:
            turns.close()
            if comm.rank == 0:
                log.info("the ranks of a node do not train in turns: %s", problem)
            return cls.none(comm)
        return turns

    def each(self, dealt: Assignment, waiting: Timed = nullcontext) -> Iterator[int]:
        """This rank's clients, each while the rank has a turn, until the next one is asked for.

        `waiting()` is entered while it waits.
        """
        clients = dealt.by_rank[self.comm.rank]
        loads = {rank: [self.cost(client) for client in dealt.by_rank[rank]] for rank in self.node}
        if not worthwhile(loads, self.tokens):
            yield from clients
            return
        for client in clients:
            with waiting():
                self.comm.waiting(True)
                token = self._take()
                self.comm.waiting(False)
            try:
                yield client
            finally:
                os.write(self.pipe, token)

    def _take(self) -> bytes:
        """A token; looking up from time to time whether a rank has died, and its token with it."""
        while True:
            with suppress(BlockingIOError):  # another rank was faster
                return os.read(self.pipe, 1)
            select.select([self.pipe], [], [], LOOK_UP_S)
            self.comm.check()

    def close(self) -> None:
        """Let go of the pipe."""
        if self.pipe >= 0:
            os.close(self.pipe)


def worthwhile(loads: Mapping[int, Sequence[float]], tokens: int) -> bool:
    """Whether a node's ranks, each with the costs of its clients in order, are better off with turns.

    Not where all of them fit on the cores, and not where turns would leave cores idle for long: three equal clients on
    two cores take two turns one after the other, where sharing the cores takes one and a half.
    """
    busy = {rank: costs for rank, costs in loads.items() if costs}
    if not tokens or len(busy) <= tokens:
        return False
    shared = max(sum(sum(costs) for costs in busy.values()) / tokens, *(sum(costs) for costs in busy.values()))
    return in_turns(list(busy.values()), tokens) <= LOSS * shared


def in_turns(loads: Sequence[Sequence[float]], tokens: int) -> float:
    """When the last rank is done, if whoever waits longest takes the token that is free first."""
    free = [0.0] * tokens
    waiting = [(0.0, number, 0) for number in range(len(loads))]  # since when, rank, its next client
    ended = 0.0
    while waiting:
        since, number, client = heapq.heappop(waiting)
        end = max(since, heapq.heappop(free)) + loads[number][client]
        heapq.heappush(free, end)
        ended = max(ended, end)
        if client + 1 < len(loads[number]):
            heapq.heappush(waiting, (end, number, client + 1))
    return ended


# --- the node --------------------------------------------------------------------------------------------------------
def usable_cores() -> set[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _shared_memory() -> Path:
    """Where a node's ranks can share files."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _open_together(comm: Communicator, path: Path, tokens: int, first: bool) -> tuple[int, str | None]:
    """The descriptor of a pipe that holds `tokens` (-1 and no pipe where there are none), and what spoke against it on
    any rank.

    The node's first rank makes it, for its user alone; when all have opened it, it loses its name.
    """
    pipe = -1

    def make() -> None:
        nonlocal pipe
        if first and tokens:
            os.mkfifo(path, 0o600)
            pipe = os.open(path, _FLAGS)
            os.write(pipe, bytes(tokens))

    def join() -> None:
        nonlocal pipe
        if not first and tokens:
            pipe = os.open(path, _FLAGS)

    problem = _all_can(comm, make) or _all_can(comm, join)
    if first and tokens:
        with suppress(OSError):
            path.unlink()
    return pipe, problem


def _all_can(comm: Communicator, act: Callable[[], None]) -> str | None:
    """`act()` on every rank; the first rank's trouble with the file system, known to all."""
    try:
        act()
    except OSError as error:
        return comm.agree(str(error))
    return comm.agree(None)
