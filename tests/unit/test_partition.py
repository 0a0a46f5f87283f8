"""Partitions: every one against the same table of properties, then the numbers that its source prescribes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpifed.component import bind, resolve
from mpifed.data import PARTITIONS
from mpifed.data import partition as partitions
from mpifed.data.partition import Partition
from mpifed.errors import BadInput

GIVEN = ("labels", "clients", "rng", "test_labels", "owner")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def uneven_labels(seed: int = 0) -> np.ndarray:
    """2,000 samples of five classes with 100, 200, 400, 500 and 800, in random order."""
    return rng(seed).permutation(np.repeat(np.arange(5), [100, 200, 400, 500, 800]))


def deal(name: str, labels: np.ndarray, clients: int, seed: int = 0, **keys: Any) -> Partition:
    """As the program calls a partition: keys bound to the signature, what the program gives by position."""
    function = resolve(PARTITIONS, name, "data.partition.name")
    keys = bind(function, keys, "data.partition", given=GIVEN)
    owner = {"owner": np.arange(len(labels)) // 7} if name == "natural" else {}
    partition = function(labels, clients, rng(seed), np.repeat(np.arange(5), 60), **owner, **keys)
    assert isinstance(partition, Partition)
    return partition


# --- properties of all -----------------------------------------------------------------------------------------------
ALL_USED = True
TABLE: list[tuple[str, dict[str, Any], bool]] = [
    ("iid", {}, ALL_USED),
    ("shards", {}, ALL_USED),  # 2,000 is a multiple of 10 x 2
    ("shards", {"shards_per_client": 3}, not ALL_USED),  # 30 shards of 66 leave 20
    ("labels", {"labels_per_client": 2}, ALL_USED),  # ten clients: every one of five labels has its owner
    ("per_class", {}, not ALL_USED),
    ("per_class", {"samples": 20, "classes": [2, 4]}, not ALL_USED),
    ("target_labels", {"samples": 150}, not ALL_USED),
    ("dirichlet", {"alpha": 0.5}, ALL_USED),
    ("dirichlet", {"alpha": 0.1, "balance": False, "min_size": 1}, ALL_USED),
    ("dirichlet_prior", {"alpha": 0.01}, ALL_USED),
    ("dirichlet_prior", {"alpha": 0.3, "sigma": 0.5}, ALL_USED),
    ("quantity", {"alpha": 1.0}, ALL_USED),
    ("fedgen", {"alpha": 0.5}, not ALL_USED),
    ("natural", {}, ALL_USED),
]


def test_the_table_covers_every_partition() -> None:
    assert {name for name, _, _ in TABLE} == set(PARTITIONS)


@pytest.mark.parametrize(("name", "keys", "all_used"), TABLE)
@pytest.mark.parametrize("seed", range(5))
def test_disjoint_complete_non_empty_ascending(name: str, keys: dict[str, Any], all_used: bool, seed: int) -> None:
    labels = uneven_labels(seed)
    partition = deal(name, labels, 10, seed, **keys)
    partition.check(len(labels), 300)
    assert len(partition.train) == 10
    everything = np.concatenate(partition.train)
    assert len(np.unique(everything)) == len(everything)
    assert (len(everything) == len(labels)) == all_used
    for indices in partition.train:
        assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()


@pytest.mark.parametrize(("name", "keys", "all_used"), TABLE)
def test_the_seed_decides_and_nothing_else(name: str, keys: dict[str, Any], all_used: bool) -> None:
    labels = uneven_labels()
    first = deal(name, labels, 10, seed=1, **keys)
    assert deal(name, labels, 10, seed=1, **keys).sha256 == first.sha256
    assert deal(name, labels, 10, seed=2, **keys).sha256 != first.sha256


@pytest.mark.parametrize(("name", "keys", "all_used"), TABLE)
def test_one_client_is_possible_and_labels_are_not_changed(name: str, keys: dict[str, Any], all_used: bool) -> None:
    labels = uneven_labels()
    before = labels.copy()
    deal(name, labels, 1, **keys).check(len(labels), 300)
    assert (labels == before).all()


@pytest.mark.parametrize(("name", "keys", "all_used"), TABLE)
def test_more_clients_than_samples_is_an_error_for_the_user(name: str, keys: dict[str, Any], all_used: bool) -> None:
    with pytest.raises(BadInput, match="client"):
        deal(name, np.arange(12) % 5, 13, **keys)


@pytest.mark.parametrize("name", PARTITIONS)
def test_keys_of_the_user_are_keyword_only_and_have_defaults(name: str) -> None:
    for parameter in inspect.signature(resolve(PARTITIONS, name, "")).parameters.values():
        if parameter.name not in GIVEN:
            assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty


# --- iid and shards --------------------------------------------------------------------------------------------------
def test_iid_sizes_are_equal_up_to_one() -> None:
    """2,000 = 3 x 667 - 1: two clients have 667 and one 666."""
    assert sorted(map(len, deal("iid", uneven_labels(), 3).train)) == [666, 667, 667]


def test_shards_of_mnist() -> None:
    """60,000 samples of ten classes of 6,000, 100 clients x 2 shards: 200 shards of 300, and 6,000 / 300 = 20 shards a
    class with none across a boundary. So a client has 600 samples of one or two classes, 300 or 600 of each.
    """
    labels = rng(3).permutation(np.repeat(np.arange(10), 6000))
    partition = deal("shards", labels, 100)
    for indices in partition.train:
        counts = np.bincount(labels[indices], minlength=10)
        assert sorted(counts[counts > 0]) in ([300, 300], [600])


def test_shards_leave_out_what_fills_none() -> None:
    """2,000 samples over 7 x 3 = 21 shards: floor(2000 / 21) = 95 each, 285 a client."""
    assert {len(part) for part in deal("shards", uneven_labels(), 7, shards_per_client=3).train} == {285}


# --- labels per client -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_labels_per_client(k: int) -> None:
    """Client i has label i mod 5, exactly k labels, and the holders of a label have equal shares up to one sample."""
    labels = uneven_labels()
    counts = np.array([np.bincount(labels[part], minlength=5) for part in
                       deal("labels", labels, 10, labels_per_client=k).train])  # fmt: skip
    assert ((counts > 0).sum(axis=1) == k).all()
    assert all(counts[client, client % 5] > 0 for client in range(10))
    for column in counts.T:
        assert column[column > 0].max() - column[column > 0].min() <= 1


def test_one_label_per_client_divides_by_hand() -> None:
    """Ten clients, five labels, k = 1: clients i and i + 5 halve label i, that is 50, 100, 200, 250 and 400 each."""
    sizes = [len(part) for part in deal("labels", uneven_labels(), 10, labels_per_client=1).train]
    assert sizes == [50, 100, 200, 250, 400] * 2


def test_labels_that_nobody_draws_are_left_out() -> None:
    """Two clients with one label each hold labels 0 and 1: 100 and 200 samples."""
    assert [len(part) for part in deal("labels", uneven_labels(), 2, labels_per_client=1).train] == [100, 200]


@pytest.mark.parametrize("k", [6, 100])
def test_more_labels_than_classes(k: int) -> None:
    with pytest.raises(BadInput, match=rf"data\.partition\.labels_per_client = {k}.*5 labels"):
        deal("labels", uneven_labels(), 10, labels_per_client=k)


def test_a_label_with_fewer_samples_than_holders() -> None:
    """Label 1 has one sample and two holders (clients 1 and 3), so one of them has nothing."""
    with pytest.raises(BadInput, match=r"data\.partition\.labels_per_client"):
        deal("labels", np.array([0, 0, 0, 0, 1]), 4, labels_per_client=1)


# --- federated distillation 2018 -------------------------------------------------------------------------------------
def test_per_class_gives_exactly_that_many_of_each() -> None:
    """FedMD's i.i.d. set-up: 10 parties, 6 letters, 3 of each; all 18 samples of a party, 180 in all."""
    labels = uneven_labels()
    for indices in deal("per_class", labels, 10).train:
        assert np.bincount(labels[indices]).tolist() == [3, 3, 3, 3, 3]
    for indices in deal("per_class", labels, 5, samples=20, classes=[4, 0]).train:
        assert np.bincount(labels[indices], minlength=5).tolist() == [20, 0, 0, 0, 20]
    assert len(np.unique(np.concatenate(deal("per_class", labels, 10, samples=10).train))) == 500


def test_per_class_is_a_random_choice() -> None:
    """Which of the 100 of class 0 are dealt depends on the seed, and reaches all over the file."""
    labels = np.repeat(np.arange(2), 100)
    first, second = (np.concatenate(deal("per_class", labels, 5, seed).train) for seed in (1, 2))
    assert not np.array_equal(np.sort(first), np.sort(second))
    assert first.max() > 150 and first.min() < 50


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"samples": 11}, r"samples = 11 .* takes 110 samples, but class 0 has 100"),
        ({"classes": [7]}, r"class 7 has 0"),
        ({"classes": [1, 1]}, r"classes = \[1, 1\] names a class twice"),
        ({"samples": 0}, r"samples"),
        ({"classes": [-1]}, r"classes"),
    ],
)
def test_impossible_per_class(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=rf"data\.partition\.{said}" if "class 7" not in said else said):
        deal("per_class", uneven_labels(), 10, **keys)


def test_target_labels_of_federated_distillation() -> None:
    """60,000 / 10 classes, 10 devices: 2,000 random samples each, of which three labels keep 5 samples.

    The other seven keep theirs, about 200 each; together that leaves about 2000 x 7 / 10 + 15 = 1,415.
    """
    labels = rng(3).permutation(np.repeat(np.arange(10), 6000))
    for indices in deal("target_labels", labels, 10).train:
        counts = np.bincount(labels[indices], minlength=10)
        assert (counts == 5).sum() == 3
        assert (counts > 100).sum() == 7
        assert 1300 < len(indices) < 1530


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"samples": 201}, "samples = 201"), ({"targets": 6}, "targets = 6"), ({"targets": 5, "kept": 0}, "kept = 0")],
)
def test_impossible_target_labels(keys: dict[str, int], named: str) -> None:
    with pytest.raises(BadInput, match=rf"data\.partition\.{named}"):
        deal("target_labels", uneven_labels(), 10, **({"samples": 100} | keys))


# --- Dirichlet over clients, per class -------------------------------------------------------------------------------
def test_dirichlet_balance_closes_a_client_that_has_its_share() -> None:
    """Client sizes are at most n/N - 1 + (largest class): the last class that a client gets finds it below n/N."""
    labels = uneven_labels()
    for seed in range(20):
        sizes = [len(part) for part in deal("dirichlet", labels, 10, seed, alpha=0.1, min_size=1).train]
        assert max(sizes) <= 2000 / 10 - 1 + 800


def test_dirichlet_concentration_makes_classes_even() -> None:
    """The share of one of N clients in a class has mean 1/N and variance (1/N)(1 - 1/N) / (N alpha + 1).

    N = 10: at alpha = 1e6 the deviation is 1e-4, so a class of 800 gives 79..81 to each; at alpha = 0.1 it is 0.21.
    """
    labels = uneven_labels()

    def deviation(alpha: float) -> float:
        shares = [
            np.bincount(labels[part], minlength=5) / [100, 200, 400, 500, 800]
            for seed in range(40)
            for part in deal("dirichlet", labels, 10, seed, alpha=alpha, balance=False, min_size=1).train
        ]
        return float(np.std(shares))

    assert deviation(1e6) < 0.01
    assert deviation(1.0) == pytest.approx(np.sqrt(0.09 / 11), rel=0.1)


def test_dirichlet_respects_min_size() -> None:
    for seed in range(10):
        assert min(map(len, deal("dirichlet", uneven_labels(), 10, seed, alpha=0.3, min_size=40).train)) >= 40


@pytest.mark.parametrize("name", ["dirichlet", "fedgen", "quantity"])
def test_rejection_is_bounded_and_says_the_numbers(name: str) -> None:
    pattern = r"data\.partition\.alpha = 0\.001 .*min_size = 12 .*max_retries = 7 .*20 clients"
    with pytest.raises(BadInput, match=pattern):
        deal(name, uneven_labels(), 20, alpha=0.001, min_size=12, max_retries=7)


@pytest.mark.parametrize("alpha", [1e-300, 1e-8, 1e300])
@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_prior", "quantity"])
def test_extreme_concentrations_end(name: str, alpha: float) -> None:
    labels = uneven_labels()
    try:
        deal(name, labels, 10, alpha=alpha).check(len(labels))
    except BadInput as error:
        assert "data.partition.alpha" in str(error)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_concentrations_must_be_positive(alpha: float) -> None:
    with pytest.raises(BadInput, match=r"data\.partition\.alpha"):
        deal("dirichlet", uneven_labels(), 10, alpha=alpha)


# --- FedGen ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.05, 0.1, 1.0, 10.0])
def test_fedgen_on_mnist(alpha: float) -> None:
    """Ratio 0.5, 20 users: quota 0.5 x 60000 / 20 = 1,500; min(1500, 0.5 x 6000) = 1,500 of each of ten classes,
    15,000 in all. A user's test set: floor(1000 / 20) = 50 of every label it holds, and no other.
    """
    labels = rng(1).permutation(np.repeat(np.arange(10), 6000))
    test_labels = rng(2).permutation(np.repeat(np.arange(10), 1000))
    partition = partitions.fedgen(labels, 20, rng(), test_labels, alpha=alpha, sampling_ratio=0.5)
    partition.check(60000, 10000)
    assert (np.bincount(labels[np.concatenate(partition.train)]) == 1500).all()
    assert min(map(len, partition.train)) >= 10
    assert partition.test is not None
    for train, test in zip(partition.train, partition.test, strict=True):
        owned = np.bincount(labels[train], minlength=10) > 0
        assert (np.bincount(test_labels[test], minlength=10) == 50 * owned).all()
    tested = np.concatenate(partition.test)
    assert len(np.unique(tested)) == len(tested)


MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("alpha", "tested", "first"),
    [(0.05, 3525, [1455, 2317, 489, 410]), (0.1, 5307, [215, 1122, 340, 673]), (1.0, 9764, [751, 768, 888, 1187])],
)
def test_fedgen_as_the_script_has_it(alpha: float, tested: int, first: list[int]) -> None:
    """With its seed 42 the script leaves 5,307 test images at alpha 0.1, whatever the job's seed."""
    labels, test_labels = (np.repeat(np.arange(10), sizes) for sizes in (MNIST_TRAIN, MNIST_TEST))
    made = [partitions.fedgen(labels, 20, rng(s), test_labels, alpha=alpha, script_seed=42) for s in (0, 1)]
    assert made[0].sha256 == made[1].sha256
    train, test = made[0].train, made[0].test
    assert [len(mine) for mine in train[:4]] == first and sum(map(len, train)) == 15_000
    assert test is not None and sum(map(len, test)) == tested
    for mine, tests in zip(train, test, strict=True):
        assert set(labels[mine]) == set(test_labels[tests])
    assert len(np.unique(np.concatenate(test))) == tested


def test_fedgen_on_emnist_letters() -> None:
    """Ratio 0.1, 20 users, 26 x 4800 = 124,800: quota 624, min(624, floor(0.1 x 4800)) = 480 a class, 12,480 in all."""
    labels = np.repeat(np.arange(26), 4800)
    partition = partitions.fedgen(labels, 20, rng(), None, alpha=1.0, sampling_ratio=0.1, min_size=260)
    assert (np.bincount(labels[np.concatenate(partition.train)]) == 480).all()
    assert partition.test is None


def test_fedgen_closes_a_user_at_the_quota() -> None:
    """One class at a time goes to users below the quota of 1,500, and a class has 1,500: nobody exceeds 2,999."""
    labels = np.repeat(np.arange(10), 6000)
    for seed in range(10):
        assert max(map(len, partitions.fedgen(labels, 20, rng(seed), alpha=0.05).train)) <= 2999


def test_fedgen_unknown_test_gives_every_label() -> None:
    partition = deal("fedgen", uneven_labels(), 10, alpha=0.1, unknown_test=True, min_size=1)
    assert partition.test is not None
    assert {len(part) for part in partition.test} == {5 * (60 // 10)}


def test_fedgen_test_set_too_small() -> None:
    """60 test samples a class are not one each for 61 clients."""
    with pytest.raises(BadInput, match="test set of 300 samples"):
        deal("fedgen", np.repeat(np.arange(5), 4000), 61, alpha=1.0, sampling_ratio=1.0, min_size=1)


# --- Dirichlet over classes, per client ------------------------------------------------------------------------------
def test_dirichlet_prior_sizes_are_exact() -> None:
    """50,000 samples over 100 clients: 500 each; over 300: 50000 = 300 x 166 + 200, so 200 clients have 167."""
    labels = np.repeat(np.arange(10), 5000)
    assert {len(part) for part in deal("dirichlet_prior", labels, 100, alpha=0.05).train} == {500}
    sizes = [len(part) for part in deal("dirichlet_prior", labels, 300, alpha=0.05).train]
    assert (sizes.count(166), sizes.count(167)) == (100, 200)


def test_dirichlet_prior_sizes_are_log_normal() -> None:
    """The logarithm of a log-normal size has standard deviation sigma (rescaling only shifts it): 0.3 within 10 %."""
    sizes = [len(part) for part in deal("dirichlet_prior", np.arange(200_000) % 10, 1000, sigma=0.3).train]
    assert sum(sizes) == 200_000
    assert np.std(np.log(sizes)) == pytest.approx(0.3, rel=0.1)


def test_dirichlet_prior_follows_the_prior_while_classes_last() -> None:
    """With alpha = 1e6 every prior is uniform: a client of 2,000 has 200 of each of ten classes, within 5 deviations
    of the binomial, sqrt(2000 x 0.1 x 0.9) = 13.4.
    """
    labels = np.repeat(np.arange(10), 10_000)
    for part in deal("dirichlet_prior", labels, 50, alpha=1e6).train:
        assert abs(np.bincount(labels[part]) - 200).max() < 5 * 13.4


def test_dirichlet_prior_shares_a_class_that_runs_out_among_its_askers() -> None:
    """Two clients with one-hot priors, two classes of 10. Half the time they want different classes: each has its own
    whole. Else they share both: what one gets of the first is hypergeometric with mean 5 and 10 or 0 with probability
    2 / C(20, 10) = 1e-5. Of 400 draws, 200 are pure, with deviation sqrt(400 x 0.5 x 0.5) = 10.
    """
    labels = np.repeat([0, 1], 10)
    zeros = np.array([np.sum(labels[deal("dirichlet_prior", labels, 2, seed, alpha=1e-9).train[0]] == 0)
                      for seed in range(400)])  # fmt: skip
    pure = np.isin(zeros, (0, 10))
    assert abs(pure.sum() - 200) < 50
    assert zeros[~pure].mean() == pytest.approx(5, abs=0.5)


def test_dirichlet_prior_ends_where_the_priors_have_nothing_left() -> None:
    """Alpha so small that priors are one-hot, four clients, two classes: who wants an exhausted class takes another."""
    for seed in range(50):
        partition = deal("dirichlet_prior", np.array([0] * 30 + [1] * 10), 4, seed, alpha=1e-6)
        assert [len(part) for part in partition.train] == [10] * 4
        partition.check(40)


# --- quantity, natural -----------------------------------------------------------------------------------------------
def test_quantity_skews_sizes_and_not_labels() -> None:
    """Sizes differ, and a large client's labels are those of the whole: class 4 is 800 / 2000 = 40 %."""
    labels = uneven_labels()
    parts = sorted(deal("quantity", labels, 5, seed=4, alpha=0.5).train, key=len)
    assert len(parts[0]) >= 10 and len(parts[-1]) > 3 * len(parts[0])
    assert np.mean(labels[parts[-1]] == 4) == pytest.approx(0.4, abs=0.08)


def test_natural_clients_keep_their_order() -> None:
    owner = np.array([7, 3, 7, 9, 3])
    partition = partitions.natural(np.zeros(5, dtype=np.int64), 3, rng(), None, owner)
    assert [part.tolist() for part in partition.train] == [[1, 4], [0, 2], [3]]


def test_natural_merges_whole_owners() -> None:
    """Ten owners over four clients: 3, 3, 2 and 2 owners, each whole."""
    owner = np.arange(1000) % 10
    partition = partitions.natural(np.zeros(1000, dtype=np.int64), 4, rng(), None, owner)
    groups = [set(owner[part].tolist()) for part in partition.train]
    assert sorted(map(len, groups)) == [2, 2, 3, 3]
    assert [len(part) for part in partition.train] == [100 * len(group) for group in groups]


def test_natural_needs_owners_and_enough_of_them() -> None:
    labels = np.zeros(4, dtype=np.int64)
    with pytest.raises(BadInput, match="train/client"):
        partitions.natural(labels, 2, rng())
    with pytest.raises(BadInput, match="2 owners for 3 clients"):
        partitions.natural(labels, 3, rng(), None, np.array([0, 1, 0, 1]))


# --- the result ------------------------------------------------------------------------------------------------------
def lists(*parts: list[int]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(part, dtype=np.int64) for part in parts)


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (lists([0, 1], []), "client 1 has no train sample"),
        (lists([0, 1], [1, 2]), "more than once"),
        (lists([0, 0], [1]), "more than once"),
        (lists([0], [4]), "outside 0..3"),
        (lists([0], [-1]), "outside 0..3"),
        ((np.array([0.0]), np.array([1.0])), "not a list of integers"),
        (([0, 1], [2]), "not a list of integers"),
    ],
)
def test_check_finds_what_is_wrong(train: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        Partition(train).check(4)


def test_check_looks_at_the_test_sets() -> None:
    with pytest.raises(BadInput, match="client 0 has test samples outside"):
        Partition(lists([0], [1]), lists([3], [0])).check(2, 3)


def test_hash_tells_apart_what_joins_to_the_same() -> None:
    """The lengths and the test part are hashed too: these hold the same indices in the same order."""
    same: list[Callable[[], Partition]] = [
        lambda: Partition(lists([0, 1], [2])),
        lambda: Partition(lists([0], [1, 2])),
        lambda: Partition(lists([0, 1, 2])),
        lambda: Partition(lists([0, 1]), lists([2])),
        lambda: Partition(lists([0, 1]), ()),
    ]
    assert len({make().sha256 for make in same}) == len(same)
    assert Partition(lists([0], [1])).sha256 == Partition((np.array([0], dtype=np.int32), np.array([1]))).sha256


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own partition by import path, its key checked and filled like any other's: 2,000 - 5 over 3 clients."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "first_come" in block)
    (tmp_path / "my_partitions.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    function = resolve(PARTITIONS, "my_partitions:first_come", "data.partition.name")
    keys = bind(function, {"skip": 5}, "data.partition", given=GIVEN)
    partition = function(uneven_labels(), 3, rng(), None, **keys)
    partition.check(2000)
    assert [len(part) for part in partition.train] == [665] * 3
    with pytest.raises(BadInput, match="skp"):
        bind(function, {"skp": 5}, "data.partition", given=GIVEN)
