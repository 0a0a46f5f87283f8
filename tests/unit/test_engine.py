"""The engine with clients that misbehave, phases that repeat, and what it writes down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from mpifed.algorithms.base import (
    Absent,
    Algorithm,
    ClientContext,
    Each,
    Env,
    Field,
    Mean,
    Payload,
    Phase,
    Reply,
    State,
    Sum,
    Uploads,
)
from mpifed.algorithms.fedavg import FedAvg
from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import InProcess, run_ranks
from mpifed.engine import Clock, Engine
from mpifed.errors import TooFewReplies
from mpifed.federation.federation import Federation
from tests.algorithm_table import CLIENTS, ROWS, Outcome, assert_same_bits, engine_of, job_of, run
from tests.mpi.checks import recorded

HERE = "tests.unit.test_engine"

# --- algorithms that misbehave ----------------------------------------------------------------------------------------
Fault = Literal[
    "raise",
    "nan",
    "inf",
    "dtype",
    "shape",
    "missing",
    "surplus",
    "negative weight",
    "nan weight",
    "not a reply",
    "nan state",
]
FAULTS = Fault.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Faulty(FedAvg):
    """FedAvg whose clients count their rounds; some of them answer wrongly from `since` on."""

    stateful: ClassVar[bool] = True
    who: tuple[int, ...] = (1,)
    fault: Fault | Literal["outage", "none"] = "none"
    since: int = 2

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, reply = super().client(state, down, ctx)
        state = state | {"rounds": state.get("rounds", torch.tensor(0)) + 1}
        if ctx.id not in self.who or ctx.round < self.since:
            return state, reply
        assert isinstance(reply, Reply)
        upload, weight = dict(reply.upload), reply.weight
        if self.fault == "raise":
            raise RuntimeError("the disk of this client is full")
        if self.fault == "nan state":
            return state | {"model": {"weight": torch.tensor([1.0, float("nan")])}}, reply
        if self.fault == "outage":
            return state, Absent("outage")
        if self.fault == "not a reply":
            return state, None  # type: ignore[return-value]
        if self.fault in ("nan", "inf"):
            upload["update"] = upload["update"].clone()
            upload["update"][3] = float(self.fault)
        elif self.fault == "dtype":
            upload["update"] = upload["update"].double()
        elif self.fault == "shape":
            upload["update"] = upload["update"][1:]
        elif self.fault == "missing":
            del upload["update"]
        elif self.fault == "surplus":
            upload["more"] = torch.ones(1)
        elif self.fault == "negative weight":
            weight = -1.0
        elif self.fault == "nan weight":
            weight = float("nan")
        return state, Reply(upload, weight)


def faulty(fault: str, **changes: Any) -> dict[str, Any]:
    return {"name": f"{HERE}:Faulty", "fault": fault} | changes


REASONS = {
    "raise": "RuntimeError: the disk of this client is full",
    "outage": "outage",
    "nan": "ValueError: non-finite update",
    "inf": "ValueError: non-finite update",
    "dtype": "'update' is declared as torch.float32 (30,), but is torch.float64 (30,)",
    "shape": "'update' is declared as torch.float32 (30,), but is torch.float32 (29,)",
    "missing": "the upload holds ['buffers_update'], declared are ['buffers_update', 'update']",
    "surplus": "the upload holds ['buffers_update', 'more', 'update'], declared are",
    "negative weight": "the weight of the reply is -1.0",
    "nan weight": "the weight of the reply is nan",
    "not a reply": "",
    "nan state": "ValueError: non-finite 'model/weight' in the new state",
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_client_costs_its_own_reply(fault: str, ranks: int, tmp_path: Path) -> None:
    """The round's result is, bit for bit, that of a round in which this client's reply did not arrive at all."""
    job = job_of(faulty(fault), participation=1.0)
    bad = run(job, tmp_path / "bad", ranks)
    outage = run(job_of(faulty("outage"), participation=1.0), tmp_path / "outage", ranks)
    good = run(job_of(faulty("none"), participation=1.0), tmp_path / "good", ranks)
    assert_same_bits(flat(bad.server), flat(outage.server))
    assert not torch.equal(bad.server["model"], good.server["model"])
    assert [row["replies"] for row in bad.rows] == [5, 4, 4] and [row["clients"] for row in bad.rows] == [5, 5, 5]
    assert bad.rows[0]["absent"] == []
    for row in bad.rows[1:]:
        ((entry,)) = row["absent"]
        assert entry["client"] == 1 and REASONS[fault] in entry["reason"]


def flat(state: State) -> dict[str, Tensor]:
    return Outcome(state, {}, [], []).tensors()


def rounds_counted(outcome: Outcome) -> list[int]:
    return [int(outcome.clients[client]["state"]["rounds"]) for client in range(CLIENTS)]


def test_an_outage_keeps_the_new_state_and_a_fault_the_old(tmp_path: Path) -> None:
    """Three rounds, the second and the third bad: a reply that got lost still took place, an exception did not."""
    outage = run(job_of(faulty("outage"), participation=1.0), tmp_path / "outage", 3)
    assert rounds_counted(outage) == [3, 3, 3, 3, 3]
    for fault in ("raise", "nan", "shape"):
        outcome = run(job_of(faulty(fault), participation=1.0), tmp_path / fault, 3)
        assert rounds_counted(outcome) == [3, 1, 3, 3, 3]


def test_absent_clients_are_sent_the_model_and_upload_nothing(tmp_path: Path) -> None:
    """Logical bytes: 30 parameters and 6 statistics to five clients; from five, then from four; and their weights."""
    outcome = run(job_of(faulty("raise"), participation=1.0, rounds=2), tmp_path, 3)
    logical = outcome.logical()
    assert logical[1, "down.model"] == logical[2, "down.model"] == logical[1, "up.update"] == 5 * 120
    assert logical[2, "up.update"] == 4 * 120
    assert (logical[1, "up.weight"], logical[2, "up.weight"]) == (40, 32)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("fault", ["raise", "nan", "outage"])
def test_too_few_replies_stop_the_run_on_every_rank_and_change_nothing(fault: str, ranks: int, tmp_path: Path) -> None:
    """All clients are bad in round 3: the state is that after round 2, and every rank says why, in the same words."""
    job = job_of(faulty(fault, who=list(range(5)), since=3), participation=1.0)

    def main(comm: Communicator) -> tuple[str, Engine]:
        engine = engine_of(job, comm, tmp_path / "bad")
        with pytest.raises(TooFewReplies) as stopped:
            engine.run()
        return str(stopped.value), engine

    results = run_ranks(ranks, main)
    assert {said for said, _ in results} == {
        "round 3, phase train: 0 usable replies, min_replies is 1 ("
        + "; ".join(f"client {client}: {REASONS[fault]}" for client in range(5))
        + ")"
    }
    expected = run(job_of(faulty("none"), participation=1.0, rounds=2), tmp_path / "good", ranks)
    engines = [engine for _, engine in results]
    clients = {client: state for engine in engines for client, state in engine.store.items()}
    assert_same_bits(Outcome(engines[0].server or {}, clients, [], []).tensors(), expected.tensors())
    assert all(engine.round == 2 for engine in engines)


def test_min_replies(tmp_path: Path) -> None:
    job = job_of(faulty("raise", who=[1, 4]), participation=1.0, min_replies=4)
    with pytest.raises(
        TooFewReplies, match=r"^round 2, phase train: 3 usable replies, min_replies is 4 \(client 1: Ru"
    ):
        run(job, tmp_path / "four", 3)
    assert run(job_of(faulty("raise", who=[1, 4]), participation=1.0, min_replies=3), tmp_path / "three").rows


@dataclass(frozen=True)
class Undeclared(Faulty):
    """Keeps a state without saying so."""

    stateful: ClassVar[bool] = False


def test_a_state_that_was_not_declared_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    table = {"name": f"{HERE}:Undeclared"}
    with pytest.raises(TooFewReplies, match="Undeclared keeps client states, but does not say `stateful = True`"):
        run(job_of(table), tmp_path / "some", 3)
    with pytest.raises(TooFewReplies, match="stateful = True"):
        run(job_of(table), tmp_path / "alone", 1)
    assert rounds_counted(run(job_of(table, participation=1.0), tmp_path / "all", 3)) == [3] * CLIENTS


@dataclass(frozen=True)
class Borrower(FedAvg):
    """Uploads, and keeps, what the model will overwrite when the next client comes; or, as it should be, copies."""

    stateful: ClassVar[bool] = True
    copies: bool = False

    def up(self, env: Env) -> Mapping[str, Field]:
        model = env.model()
        sizes = {"y": model.layout.size, "gradient": model.layout.size, "statistics": model.buffer_layout.size}
        return {name: Field((size,), reduce=Each()) for name, size in sizes.items()}

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        self.train({}, down, ctx)
        model = ctx.model
        model.zero_gradient()
        torch.nn.functional.cross_entropy(model(ctx.x), ctx.y).backward()
        mine = {"y": model.parameters, "gradient": model.gradient, "statistics": model.buffers}
        part = {"last": model.layout.views(model.parameters.detach())[model.layout.names[0]]}
        if self.copies:
            mine = {name: tensor.detach().clone() for name, tensor in mine.items()}
            part = {"last": part["last"].clone()}
        return mine | part, Reply(mine, weight=ctx.examples)

    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        total = {name: uploads.mean(name) for name in ("y", "gradient", "statistics")}
        return {"model": total["y"] + total["gradient"], "buffers": total["statistics"]}


@pytest.mark.parametrize("reduce", ["ordered", "tree"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_models_own_memory_may_be_returned(ranks: int, reduce: str, tmp_path: Path) -> None:
    """Parameters, gradient, statistics and views of them: the next client of the rank overwrites all of it."""
    outcomes = [
        run(job_of({"name": f"{HERE}:Borrower", "copies": copies}, reduce=reduce), tmp_path / str(copies), ranks)
        for copies in (False, True)
    ]
    assert_same_bits(outcomes[0].tensors(), outcomes[1].tensors())


# --- phases -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TwoPhases(Algorithm):
    """`score`: the round's clients answer a scatter with a tensor of their own length. `tell`: three times, everybody.

    The server's `sum` ends as a number that can be worked out.
    """

    def server_init(self, env: Env) -> State:
        return {"sum": torch.zeros((), dtype=torch.int64), "told": torch.zeros((), dtype=torch.int64)}

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor]:
        return env.initial()

    def phases(self, env: Env) -> tuple[Phase, ...]:
        number = (torch.int64,)
        score = Phase(
            "score",
            lambda t: {"seat": Field((), *number, to="each"), "news": Field((2,), to="everybody")},
            lambda t: {"list": Field((None,), *number, Each())},
            lambda server, t: {"seat": torch.arange(3), "news": torch.ones(2)},
            lambda state, down, ctx: (state, Reply({"list": torch.full((ctx.id,), int(down["seat"]))})),
            self._scored,
        )
        tell = Phase(
            "tell",
            lambda t: {"sum": Field((), *number)} if t != 2 else {},
            lambda t: {"one": Field((), *number, Sum()), "round": Field((t,), reduce=Mean())},
            lambda server, t: {"sum": server["sum"]} if t != 2 else {},
            lambda state, down, ctx: (state, Reply({"one": torch.tensor(1), "round": torch.ones(ctx.round)})),
            lambda server, uploads, t: server | {"told": server["told"] + uploads.sum("one")},
            clients="all",
            repeat=3,
        )
        return score, tell

    def _scored(self, server: State, uploads: Uploads, round_: int) -> State:
        for client, values in zip(uploads.clients, uploads.each("list"), strict=True):
            assert len(values) == client
        return server | {"sum": server["sum"] + sum(int(values.sum()) for values in uploads.each("list"))}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_phases(ranks: int, tmp_path: Path) -> None:
    """Three rounds of three clients in five; the k-th smallest id of a round uploads its id times the number k - 1.

    Bytes of a round t with ids a < b < c: seats 3 * 8; news 8 to all five; lists 8 (a + b + c); then three times to and
    from all five clients: the sum 8 (not in round 2), one 8, t ones of 4 bytes, and the weight 8 of their mean.
    """
    job = job_of({"name": f"{HERE}:TwoPhases"})
    outcome = run(job, tmp_path, ranks)
    roster = engine_of(job, InProcess.alone(), tmp_path / "new").federation.roster
    rounds = [roster.sample(t) for t in (1, 2, 3)]
    assert int(outcome.server["sum"]) == sum(b + 2 * c for _, b, c in rounds)
    assert int(outcome.server["told"]) == 3 * 3 * 5
    for t, ids in enumerate(rounds, start=1):
        expected = {
            "down.seat": 24,
            "down.news": 40,
            "up.list": 8 * sum(ids),
            "down.sum": 0 if t == 2 else 3 * 5 * 8,
            "up.one": 3 * 5 * 8,
            "up.round": 3 * 5 * 4 * t,
            "up.weight": 3 * 5 * 8,
        }
        counted = {kind: size for (round_, kind), size in outcome.logical().items() if round_ == t}
        assert counted == {kind: size for kind, size in expected.items() if size}
    assert {phase for _, phase, *_ in outcome.ledger} == {"", "score", "tell"}


@dataclass(frozen=True)
class InStep(FedAvg):
    """Its server remembers what the clients decoded."""

    def sent(self, server: State, down: Payload, round_: int) -> State:
        return server | {"sent": down["model"]}


def test_the_server_learns_what_a_lossy_download_became(tmp_path: Path) -> None:
    """float16 holds it exactly, and it is not what the server had."""
    sent = []

    def prepare(engine: Engine) -> None:
        def download(server: State, round_: int) -> Payload:
            sent.append(server["model"].clone())
            return phase.download(server, round_)

        (phase,) = engine.phases
        engine.phases = (dataclasses.replace(phase, download=download),)

    job = job_of({"name": f"{HERE}:InStep"}, codec={"down.model": "half"}, rounds=2)
    outcome = run(job, tmp_path, prepare=prepare)
    assert torch.equal(outcome.server["sent"], sent[-1].half().float())
    assert not torch.equal(outcome.server["sent"], sent[-1])
    assert outcome.logical()[1, "down.model"] == 3 * 60


# --- what is written down ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduce", ["ordered", "tree"])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", f"{HERE}:TwoPhases"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_ledgers_mpi_bytes_are_those_handed_over(
    ranks: int, algorithm: str, reduce: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of every collective of the rounds, mpifed's own messages included, on the rank that handed it over.

    Checkpoints belong to no round, so none is written here.
    """
    job = job_of({"name": algorithm}, reduce=reduce)

    def main(comm: Communicator) -> tuple[Engine, int, int]:
        engine = engine_of(job, comm, tmp_path)
        monkeypatch.setattr(Engine, "_checkpoint", lambda self: None)
        with recorded(comm) as calls:
            engine.run()
        return engine, sum(sent for _, sent, _ in calls), sum(received for *_, received in calls)

    results = run_ranks(ranks, main)
    entries = results[0][0].records.ledger.entries
    for rank, (_, sent, received) in enumerate(results):
        assert sum(entry.mpi_sent for entry in entries if entry.rank == rank) == sent > 0
        assert sum(entry.mpi_received for entry in entries if entry.rank == rank) == received > 0
    total = results[0][0].records.ledger.totals()["mpi"]
    assert total == {
        "sent": sum(sent for _, sent, _ in results),
        "received": sum(received for *_, received in results),
    }


def test_the_ledger_is_the_same_in_every_run(tmp_path: Path) -> None:
    """Seconds differ from run to run; the bytes by which they are told do not."""
    one, other = (run(job_of({"name": "fedavg"}), tmp_path / name, 3) for name in ("one", "other"))
    assert one.ledger == other.ledger
    assert one.rows[0]["seconds"] != other.rows[0]["seconds"]


def test_rows(tmp_path: Path) -> None:
    outcome = run(job_of({"name": "fedavg"}, evaluate={"every_rounds": 2}), tmp_path, 2)
    assert [row["accuracy"] is None for row in outcome.rows] == [True, False, False]
    for row in outcome.rows:
        assert set(row) == {
            "round",
            "accuracy",
            "loss",
            "train_loss",
            "clients",
            "replies",
            "absent",
            "bytes",
            "seconds",
        }
        assert set(row["seconds"]) == {"total", "train", "communicate", "evaluate", "server", "checkpoint"}
        assert all(0 <= seconds < 600 for seconds in row["seconds"].values())
        assert row["seconds"]["total"] > row["seconds"]["train"] > 0


def test_rows_are_handed_on_once_and_in_order(tmp_path: Path) -> None:
    seen: list[int] = []

    def prepare(engine: Engine) -> None:
        engine.row_done = lambda row: seen.append(row["round"])

    run(job_of({"name": "fedavg"}, evaluate={"every_rounds": 2}, rounds=5), tmp_path, 2, prepare=prepare)
    assert seen == [1, 2, 3, 4, 5]


def test_a_clients_numbers_are_averaged_over_those_that_answered(tmp_path: Path) -> None:
    """`train_loss` of a round with a bad client is the mean of the other four."""
    good = run(job_of(faulty("none"), participation=1.0, rounds=1), tmp_path / "good")
    lost = [
        run(job_of(faulty("raise", who=[client], since=1), participation=1.0, rounds=1), tmp_path / str(client))
        for client in range(CLIENTS)
    ]
    outage = run(job_of(faulty("outage", who=[2], since=1), participation=1.0, rounds=1), tmp_path / "outage")
    assert outage.rows[0]["train_loss"] == lost[2].rows[0]["train_loss"]
    losses = [5 * good.rows[0]["train_loss"] - 4 * outcome.rows[0]["train_loss"] for outcome in lost]
    assert sum(losses) / 5 == pytest.approx(good.rows[0]["train_loss"], rel=1e-9)
    assert len({round(loss, 9) for loss in losses}) == 5


# --- stopping and checkpoints -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("asked", [0, 2])
def test_a_signal_on_any_rank_stops_all_after_the_round(asked: int, tmp_path: Path) -> None:
    """With a checkpoint, though the job wants none; and going on gives what a run without the signal gives."""
    job = job_of({"name": "scaffold"}, rounds=4)

    def main(comm: Communicator) -> Engine:
        engine = engine_of(job, comm, tmp_path / "stopped")
        engine._stop.asked = comm.rank == asked
        assert not engine.run()
        return engine

    assert [engine.round for engine in run_ranks(3, main)] == [1, 1, 1]
    again = run(job, tmp_path / "stopped", 3, resume=True)
    whole = run(job, tmp_path / "whole", 3)
    assert_same_bits(again.tensors(), whole.tensors())
    assert again.metrics() == whole.metrics() and again.ledger == whole.ledger


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [5]), (1, [4, 5]), (2, [4, 5]), (3, [3, 5])], ids=["end", "each", "two", "three"]
)
def test_checkpoints_are_due(every: int, expected: list[int], tmp_path: Path) -> None:
    """Five rounds, two kept; one at the end in any case."""
    run(job_of({"name": "fedavg"}, rounds=5, checkpoint={"every_rounds": every, "keep": 2}), tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"round_{round_:06d}" for round_ in expected
    ]


def test_checkpoints_by_time(tmp_path: Path) -> None:
    run(
        job_of({"name": "fedavg"}, rounds=3, checkpoint={"every_rounds": 0, "every_seconds": 1e-6, "keep": 9}), tmp_path
    )
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_states_that_do_not_fit_in_memory(tmp_path: Path) -> None:
    """With no memory for client states, every one goes through a file; nothing else changes."""
    small, large = (
        run(job_of({"name": "scaffold"}, client_state_mb=size), tmp_path / str(size), 2) for size in (0, 1024)
    )
    assert_same_bits(small.tensors(), large.tensors())
    assert small.metrics() == large.metrics()


def test_clock() -> None:
    """An activity within another counts for itself alone."""
    clock = Clock()
    with clock.time("train"):
        time.sleep(0.02)
        with clock.time("evaluate"):
            time.sleep(0.05)
    with clock.time("train"):
        time.sleep(0.01)
    taken = clock.take()
    assert taken["evaluate"] >= 0.05 and taken["train"] >= 0.03
    assert clock.take() == {}


def test_clock_counts_no_second_twice() -> None:
    clock = Clock()
    began = time.perf_counter()
    with clock.time("a"):
        with clock.time("b"), clock.time("c"):
            time.sleep(0.01)
        with clock.time("b"):
            time.sleep(0.01)
    passed = time.perf_counter() - began
    assert passed - 0.005 < sum(clock.take().values()) <= passed


def test_samples_are_taken_only_by_who_looks_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedKD's `apply` asks all five clients, and only the three that train look at their samples."""
    taken: list[int] = []
    samples = Federation.samples

    def counted(self: Federation, client: int) -> tuple[Tensor, Tensor]:
        taken.append(client)
        return samples(self, client)

    monkeypatch.setattr(Federation, "samples", counted)
    row = next(row for row in ROWS if row.id == "fedkd")
    job = job_of(row, rounds=1)
    run(job, tmp_path)
    assert tuple(taken) == engine_of(job, InProcess.alone(), tmp_path / "new").federation.roster.sample(1)
