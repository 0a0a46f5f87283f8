"""A run that goes on without ranks that died (`on_rank_death = "shrink"`).

The ranks that live make a new start within their processes: they regroup, build everything that depends on who is
there anew, by the code with which a run starts, and go on from the newest checkpoint, as after `--resume`. So what
they compute is what a run that was stopped and resumed on fewer ranks would: with `reduce = "ordered"` the same bits
as of a run in which nobody died. Rows and ledger entries of rounds after that checkpoint are forgotten with them;
what was sent in vain is kept beside (`Death`).
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpifed.comm.communicator import Communicator
from mpifed.engine import Engine
from mpifed.errors import BadInput, MpifedError
from mpifed.guard import named
from mpifed.job import Job

log = logging.getLogger("mpifed")


def check(job: Job, comm: Communicator) -> None:
    """Raise BadInput where the job wants to survive what this MPI does not."""
    if job.on_rank_death == "shrink" and not comm.survives:
        raise BadInput(
            "on_rank_death: 'shrink' needs Open MPI 5 or newer under mpirun --with-ft ulfm, and this is not "
            f"({comm.library()}); start it so, or set 'abort', which ends the run, to be resumed (docs/reliability.md)"
        )


@dataclass(frozen=True)
class Death:
    """Ranks that died together, or before the others had gone on; an entry of `deaths` in `summary.json`."""

    round: int  # in which it was noticed
    ranks: list[int]  # by the numbers that the launcher gave them
    hosts: list[str]
    clients: int  # that were theirs, and are the others' now
    left: int  # ranks
    back_to: int  # the round of the checkpoint from which it went on; 0: the beginning
    noticed: str  # when the first of the others did: UTC, ISO 8601
    regrouped_s: float  # from then until all of them were one communicator
    recovered_s: float  # from then until the next round could begin
    sent: int  # MPI bytes in vain, of the ranks that live
    received: int

    def __str__(self) -> str:
        where = ", ".join(dict.fromkeys(self.hosts))
        return (
            f"{named(self.ranks)} on {where} died, noticed in round {self.round}; {self.clients} clients go to the "
            f"{self.left} ranks that are left, all knew after {self.regrouped_s:.3f} s and go on after round "
            f"{self.back_to} after {self.recovered_s:.3f} s"
        )


class Survival:
    """What a run remembers from one start within its processes to the next."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.lost: list[int] = []
        """Ranks that have died since the run went on last, by the launcher's numbers."""
        self._hosted: dict[int, tuple[str, int]] = {}  # by those: host, number of clients
        self._engine: Engine | None = None
        self._resumed: int | None = None
        self._deaths: list[dict[str, Any]] = []
        self._rows: Sequence[Mapping[str, Any]] = []
        self._noticed = self._regrouped = 0.0
        self._round = 0
        self._vain = [0, 0]

    def regroup(self) -> None:
        """After `RanksDied`: the ranks that live are one communicator again, and the last start is forgotten.

        Raises MpifedError, the same on every rank, where there is nothing to go on with.
        """
        if not self.lost:
            self._noticed, self._vain = time.time(), [0, 0]
        for way, labels in enumerate(self._comm.traffic.take()):
            self._vain[way] += sum(labels.values())
        if self._engine is not None:
            self._round, self._rows, self._engine = self._engine.round + 1, self._engine.records.rows, None
        died = self._comm.regroup()
        self._regrouped = time.time()
        if not died:
            raise MpifedError("MPI reports a dead rank, but all are here; the job ends (--resume goes on)")
        if 0 in died:
            raise MpifedError("rank 0, the server, died; the job ends (--resume goes on, from the last checkpoint)")
        self.lost += died

    def go_on(self, engine: Engine) -> None:
        """Before the first round of every start, on all ranks: write down, and say, whom it goes on without."""
        comm, federation = self._comm, engine.federation
        if self._resumed is None:
            self._resumed, self._deaths = engine.records.resumed, engine.records.deaths
        if self.lost:
            said = comm.gather_json([self._noticed, self._regrouped, self._round, *self._vain])
            if said is not None:
                self._write_down(engine, said)
        engine.records.resumed, engine.records.deaths = self._resumed, self._deaths
        self.lost, self._engine = [], engine
        dealt = federation.roster.deal(range(federation.clients)).by_rank
        numbers = [len(mine) for mine in dealt]
        self._hosted = dict(zip(comm.launched, zip(federation.hosts, numbers, strict=True), strict=True))

    def _write_down(self, engine: Engine, said: Sequence[Sequence[float]]) -> None:
        noticed, regrouped, rounds, sent, received = zip(*said, strict=True)
        repeated = [row["bytes"]["mpi"] for row in self._rows if row["round"] > engine.round]
        first = min(noticed)
        death = Death(
            round=int(max(rounds)),
            ranks=sorted(self.lost),
            hosts=[self._hosted[rank][0] for rank in sorted(self.lost)],
            clients=sum(self._hosted[rank][1] for rank in self.lost),
            left=self._comm.size,
            back_to=engine.round,
            noticed=datetime.datetime.fromtimestamp(first, datetime.UTC).isoformat(),
            regrouped_s=max(regrouped) - first,
            recovered_s=time.time() - first,
            sent=int(sum(sent)) + sum(row["sent"] for row in repeated),
            received=int(sum(received)) + sum(row["received"] for row in repeated),
        )
        self._deaths.append(asdict(death))
        log.warning("%s", death)
