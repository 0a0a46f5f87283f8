"""Turns: as many clients train at a time as cores allow, where that pays; nobody hangs, and nothing is left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import InProcess, run_ranks
from mpifed.federation import turns as room
from mpifed.federation.roster import Assignment
from mpifed.federation.turns import Turns, in_turns, worthwhile


def agree(comm: Communicator, folder: Path, hosts: Sequence[str] = (), **changed: object) -> Turns:
    options = {"training": range(1, comm.size), "on_cores": True, "threads": 1, "cost": lambda client: 1.0}
    options |= {"hosts": hosts or ["node"] * comm.size, "folder": folder} | changed
    return Turns.agree(comm, **options)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "usable_cores", lambda: {0, 1})


class Crowd:
    """How many are inside, at most."""

    def __init__(self) -> None:
        self.most = self._now = 0
        self._lock = threading.Lock()

    @contextmanager
    def inside(self):
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        yield
        with self._lock:
            self._now -= 1


# --- taking turns -----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("two_cores")
def test_no_more_at_a_time_than_cores(tmp_path: Path) -> None:
    """Eight training ranks of three clients each, on two cores: two at a time, and every client once, in order."""
    crowd = Crowd()
    dealt = Assignment(((), *(tuple(range(3 * rank, 3 * rank + 3)) for rank in range(8))))

    def main(comm: Communicator) -> list[int]:
        turns = agree(comm, tmp_path)
        comm.barrier()
        assert list(tmp_path.iterdir()) == []
        trained = []
        for client in turns.each(dealt):
            with crowd.inside():
                time.sleep(0.005)
            trained.append(client)
        comm.barrier()
        turns.close()
        return trained

    assert run_ranks(9, main) == [list(clients) for clients in dealt.by_rank]
    assert crowd.most == 2


@pytest.mark.usefixtures("two_cores")
def test_every_node_has_its_own(tmp_path: Path) -> None:
    """Ranks 1 to 4 and 5 to 8 on two nodes: two at a time on each."""
    crowds = {"a": Crowd(), "b": Crowd()}
    hosts = ["a"] * 5 + ["b"] * 4

    def main(comm: Communicator) -> None:
        turns = agree(comm, tmp_path, hosts)
        for _ in turns.each(Assignment(((), *((client,) for client in range(8))))):
            with crowds[hosts[comm.rank]].inside():
                time.sleep(0.05)

    run_ranks(9, main)
    assert [crowd.most for crowd in crowds.values()] == [2, 2]


@pytest.mark.usefixtures("two_cores")
def test_a_client_that_fails_gives_its_turn_back(tmp_path: Path) -> None:
    """As does one whose loop ends early; the other ranks go on."""

    def main(comm: Communicator) -> int:
        turns = agree(comm, tmp_path)
        trained = 0
        for round_ in range(3):
            try:
                for _ in turns.each(Assignment(((), *((client, client + 6) for client in range(6))))):
                    if comm.rank % 2 and round_ < 2:
                        raise RuntimeError
                    trained += 1
            except RuntimeError:
                pass
        return trained

    assert run_ranks(7, main) == [0, 2, 6, 2, 6, 2, 6]


@pytest.mark.usefixtures("two_cores")
def test_who_waits_is_not_the_one_that_hangs(tmp_path: Path) -> None:
    """The watchdog pauses while a rank waits for its turn, and only then; the wait is timed."""

    def main(comm: Communicator) -> list[str]:
        turns = agree(comm, tmp_path)
        said: list[str] = []
        comm.waiting = lambda begins: said.append("waits" if begins else "goes on")

        @contextmanager
        def waiting():
            said.append("begins")
            yield
            said.append("ends")

        for client in turns.each(Assignment(((), *((client,) for client in range(4)))), waiting):
            said.append(f"client {client}")
        return said

    server, *others = run_ranks(5, main)
    assert server == []
    assert others == [["begins", "waits", "goes on", "ends", f"client {client}"] for client in range(4)]


# --- where there are none ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ranks", "changed", "expected"),
    [
        (4, {}, 2),  # three ranks train on two cores
        (3, {}, 0),  # each has its core
        (1, {"training": (0,)}, 0),
        (5, {"threads": 2}, 1),
        (4, {"threads": 3}, 1),  # one at a time at least
        (4, {"on_cores": False}, 0),
        (4, {"hosts": ["a", "a", "b", "b"]}, 0),  # one rank trains on a, two on b
        (5, {"hosts": ["a", "b", "b", "b", "a"]}, None),  # three on b
    ],
)
@pytest.mark.usefixtures("two_cores")
def test_how_many(ranks: int, changed: dict[str, object], expected: int | None, tmp_path: Path) -> None:
    tokens = run_ranks(ranks, lambda comm: agree(comm, tmp_path, **changed).tokens)
    assert tokens == ([0, 2, 2, 2, 0] if expected is None else [expected] * ranks)


def test_cores_are_those_that_the_ranks_of_a_node_have_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that binds every rank to a core of its own leaves nothing to wait for; two ranks to a core do."""
    bound: dict[int, set[int]] = {}
    monkeypatch.setattr(room, "usable_cores", lambda: bound[threading.get_ident()])

    def tokens(comm: Communicator, ranks_of_a_core: int) -> int:
        bound[threading.get_ident()] = {comm.rank // ranks_of_a_core}
        return agree(comm, tmp_path).tokens

    assert run_ranks(4, lambda comm: tokens(comm, 1)) == [0] * 4
    assert run_ranks(4, lambda comm: tokens(comm, 2)) == [2] * 4


@pytest.mark.usefixtures("two_cores")
def test_without_a_shared_folder_everybody_trains_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once, and whichever rank cannot."""
    with caplog.at_level("INFO", logger="mpifed"):
        assert run_ranks(4, lambda comm: agree(comm, tmp_path / "none").tokens) == [0] * 4
    assert [record.message.split(": ")[0] for record in caplog.records] == ["the ranks of a node do not train in turns"]
    elsewhere = tmp_path / "container"
    assert run_ranks(4, lambda comm: agree(comm, elsewhere if comm.rank == 2 else tmp_path).tokens) == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_the_pipe_is_its_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    mkfifo = os.mkfifo
    monkeypatch.setattr(room, "usable_cores", lambda: {0})
    monkeypatch.setattr(os, "mkfifo", lambda path, mode: modes.append((path.name, mode)) or mkfifo(path, mode))
    for _ in range(2):
        run_ranks(3, lambda comm: agree(comm, tmp_path).close())
    (first, mode), (second, _) = modes
    assert mode == 0o600 and first != second and len(first) == len("mpifed-turns-") + 32 + len("-0")


def test_none() -> None:
    turns = Turns.none(InProcess.alone())
    assert list(turns.each(Assignment(((3, 5),)))) == [3, 5]
    turns.close()


# --- whether it pays --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loads", "tokens", "ended"),
    [
        ([[1.0]] * 10, 2, 5.0),
        ([[1.0]] * 5, 2, 3.0),
        ([[3.0], [1.0], [1.0], [1.0]], 2, 3.0),  # the short ones one after the other beside the long one
        ([[1.0], [1.0], [1.0], [3.0]], 2, 4.0),  # the long one comes last
        ([[2.0, 2.0], [1.0], [1.0]], 2, 4.0),
        ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], 2, 3.0),
    ],
)
def test_when_turns_end(loads: list[list[float]], tokens: int, ended: float) -> None:
    assert in_turns(loads, tokens) == ended


@pytest.mark.parametrize(
    ("loads", "tokens", "expected"),
    [
        ([1] * 10, 2, True),  # 5 against 10/2
        ([1] * 5, 2, False),  # 3 against 2.5
        ([1] * 20, 16, False),  # 2 against 1.25
        ([1] * 31, 16, True),  # 2 against 1.94
        ([1] * 16, 16, False),  # no rank has to wait
        ([5, 1, 1, 1], 2, True),  # 5 against 5: one rank is the longest in any case
        ([1, 1, 1, 3], 2, False),  # 4 against 3
        ([1] * 10, 0, False),
        ([], 2, False),
    ],
)
def test_turns_are_taken_where_they_leave_no_core_idle(loads: list[int], tokens: int, expected: bool) -> None:
    assert worthwhile({rank: [float(load)] if load else [] for rank, load in enumerate(loads)}, tokens) is expected


def test_ranks_without_clients_do_not_count() -> None:
    assert not worthwhile({0: [], 1: [1.0], 2: [1.0], 3: []}, 2)
