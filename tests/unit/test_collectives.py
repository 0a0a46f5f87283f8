"""Routes: whom a message goes by, and that a run's results do not depend on it, bit for bit.

What single collectives do along routes is checked in `tests/mpi/checks.py`, the same under mpirun in
`tests/mpi/test_collectives.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mpifed.comm.inprocess import run_ranks
from mpifed.comm.routes import Nodes, tree_of
from mpifed.errors import BadInput
from mpifed.federation.federation import Federation
from mpifed.job import Job, load
from tests.algorithm_table import ROWS, Outcome, engine_of, job_of, run, with_changes
from tests.mpi.equality import differences, with_codecs

ONE_NODE = Nodes.of(["a"] * 6)
TWO_NODES = Nodes.of(["a", "b", "a", "b", "b", "a"])


# --- trees ------------------------------------------------------------------------------------------------------------
def test_nodes_are_known_by_their_first_rank() -> None:
    assert TWO_NODES.groups == ((0, 2, 5), (1, 3, 4))
    assert TWO_NODES.group(4) == (1, 3, 4) and TWO_NODES.size == 6


@pytest.mark.parametrize(
    ("route", "nodes", "parts", "parents"),
    [
        ("flat", TWO_NODES, False, (0, 0, 0, 0, 0, 0)),
        ("tree", TWO_NODES, False, (0, 0, 0, 2, 0, 4)),  # the lowest bit of a rank taken away
        ("tree", TWO_NODES, True, (0, 0, 0, 0, 0, 0)),
        ("hierarchical", TWO_NODES, False, (0, 0, 0, 1, 1, 0)),
        ("hierarchical", ONE_NODE, False, (0, 0, 0, 2, 0, 4)),
        ("hierarchical", ONE_NODE, True, (0, 0, 0, 0, 0, 0)),
        # leaders 0, 1, 2, 3: a binomial tree, or 0 alone; 4 to 7 are on the nodes of these
        ("hierarchical", Nodes.of(["a", "b", "c", "d"] * 2), False, (0, 0, 0, 2, 0, 1, 2, 3)),
        ("hierarchical", Nodes.of(["a", "b", "c", "d"] * 2), True, (0, 0, 0, 0, 0, 1, 2, 3)),
    ],
)
def test_parents(route: str, nodes: Nodes, parts: bool, parents: tuple[int, ...]) -> None:
    assert tree_of(route, nodes, parts).parents == parents  # type: ignore[arg-type]


def test_children_with_most_below_them_come_first() -> None:
    """Binomial over eight: 0 sends to 4 (which has 5, 6 and by it 7), to 2 (which has 3), to 1."""
    tree = tree_of("tree", Nodes.of(["a"] * 8), False)
    assert tree.children == ((4, 2, 1), (), (3,), (), (6, 5), (), (7,), ())
    assert tree.below[0] == (4, 6, 7, 5, 2, 3, 1) and tree.below[4] == (6, 7, 5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("route", ["flat", "tree", "hierarchical"])
def test_everybody_is_reached(route: str, ranks: int) -> None:
    """Once, and by few hops: 10 for 1000 ranks in a tree, and by node 7 between 125 leaders and 3 within a node."""
    nodes = Nodes.of([f"node{rank // 8}" for rank in range(ranks)])
    for parts in (False, True):
        tree = tree_of(route, nodes, parts)  # type: ignore[arg-type]
        assert sorted(tree.below[0]) == list(range(1, ranks))
        hops = [0] * ranks
        for rank in tree.below[0]:
            hops[rank] = hops[tree.parents[rank]] + 1
        assert max(hops) <= (1 if route == "flat" else 2 if parts else 10)


# --- runs -------------------------------------------------------------------------------------------------------------
LONG = ("model.hidden=[300]",)
"""A model of more than 16,384 elements, which is added exactly."""

JOBS: dict[str, Job] = {
    row.id: job_of(row, rounds=2) for row in ROWS if row.id in ("scaffold", "fedftg", "fedmd", "fedkd")
}
JOBS["fedavg, long"] = load(
    None, ["algorithm.name=fedavg", "rounds=2", "clients=6", "local.steps=2", "participation=4", *LONG]
)
JOBS["scaffold, svd up"] = with_codecs(JOBS["scaffold"], {"up.update": "svd(energy=0.7)"})

PLACES = {
    2: ["a", "b"],
    3: ["a", "b", "b"],
    5: ["a", "b", "a", "b", "c"],
}
"""Nodes by number of ranks."""


@cache
def by_the_library(name: str) -> Outcome:
    with TemporaryDirectory() as folder:
        return run(JOBS[name], Path(folder))


@pytest.mark.parametrize(
    ("route", "ranks"), [("hierarchical", 2), ("flat", 3), ("hierarchical", 3), ("tree", 5), ("hierarchical", 5)]
)
@pytest.mark.parametrize("name", JOBS)
def test_the_bits_do_not_depend_on_the_route(name: str, route: str, ranks: int, tmp_path: Path) -> None:
    outcome = run(with_changes(JOBS[name], f"collectives={route}"), tmp_path, ranks, hosts=PLACES[ranks])
    assert differences(by_the_library(name), outcome) == []


@pytest.mark.parametrize("route", ["flat", "tree", "hierarchical"])
def test_one_rank_has_nobody_to_send_to(route: str, tmp_path: Path) -> None:
    outcome = run(with_changes(JOBS["scaffold"], f"collectives={route}"), tmp_path)
    assert differences(by_the_library("scaffold"), outcome) == []
    assert all(entry[6:8] == [0, 0] for entry in outcome.ledger if entry[2] != "control")


def test_each_field_may_have_its_own_route(tmp_path: Path) -> None:
    """SCAFFOLD: the model down along a tree, the control variate flat; of the two updates up one by node."""
    table = '{down = "tree", "down.control" = "flat", "up.update" = "hierarchical"}'
    outcome = run(with_changes(JOBS["scaffold"], f"collectives={table}"), tmp_path, 5, hosts=PLACES[5])
    assert differences(by_the_library("scaffold"), outcome) == []


def test_a_sum_by_mpi_is_close(tmp_path: Path) -> None:
    """`reduce = "tree"`: in float32, each route in its own order."""
    job = with_changes(JOBS["fedavg, long"], "reduce=tree")
    exact = by_the_library("fedavg, long").server["model"].double()
    for route in ("flat", "tree", "hierarchical"):
        outcome = run(with_changes(job, f"collectives={route}"), tmp_path / route, 5, hosts=PLACES[5])
        assert (outcome.server["model"].double() - exact).norm() < 1e-6 * exact.norm(), route


@pytest.mark.parametrize(
    ("route", "down", "up"),
    [
        ("library", ({0: 1}, {1: 1, 2: 1, 3: 1, 4: 1}), ({1: 1, 2: 1, 3: 1, 4: 1}, {0: 4})),
        ("flat", ({0: 4}, {1: 1, 2: 1, 3: 1, 4: 1}), ({1: 1, 2: 1, 3: 1, 4: 1}, {0: 4})),
        ("tree", ({0: 3, 2: 1}, {1: 1, 2: 1, 3: 1, 4: 1}), ({1: 1, 2: 1, 3: 1, 4: 1}, {0: 3, 2: 1})),
        ("hierarchical", ({0: 3, 1: 1}, {1: 1, 2: 1, 3: 1, 4: 1}), ({1: 1, 2: 1, 3: 1, 4: 1}, {0: 3, 1: 1})),
    ],
)
def test_who_hands_what_to_mpi(
    route: str, down: tuple[dict[int, int], ...], up: tuple[dict[int, int], ...], tmp_path: Path
) -> None:
    """Five ranks on nodes a, b, a, b, c: what each sends and is sent, in models (4 bytes an element) and in exact sums
    (8 bytes). The library's broadcast is handed over once. In the tree 3 is below 2; by node it is below 1."""
    changes = ("participation=1.0", "rounds=1", f"collectives={route}")
    outcome = run(with_changes(JOBS["fedavg, long"], *changes), tmp_path, 5, hosts=PLACES[5])
    elements = outcome.server["model"].numel()
    for direction, kind, size, expected in (("down", "model", 4, down), ("up", "update", 8, up)):
        entries = [entry for entry in outcome.ledger if entry[2:4] == [direction, kind]]
        for column, by_rank in zip((6, 7), expected, strict=True):
            found = {entry[4]: entry[column] / (size * elements) for entry in entries if entry[column]}
            assert found == by_rank, (direction, column)


def test_each_clients_model_goes_by_the_nodes_leader(tmp_path: Path) -> None:
    """FedFTG wants every client's model. Nodes a, b, b: rank 2's replies are handed over twice, by it and by rank 1."""
    job = with_changes(JOBS["fedftg"], "rounds=1", "participation=1.0")
    totals = {}
    for route in ("library", "hierarchical"):
        ledger = run(with_changes(job, f"collectives={route}"), tmp_path / route, 3, hosts=PLACES[3]).ledger
        totals[route] = {entry[4]: (entry[6], entry[7]) for entry in ledger if entry[2:4] == ["up", "update"]}
    first, second = (totals["library"][rank][0] for rank in (1, 2))
    assert totals["library"] == {0: (0, first + second), 1: (first, 0), 2: (second, 0)}
    assert totals["hierarchical"] == {0: (0, first + second), 1: (first + second, second), 2: (second, 0)}


def test_a_route_for_a_field_that_is_not_exchanged_is_refused() -> None:
    job = with_changes(JOBS["scaffold"], "collectives.up.updates=flat")
    with pytest.raises(BadInput, match=r"^collectives.up.updates: scaffold exchanges no such field; known: down.model"):
        run_ranks(2, lambda comm: Federation.build(job, comm))


def test_nodes_are_found_by_the_names_of_the_hosts(tmp_path: Path) -> None:
    """By name where they have one of their own; without, all are on this machine."""
    groups = run_ranks(3, lambda comm: (comm.find_nodes(), comm.nodes.groups), PLACES[3])
    assert groups == [(PLACES[3], ((0,), (1, 2)))] * 3
    assert run_ranks(3, lambda comm: (len(set(comm.find_nodes())), comm.nodes.groups)) == [(1, ((0, 1, 2),))] * 3
    engines = run_ranks(2, lambda comm: engine_of(JOBS["scaffold"], comm, tmp_path), PLACES[2])
    assert [engine.comm.nodes.groups for engine in engines] == [((0,), (1,))] * 2
