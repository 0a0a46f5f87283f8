"""Who takes part, and who trains whom: the same on every rank, and independent of their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpifed.federation.roster import Assignment, Roster, participants


def roster(
    examples: list[int],
    ranks: int = 4,
    participation: float | int = 1.0,
    sampling: Any = "uniform",
    stateful: bool = False,
    seed: int = 3,
) -> Roster:
    return Roster(seed, ranks, examples, participation, sampling, stateful)


# --- participation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("participation", "clients", "expected"),
    [(1, 10, 1), (7, 10, 7), (1.0, 10, 10), (0.25, 10, 3), (0.24, 10, 2), (0.5, 3, 2), (0.001, 10, 1), (0.1, 100, 10)],
)
def test_participants(participation: float | int, clients: int, expected: int) -> None:
    """A whole number is a count; a fraction is rounded half up, at least one: 2.5 -> 3, 2.4 -> 2, 1.5 -> 2."""
    assert participants(participation, clients) == expected


@pytest.mark.parametrize("sampling", ["uniform", "examples"])
def test_a_sample_is_the_number_asked_for_without_repetition(sampling: str) -> None:
    drawn = [roster([5] * 20, participation=6, sampling=sampling).sample(t) for t in range(1, 200)]
    assert all(len(set(clients)) == 6 and clients == tuple(sorted(clients)) for clients in drawn)
    assert len(set(drawn)) > 150 and {client for clients in drawn for client in clients} == set(range(20))
    assert all(isinstance(client, int) for client in drawn[0])


@pytest.mark.parametrize("sampling", ["uniform", "examples", "bernoulli"])
def test_sampling_depends_on_seed_and_round_alone(sampling: str) -> None:
    examples = list(range(1, 31))
    one = [roster(examples, 1, 0.3, sampling).sample(t) for t in range(1, 20)]
    for ranks, stateful in ((2, True), (7, False)):
        assert [roster(examples, ranks, 0.3, sampling, stateful).sample(t) for t in range(1, 20)] == one
    assert [roster(examples, 1, 0.3, sampling, seed=4).sample(t) for t in range(1, 20)] != one
    late = roster(examples, 1, 0.3, sampling)
    assert [late.sample(t) for t in range(10, 20)] == one[9:]


def test_everybody() -> None:
    for sampling in ("uniform", "examples", "bernoulli"):
        assert roster([1, 2, 3], participation=1.0, sampling=sampling).sample(5) == (0, 1, 2)
        assert roster([1, 2, 3], participation=3, sampling=sampling).sample(5) == (0, 1, 2)


def test_uniform_draws_everyone_alike() -> None:
    """2,000 rounds of 3 in 12: each client 500 times; four standard deviations are 4 sqrt(2000 * 1/4 * 3/4) = 77."""
    counts = np.zeros(12)
    uneven = roster([1] * 6 + [1000] * 6, participation=3)
    for t in range(2000):
        counts[list(uneven.sample(t))] += 1
    assert np.abs(counts - 500).max() < 77


def test_examples_draws_in_proportion() -> None:
    """One client a round, sizes 1, 2, 5: in 4,000 rounds 500, 1000, 2500; four deviations are 84, 110 and 122."""
    counts = np.zeros(3)
    for t in range(4000):
        counts[list(roster([1, 2, 5], participation=1, sampling="examples").sample(t))] += 1
    assert (np.abs(counts - [500, 1000, 2500]) < [84, 110, 122]).all()


@pytest.mark.parametrize(("participation", "probability"), [(0.25, 0.25), (0.33, 0.33), (2, 0.2), (0.96, 0.96)])
def test_bernoulli_draws_each_by_itself(participation: float | int, probability: float) -> None:
    """Each of 10 clients with exactly that probability (33 % of ten is not three; 96 % is not all), numbers varying.

    Given that somebody comes, the expected number is 10 p / (1 - (1 - p)^10); over 2,000 rounds within 4 deviations.
    """
    sizes = [len(roster([4] * 10, participation=participation, sampling="bernoulli").sample(t)) for t in range(1, 2001)]
    assert min(sizes) >= 1 and len(set(sizes)) > 3
    expected = 10 * probability / (1 - (1 - probability) ** 10)
    assert abs(np.mean(sizes) - expected) < 4 * np.sqrt(10 * probability * (1 - probability) / 2000)


def test_bernoulli_is_never_empty() -> None:
    rare = roster([1] * 3, participation=0.01, sampling="bernoulli")
    assert all(len(rare.sample(t)) >= 1 for t in range(300))


# --- dealing ----------------------------------------------------------------------------------------------------------
def test_the_largest_first_each_to_the_rank_with_the_least() -> None:
    """Sizes 7, 3, 5, 5, 1, 4 on ranks 1-3 (rank 0 is the server): 7 -> 1, 5 (client 2) -> 2, 5 (client 3) -> 3;

    then 4 (client 5) -> rank 2 (5, the lower number of two equal loads), 3 (client 1) -> rank 3, 1 -> rank 1 (7).
    """
    dealt = roster([7, 3, 5, 5, 1, 4]).deal(range(6))
    assert dealt.by_rank == ((), (0, 4), (2, 5), (1, 3))
    assert dealt.clients == (0, 1, 2, 3, 4, 5)
    assert dealt.rank_of == {0: 1, 4: 1, 2: 2, 5: 2, 1: 3, 3: 3}


def test_one_rank_trains_all_and_several_spare_the_server() -> None:
    assert roster([1, 2, 3], ranks=1).deal([0, 2]).by_rank == ((0, 2),)
    assert roster([1, 2, 3], ranks=2).deal([2, 0]).by_rank == ((), (0, 2))
    assert roster([1, 2], ranks=5).deal([0, 1]).by_rank == ((), (1,), (0,), (), ())
    assert roster([1, 2]).deal([]).by_rank == ((), (), (), ())


def test_dealing_is_balanced() -> None:
    """Largest first is at most 4/3 - 1/(3m) of the best, which is at least the mean load (Graham 1969)."""
    sizes = np.random.default_rng(0).integers(1, 500, 200).tolist()
    for ranks in (2, 5, 17):
        dealt = roster(sizes, ranks).deal(range(200))
        assert dealt.clients == tuple(range(200))
        loads = [sum(sizes[client] for client in mine) for mine in dealt.by_rank[1:]]
        hosts = ranks - 1
        assert max(loads) <= (4 / 3 - 1 / (3 * hosts)) * max(sum(sizes) / hosts, max(sizes))


def test_clients_with_a_state_stay_where_it_is() -> None:
    sizes = [9, 1, 4, 6, 2, 2, 8, 3]
    kept = roster(sizes, participation=3, stateful=True)
    home = kept.deal(range(8)).rank_of
    for t in range(1, 30):
        asked = kept.sample(t)
        dealt = kept.deal(asked)
        assert dealt.clients == asked and all(dealt.rank_of[client] == home[client] for client in asked)
    assert kept.fixed


def test_clients_without_a_state_are_dealt_anew() -> None:
    """Three of equal size on three ranks: one each, whoever they are; by their homes two would meet now and then."""
    free = roster([5] * 9, participation=3)
    assert not free.fixed
    for t in range(1, 30):
        assert [len(mine) for mine in free.deal(free.sample(t)).by_rank] == [0, 1, 1, 1]


def test_fixed_where_everybody_always_comes() -> None:
    assert roster([5] * 4, participation=1.0).fixed and roster([5] * 4, participation=4).fixed
    assert roster([5] * 4, participation=1.0, sampling="bernoulli").fixed
    assert not roster([5] * 4, participation=0.95, sampling="bernoulli").fixed
    assert not roster([5] * 4, participation=3).fixed


def test_assignment() -> None:
    assignment = Assignment(((), (3, 9), (1,)))
    assert assignment.clients == (1, 3, 9) and assignment.rank_of == {3: 1, 9: 1, 1: 2}
