"""The round loop.

A round: sample the clients from the seed; for each phase, the server's download, one broadcast, every rank's clients
in the order of their ids, the announcement of the replies, their collection, the server's step; then the ledger, the
agreement to go on, and the checkpoint if one is due. Every rank issues the same collectives whatever happens to a
client. While clients train, rank 0 evaluates the model that it has just sent, which is the last round's result: so a
round's metrics are complete in the next round or, the last one's, at the end.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from mpifed.algorithms.base import Absent, Ensemble, Phase, Reply
from mpifed.comm.collection import Outgoing, Sizes
from mpifed.comm.communicator import CONTROL, Communicator
from mpifed.comm.exchange import Exchange
from mpifed.comm.summation import peak
from mpifed.comm.wire.meter import Meter, choose
from mpifed.errors import TooFewReplies
from mpifed.failpoints import reach
from mpifed.federation.env import Context
from mpifed.federation.federation import Federation, Tests
from mpifed.federation.roster import Assignment
from mpifed.federation.store import ClientStore
from mpifed.federation.turns import Turns
from mpifed.guard import Deadline, StopSignal
from mpifed.learning.evaluate import Evaluation, evaluate
from mpifed.records import Records, Report
from mpifed.rng import derive
from mpifed.storage.checkpoint import Checkpoints, Found
from mpifed.types import Payload, State, leaves, map_state

log = logging.getLogger("mpifed")

DOWN_MEMORY = "codec.down"
"""Where a checkpoint's server state has what the codecs of downloads remember."""


class Clock:
    """Seconds by activity, since the last `take`; an activity within another counts for itself alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._within = 0.0

    @contextmanager
    def time(self, activity: str) -> Iterator[None]:
        started, outside = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self._seconds[activity] = self._seconds.get(activity, 0.0) + passed - self._within
            self._within = outside + passed

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return taken


class InputChanged(Exception):
    """An algorithm's client wrote into its download or its state."""


class Engine:
    """Runs a federation's rounds on this rank; at rank 0 it calls `row_done(row)` for every completed metrics row."""

    def __init__(
        self,
        federation: Federation,
        checkpoints: Checkpoints,
        store: ClientStore,
        stop: StopSignal | None = None,
        turns: Turns | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self.federation = federation
        self.job = federation.job
        self.comm: Communicator = federation.comm
        self.algorithm = federation.algorithm
        self.phases = self.algorithm.phases(federation.env)
        self.exchange = Exchange(self.comm, federation.codec, self.job.reduce, federation.env.device, federation.route)
        self.store = store  # client id -> {"state": ..., "codec": {field: memory}}
        self.checkpoints = checkpoints
        self.server: State | None = None  # at rank 0
        self.records = Records()
        self.wire = Meter(self.comm)
        self.round = 0  # rounds done
        self._stop = stop or StopSignal()
        self._deadline = deadline or Deadline()
        self.turns = turns or Turns.none(self.comm)
        self.row_done: Callable[[dict[str, Any]], None] = lambda row: None
        self._open: dict[str, Any] | None = None  # the last round's row, until it is evaluated
        self._clock = Clock()
        self._last_checkpoint = time.monotonic()

    # --- beginning ----------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """The state before round 1."""
        if self.comm.rank == 0:
            self.server = self.algorithm.server_init(self.federation.env)

    def restore(self, found: Found) -> None:
        """The state of a checkpoint, its clients dealt to the ranks that are here now."""
        reach("resume.found", found.round, self.comm.rank)
        self.round = found.round
        if self.comm.rank == 0:
            kept = found.server()
            self.exchange.memory = kept.pop(DOWN_MEMORY, {})
            self.server = self._on_device(kept)
            self.records = Records.resume(found.records)
            self._open = self.records.rows[-1] if self.records.rows and "open" in self.records.rows[-1] else None
        for client in self.federation.roster.deal(range(self.federation.clients)).by_rank[self.comm.rank]:
            if client in found.clients:
                self.store.put(client, found.client(client))
        reach("resume.loaded", found.round, self.comm.rank)

    # --- the loop -----------------------------------------------------------------------------------------------------
    def run(self) -> bool:
        """All rounds that are left. False where a signal or the deadline stopped the run early, after a checkpoint."""
        self.federation.settle()
        self.wire = choose(self.comm, self.job.measure_wire, self.federation.hosts)
        if self.comm.rank == 0 and self.wire.source is None and self.job.measure_wire not in ("auto", "off"):
            log.warning("measure_wire: wire bytes are not measured: %s", self.wire.reason)
        self.comm.moved = self.wire.moved
        self.comm.traffic.take()  # what was said before round 1 belongs to no round
        self._clock.take()
        while self.round < self.job.rounds:
            began = time.perf_counter()
            stopped = self._run_round(self.round + 1)
            self._deadline.round_took(time.perf_counter() - began)
            if stopped and self.round < self.job.rounds:
                return False
        self._close_row(self.federation.env)
        return True

    def _run_round(self, round_: int) -> bool:
        began = time.perf_counter()
        self.wire.skip()
        reach("round.start", round_, self.comm.rank)
        sampled = self.federation.roster.sample(round_)
        logged: dict[int, dict[str, float]] = {}
        absent: dict[int, str] = {}
        exchanged: list[tuple[str, Sizes, Assignment]] = []
        replies = len(sampled)
        own = [0, 0]  # right answers and samples of the clients' own tests
        steps = [phase for phase in self.phases if phase.rounds(round_) for _ in range(phase.repeat)]
        for number, phase in enumerate(steps, start=1):
            asked = sampled if phase.clients == "round" else range(self.federation.clients)
            dealt = self.federation.roster.deal(asked)
            last = number == len(steps)
            sizes, answered = self._run_phase(phase, round_, dealt, logged, absent, own, number, last)
            exchanged.append((phase.name, sizes, dealt))
            replies = min(replies, answered)
        reach("round.end", round_, self.comm.rank)

        seconds = self.job.checkpoint.every_seconds
        wanted = self.comm.rank == 0 and 0 < seconds <= time.monotonic() - self._last_checkpoint
        leaving = self._stop.asked or self._too_late(round_, time.perf_counter() - began)
        asked_for = [float(leaving), float(wanted)]
        stop, timed = self._record(
            round_, logged, absent, own, exchanged, len(sampled), replies, began, asked_for=asked_for
        )
        self.round = round_
        if stop or timed or self.job.saves_after(round_):
            self._checkpoint()
        if self._open is not None and not self._open["open"]:
            self._finish_row()
        return bool(stop)

    def _too_late(self, round_: int, seconds: float) -> bool:
        """Whether there may be no time for another round after this one; by rank 0's clock."""
        if self.comm.rank != 0 or round_ == self.job.rounds or not self._deadline.near(seconds):
            return False
        left = self._deadline.at - time.time()
        log.info("%.0f s are left, which may not be enough for another round: leaving after round %d", left, round_)
        return True

    # --- one phase ----------------------------------------------------------------------------------------------------
    def _run_phase(
        self,
        phase: Phase,
        round_: int,
        dealt: Assignment,
        logged: dict[int, dict[str, float]],
        absent: dict[int, str],
        own_tests: list[int],
        number: int,
        last: bool,
    ) -> tuple[Sizes, int]:
        """The round's exchange `number` (from 1); returns its logical bytes and how many clients answered."""
        rank, first = self.comm.rank, number == 1
        down_fields, up_fields = phase.down(round_), phase.up(round_)
        progress, seed = round_ / self.job.rounds, derive(self.job.seed, "codec", round_, number)
        with self._clock.time("communicate"):
            payload = None if self.server is None else phase.download(self.server, round_)
            shared, own, sizes = self.exchange.download(
                phase.name, down_fields, payload, dealt, self.federation.clients, progress, seed
            )
            if self.server is not None:
                self.server = self.algorithm.sent(self.server, shared, round_)
        reach("round.after_download", round_, rank)
        if first and self.server is not None:
            self._close_row(self.federation.env)
        if first and self.job.evaluate.own and self.job.tests_after(round_):
            with self._clock.time("evaluate"):
                self._test_own(shared, own, own_tests)

        outgoing: dict[int, Outgoing] = {}
        staged: dict[int, State] = {}
        said: dict[int, str] = {}
        numbers: dict[int, dict[str, float]] = {}
        with self._clock.time("train"):
            for client in self.turns.each(dealt, partial(self._clock.time, "wait")):
                kept = self.store.get(client) or {}
                reach("client.before", round_, rank)
                try:
                    before, down = self._state_of(client, kept), shared | own[client]
                    state, answer, numbers[client] = self._ask(phase, round_, client, before, down, last)
                    if isinstance(answer, Reply):
                        memory = kept.get("codec", {})
                        reply = self.exchange.encode(up_fields, answer, memory, progress, derive(seed, client))
                        if self.exchange.lossy(up_fields):
                            sent = self.exchange.decoded(up_fields, reply)
                            state = self.algorithm.acknowledged(before, state, down, sent)
                        outgoing[client], memory = reply, reply.memory
                    else:
                        said[client], memory = answer.reason, kept.get("codec", {})
                    staged[client] = {"state": self._on_host(state)} | ({"codec": memory} if memory else {})
                except InputChanged:  # which the next client, or the next round, is given
                    raise
                except Exception as error:  # a bad client costs its own reply
                    said[client] = f"{type(error).__name__}: {error}"
                    where = f"client {client} on rank {rank} in round {round_}, phase {phase.name}"
                    log.warning("%s did not answer: %s\n%s", where, said[client], traceback.format_exc())
                reach("client.after", round_, rank)

        reach("round.before_upload", round_, rank)
        with self._clock.time("wait"):
            known = self.exchange.announce(up_fields, outgoing, dealt)
        if len(known.clients) < self.job.min_replies:
            raise TooFewReplies(self._too_few(phase, round_, len(known.clients), said))
        with self._clock.time("communicate"):
            uploads = self.exchange.collect(phase.name, up_fields, outgoing, known, dealt)
        reach("round.after_upload", round_, rank)
        for client, record in staged.items():
            if record["state"] or "codec" in record:
                self.store.put(client, record)
            if client in known.weights:
                logged.setdefault(client, {}).update(numbers[client])
        absent.update(said)
        if uploads is not None and self.server is not None:
            reach("server.before", round_, rank)
            with self._clock.time("server"):
                self.server = phase.server(self.server, uploads, round_)
            reach("server.after", round_, rank)
        return {**sizes, **known.logical}, len(known.clients)

    def _state_of(self, client: int, kept: State) -> State:
        """A client's state on the device: the kept one, or its first."""
        if "state" in kept:
            return self._on_device(kept["state"])
        return self._on_device(self.algorithm.client_init(self.federation.env, client))

    def _ask(
        self, phase: Phase, round_: int, client: int, state: State, down: Payload, last: bool
    ) -> tuple[State, Reply | Absent, dict[str, float]]:
        """A client's part in a phase: next state, answer, and the numbers that it logged."""
        federation, env = self.federation, self.federation.env
        tests = self.algorithm.evaluates != "server"
        samples, mean = partial(federation.samples, client), federation.mean_examples
        test = self._evaluate if tests else None
        ctx = Context(env, client, round_, phase.name, samples, mean, self.job.local, test)
        given = [*down.items(), *leaves(state)]
        versions = [tensor._version for _, tensor in given]
        before = state
        state, answer = phase.client(state, down, ctx)
        changed = [name for (name, tensor), version in zip(given, versions, strict=True) if tensor._version != version]
        if changed:
            raise InputChanged(f"client {client} changed '{changed[0]}' in place; make a new tensor of it")
        if state and not federation.roster.fixed:
            raise TypeError(f"{type(self.algorithm).__name__} keeps client states, but does not say `stateful = True`")
        state = map_state(ctx.owned, state)
        if (broken := _diverged(state)) and not _diverged(before):
            raise ValueError(f"non-finite '{broken}' in the new state")
        if isinstance(answer, Reply):
            answer = Reply({name: ctx.owned(tensor) for name, tensor in answer.upload.items()}, answer.weight)
        if tests and last and self.job.tests_after(round_):
            with self._clock.time("evaluate"):
                ctx.logged.update(self._evaluate(self.algorithm.client_predictor(state, env, client), client))
        return state, answer, ctx.logged

    def _too_few(self, phase: Phase, round_: int, replies: int, said: Mapping[int, str]) -> str:
        """The sentence about it, with the reasons of all ranks, the same on every rank."""
        everyone = self.comm.gather_json(said)
        reasons = {client: why for part in everyone or [] for client, why in part.items()}
        listed = "; ".join(f"client {client}: {reasons[client]}" for client in sorted(reasons, key=int)[:5])
        return str(
            self.comm.broadcast_json(
                f"round {round_}, phase {phase.name}: {replies} usable replies, min_replies is {self.job.min_replies}"
                + (f" ({listed})" if listed else "")
            )
        )

    # --- evaluation ---------------------------------------------------------------------------------------------------
    def _evaluate(self, model: tuple[Tensor, Tensor] | Ensemble, client: int | None = None) -> dict[str, float]:
        tested = self._test(model, self.federation.test_set, client)
        return {"accuracy": tested.accuracy, "loss": tested.loss}

    def _test(self, model: tuple[Tensor, Tensor] | Ensemble, samples: Tests, client: int | None) -> Evaluation:
        env = self.federation.env
        members, weights = (model.members, model.weights) if isinstance(model, Ensemble) else ((model,), ())
        size, standardise = self.job.evaluate.batch_size, env.spec.standardise
        return evaluate(env.model(client), *samples, size, standardise=standardise, members=members, weights=weights)

    def _test_own(self, shared: Payload, own: Mapping[int, Payload], counts: list[int]) -> None:
        """Test what each client hosted here would use now on its own test samples; adds to right answers and samples.

        An absent client is tested with what all are sent: nothing crosses the network for it, so nothing is counted.
        """
        for client, samples in self.federation.own_tests().items():
            if len(samples[1]) == 0:
                continue
            state = self._state_of(client, self.store.get(client) or {})
            down = shared | own.get(client, {})
            tested = self._test(self.algorithm.received(state, down, self.federation.env, client), samples, client)
            counts[0] += tested.correct
            counts[1] += tested.examples

    # --- records ------------------------------------------------------------------------------------------------------
    def _record(
        self,
        round_: int,
        logged: dict[int, dict[str, float]],
        absent: dict[int, str],
        own_tests: list[int],
        exchanged: list[tuple[str, Sizes, Assignment]],
        sampled: int,
        replies: int,
        began: float,
        asked_for: list[float],
    ) -> list[bool]:
        """Bring every rank's numbers of the round to rank 0, which writes them down; returns whether some rank
        `asked_for` what, in the same message."""
        own = Report(logged, absent, own_tests, *self.comm.traffic.take(), self._clock.take())
        with self._clock.time("wait"):  # for the server's step; in the next round's report
            parts, wishes = self.comm.gather_bytes_and_sum(own.to_bytes(), asked_for)
        agreed = [wish > 0 for wish in wishes]
        _, own_received = self.comm.traffic.take()  # of this message itself, which no rank could count in it
        wire = self.wire.collect()
        self.comm.traffic.take()  # what is said about wire bytes is part of no round
        if parts is None:
            return agreed
        reports = [Report.from_bytes(part) for part in parts]
        for rank, (part, report) in enumerate(zip(parts, reports, strict=True)):
            lengths = 8 * (self.comm.size + len(asked_for))
            _add(report.sent, {CONTROL: lengths + len(part)})
            _add(report.received, own_received if rank == 0 else {CONTROL: lengths})
        self._open = self.records.add_round(
            round_,
            reports,
            exchanged,
            self._usual_rank,
            sampled,
            replies,
            seconds=time.perf_counter() - began,
            tested_later=self.algorithm.evaluates != "clients" and self.job.tests_after(round_),
            wire=wire,
            wire_source=self.wire.name,
        )
        return agreed

    @cached_property
    def _usual_rank(self) -> Mapping[int, int]:
        return self.federation.roster.usual_rank

    def _close_row(self, env: Any) -> None:
        """Evaluate the server's model for the last round's row, if that is still open, and hand the row on."""
        if self._open is None or self.server is None:
            return
        if self._open["open"]:
            with self._clock.time("evaluate"):
                started = time.perf_counter()
                prefix = "server_" if self.algorithm.evaluates == "both" else ""
                tested = self._evaluate(self.algorithm.predictor(self.server, env))
                self._open.update({prefix + name: value for name, value in tested.items()})
                self._open["seconds"]["evaluate"] += time.perf_counter() - started
        self._finish_row()

    def _finish_row(self) -> None:
        row, self._open = self._open, None
        assert row is not None
        del row["open"]
        self.row_done(row)

    # --- checkpoint ---------------------------------------------------------------------------------------------------
    def _checkpoint(self) -> None:
        started = time.perf_counter()
        server = None if self.server is None else self._on_host(self.server)
        if server is not None and self.exchange.memory:
            server = server | {DOWN_MEMORY: self.exchange.memory}
        records = self.records.to_bytes() if self.comm.rank == 0 else {}
        self.checkpoints.save(self.round, server, self.store.items(), records)
        self.comm.traffic.take()  # a checkpoint's agreement is part of no round
        self._last_checkpoint = time.monotonic()
        seconds = time.perf_counter() - started
        self._deadline.checkpoint_took(seconds)
        if self._open is not None:
            self._open["seconds"]["checkpoint"] = seconds

    def _on_device(self, state: State) -> State:
        return map_state(lambda tensor: tensor.to(self.federation.env.device), state)

    def _on_host(self, state: State) -> State:
        return map_state(lambda tensor: tensor.detach().cpu(), state)


def _add(totals: dict[str, int], more: Mapping[str, int]) -> None:
    for label, size in more.items():
        totals[label] = totals.get(label, 0) + size


def _diverged(state: State) -> str | None:
    """The first tensor of a state that holds a NaN or an infinity."""
    for name, tensor in leaves(state):
        if tensor.is_floating_point() and not math.isfinite(peak(tensor)):
            return name
    return None
