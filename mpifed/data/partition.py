"""How a data set is dealt to clients: pure functions of labels and a random generator that return index lists.

Every function has the same form:

    partition(labels, clients, rng, test_labels=None, *, <keys of the job's [data.partition] table>) -> Partition

with `labels` int64 `[train samples]`, `rng` a generator seeded for this purpose, and `test_labels` int64
`[test samples]` for those protocols that give each client a test set as well; `natural` also takes the samples'
`owner`. Everything before the `*` comes from the program, everything after it from the user.

Sources: McMahan et al. 2017, arXiv:1602.05629 (`shards`); Li, Diao, Chen, He 2022, "Federated learning on non-IID data
silos", arXiv:2102.02079, and its code NIID-Bench (`dirichlet`, `labels_per_client`, `quantity`); Acar et al. 2021,
arXiv:2111.04263 (`dirichlet_prior`, also FedFTG's); Zhu, Hong, Zhou 2021, arXiv:2105.10056, and its code (`fedgen`);
Jeong et al. 2018, arXiv:1811.11479 (`target_labels`); Caldas et al. 2018, arXiv:1812.01097 (`natural`); Li, Wang 2019,
arXiv:1910.03581 (`per_class`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mpifed.errors import BadInput

Concentration = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Partition:
    """Which samples each client holds: int64 index lists, ascending, one per client, of the training set and,
    where the protocol gives clients a test set of their own, of the test set."""

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...] | None = None

    @property
    def sha256(self) -> str:
        """A hash of all lists (lengths and indices as little-endian int64), to be recorded with a run."""
        digest = hashlib.sha256()
        for lists in (self.train, self.test):
            digest.update(np.array(-1 if lists is None else len(lists), dtype="<i8").tobytes())
            for indices in lists or ():
                digest.update(np.array(len(indices), dtype="<i8").tobytes())
                digest.update(np.ascontiguousarray(indices, dtype="<i8").tobytes())
        return digest.hexdigest()

    def check(self, train_samples: int, test_samples: int | None = None) -> None:
        """Raise `BadInput` unless every client has samples, all exist, and no training sample is dealt twice.

        The program calls it on every partition, since a partition may be the user's own.
        """
        for what, lists, samples in (("train", self.train, train_samples), ("test", self.test, test_samples)):
            if lists is None or samples is None:
                continue
            for client, indices in enumerate(lists):
                if not isinstance(indices, np.ndarray) or indices.ndim != 1 or indices.dtype.kind not in "iu":
                    raise BadInput(f"data.partition: client {client}'s {what} samples are not a list of integers [n]")
                if len(indices) == 0:
                    raise BadInput(f"data.partition: client {client} has no {what} sample; use fewer clients")
                if indices.min() < 0 or indices.max() >= samples:
                    raise BadInput(f"data.partition: client {client} has {what} samples outside 0..{samples - 1}")
        everything = np.concatenate(self.train)
        if np.bincount(everything, minlength=1).max() > 1:
            raise BadInput("data.partition: a train sample is dealt more than once; deal each to one client")


# --- equal shares -----------------------------------------------------------------------------------------------------
def iid(labels: np.ndarray, clients: int, rng: np.random.Generator, test_labels: np.ndarray | None = None) -> Partition:
    """A random deal: all samples, sizes equal up to one."""
    _enough(labels, clients)
    return _partition(np.array_split(rng.permutation(len(labels)), clients))


def shards(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    shards_per_client: Annotated[int, Field(ge=1)] = 2,
) -> Partition:
    """McMahan's pathological split: sort by label, cut into clients * shards_per_client equal shards, deal at random.

    MNIST with 100 clients and 2 shards: 200 shards of 300. Samples that do not fill a shard are left out.
    """
    count = clients * shards_per_client
    size = len(labels) // count
    if size == 0:
        raise BadInput(
            f"data.partition.shards_per_client = {shards_per_client} with {clients} clients makes {count} shards, "
            f"but there are only {len(labels)} samples; lower one of the two"
        )
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    dealt = by_label[: count * size].reshape(count, size)[rng.permutation(count)]
    return _partition(list(dealt.reshape(clients, shards_per_client * size)))


def per_class(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    samples: Annotated[int, Field(ge=1)] = 3,
    classes: tuple[Annotated[int, Field(ge=0)], ...] = (),
) -> Partition:
    """FedMD's i.i.d. split: exactly `samples` random ones of each class for every client; the rest is left out.

    `classes` restricts it to those labels; empty means every label that the training set has.
    """
    present, sizes = np.unique(labels, return_counts=True)
    size_of = dict(zip(present.tolist(), sizes.tolist(), strict=True))
    wanted = sorted(classes) or present.tolist()
    if len(set(wanted)) < len(wanted):
        raise BadInput(f"data.partition.classes = {list(classes)} names a class twice; name each once")
    for label in wanted:
        if size_of.get(label, 0) < clients * samples:
            raise BadInput(
                f"data.partition.samples = {samples} of each class for each of {clients} clients takes "
                f"{clients * samples} samples, but class {label} has {size_of.get(label, 0)}; lower it, use fewer "
                "clients, or name the classes to use in data.partition.classes"
            )
    return _deal(labels, np.array(wanted), np.full((len(wanted), clients), samples), rng)


# --- label skew -------------------------------------------------------------------------------------------------------
def labels_per_client(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    labels_per_client: Annotated[int, Field(ge=1)] = 2,
) -> Partition:
    """NIID-Bench's `#C = k`: client i has label i mod L and k - 1 random others; its holders share a label equally.

    Sizes differ, and with fewer clients than labels the samples of a label that nobody drew are left out.
    """
    _enough(labels, clients)
    classes = np.unique(labels)
    if labels_per_client > len(classes):
        raise BadInput(
            f"data.partition.labels_per_client = {labels_per_client}, but the data set has {len(classes)} labels; "
            "lower it"
        )
    holders: list[list[int]] = [[] for _ in classes]
    for client in range(clients):
        own = client % len(classes)
        others = rng.permutation(np.delete(np.arange(len(classes)), own))[: labels_per_client - 1]
        for position in (own, *others):
            holders[position].append(client)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, owners in zip(classes, holders, strict=True):
        if owners:
            shares = np.array_split(rng.permutation(np.flatnonzero(labels == label)), len(owners))
            # The first shares are the larger ones: deal them in random order, so that no client gains by its number.
            for client, share in zip(rng.permutation(owners), shares, strict=True):
                parts[client].append(share)
    joined = [np.concatenate(part) for part in parts]
    if min(map(len, joined)) == 0:
        raise BadInput(
            f"data.partition.labels_per_client = {labels_per_client}: some label has fewer samples than the clients "
            f"that share it, and one of the {clients} clients got none; use fewer clients or more labels per client"
        )
    return _partition(joined)


def target_labels(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    samples: Annotated[int, Field(ge=1)] = 2000,
    targets: Annotated[int, Field(ge=0)] = 3,
    kept: Annotated[int, Field(ge=0)] = 5,
) -> Partition:
    """The split of federated distillation (2018): `samples` random ones a device, of which `targets` random labels are
    then cut to at most `kept` samples each.

    The paper draws from the 55,000 MNIST samples that remain beside a validation set of 5,000; here from all that there
    are. Devices share no sample, which the paper does not say.
    """
    classes = np.unique(labels)
    if clients * samples > len(labels):
        raise BadInput(
            f"data.partition.samples = {samples} for each of {clients} clients is more than the {len(labels)} there "
            "are; lower it or use fewer clients"
        )
    if targets > len(classes):
        raise BadInput(f"data.partition.targets = {targets}, but the data set has {len(classes)} labels; lower it")
    parts = []
    for indices in rng.permutation(len(labels))[: clients * samples].reshape(clients, samples):
        keep = np.ones(samples, dtype=bool)
        for label in rng.choice(classes, targets, replace=False):
            keep[np.flatnonzero(labels[indices] == label)[kept:]] = False
        if not keep.any():
            raise BadInput(
                f"data.partition.kept = {kept} with targets = {targets} leaves a client with no sample; "
                "raise kept or lower targets"
            )
        parts.append(indices[keep])
    return _partition(parts)


def dirichlet(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    alpha: Concentration = 0.5,
    balance: bool = True,
    min_size: Annotated[int, Field(ge=1)] = 10,
    max_retries: Annotated[int, Field(ge=1)] = 1000,
) -> Partition:
    """NIID-Bench's split by class: each class is shared out by its own proportions ~ Dir(alpha) over the CLIENTS.

    All samples are used; sizes differ. With `balance`, a client that holds its equal share (samples / clients) or more
    gets nothing of the classes still to come. The whole draw is repeated until every client has `min_size` samples.
    """
    _enough(labels, clients, min_size)
    classes, class_sizes = np.unique(labels, return_counts=True)
    counts = _share_classes(
        class_sizes, clients, rng, alpha, len(labels) / clients if balance else np.inf, min_size, max_retries
    )
    return _deal(labels, classes, counts, rng)


def fedgen(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    alpha: Concentration = 0.1,
    sampling_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5,
    min_size: Annotated[int, Field(ge=1)] = 10,
    unknown_test: bool = False,
    max_retries: Annotated[int, Field(ge=1)] = 1000,
    script_seed: Annotated[int, Field(ge=0)] | None = None,
) -> Partition:
    """The split of FedGen's published code: `dirichlet` on a part of the data, and a test set for every client.

    With quota = sampling_ratio * samples / clients, min(quota, floor(sampling_ratio * class size)) samples of each
    class are used and shared by Dir(alpha) over the clients, a client that holds the quota being closed. The quota is
    one client's, so MNIST at 0.5 with 20 clients uses 1,500 of each digit, 15,000 in all. A client's test set is
    floor(n / clients) of the n test samples of every label it trains on (`unknown_test`: of every label). The authors
    repeat the draw until the smallest client has 10 samples (MNIST) or 260 (EMNIST, 26 labels).

    With `script_seed` it is what their script for MNIST makes with that seed (42, in the script), sample by sample,
    whatever the job's seed: from Python's and numpy's old generators, drawn from in the script's order.
    """
    classes, class_sizes = np.unique(labels, return_counts=True)
    quota = sampling_ratio * len(labels) / clients
    used = np.floor(np.minimum(quota, np.floor(sampling_ratio * class_sizes))).astype(np.int64)
    if used.sum() < clients * min_size:
        raise BadInput(
            f"data.partition.sampling_ratio = {sampling_ratio} leaves {used.sum()} of {len(labels)} samples, too few "
            f"for {clients} clients of at least {min_size} (data.partition.min_size); raise it or use fewer clients"
        )
    if script_seed is None:
        counts = _share_classes(used, clients, rng, alpha, quota, min_size, max_retries)
        train = _deal(labels, classes, counts, rng).train
    else:
        counts, train = _fedgen_script(labels, classes, used, clients, script_seed, alpha, quota, min_size, max_retries)
    if test_labels is None:
        return Partition(train)
    slices: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, row in zip(classes, counts, strict=True):
        order = np.flatnonzero(test_labels == label)
        size = len(order) // clients
        holders = [client for client in range(clients) if unknown_test or row[client] > 0]
        if script_seed is None:
            order, places = rng.permutation(order), holders
        else:
            places = list(range(len(holders)))
        for client, place in zip(holders, places, strict=True):
            slices[client].append(order[place * size : (place + 1) * size])
    test = [np.concatenate(parts) for parts in slices]
    if min(map(len, test)) == 0:
        raise BadInput(
            f"data.partition: the test set of {len(test_labels)} samples is too small to give each of {clients} "
            "clients one of a label it trains on; use fewer clients"
        )
    return Partition(train, _partition(test).train)


def _fedgen_script(
    labels: np.ndarray,
    classes: np.ndarray,
    used: np.ndarray,
    clients: int,
    seed: int,
    alpha: float,
    quota: float,
    min_size: int,
    max_retries: int,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Numbers `[classes, clients]` and samples of every client, as the script draws them: classes in an order of their
    own, and for each a shuffle of its samples and then the clients' shares, all again with every new try."""
    random_order = list(range(len(classes)))
    random.Random(seed).shuffle(random_order)
    old = np.random.RandomState(seed)
    for _ in range(max_retries):
        counts = np.zeros((len(classes), clients), dtype=np.int64)
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for row in random_order:
            samples = old.permutation(np.flatnonzero(labels == classes[row]))[: used[row]]
            share = old.dirichlet(np.repeat(alpha, clients)) * (counts.sum(axis=0) < quota)
            edges = (np.cumsum(share / share.sum()) * used[row]).astype(np.int64)[:-1]
            for client, part in enumerate(np.split(samples, edges)):
                parts[client].append(part)
                counts[row, client] = len(part)
        if counts.sum(axis=0).min() >= min_size:
            return counts, _partition([np.concatenate(part) for part in parts]).train
    raise BadInput(
        f"data.partition.script_seed = {seed} gives no client fewer than data.partition.min_size = {min_size} samples "
        f"in none of data.partition.max_retries = {max_retries} draws; leave it out, or lower min_size"
    )


def dirichlet_prior(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    alpha: Concentration = 0.3,
    sigma: Annotated[float, Field(ge=0, le=10)] = 0.0,
) -> Partition:
    """FedDyn's and FedFTG's split by client: each has its own prior ~ Dir(alpha) over the CLASSES, and a fixed size.

    Sizes are equal (up to one) or, with `sigma` > 0, log-normal with that spread and rescaled; every sample is used
    once. The authors draw one sample at a time for a random client that is not full, and again where the class has run
    out, which may never end. Here all clients draw all they lack at once from their priors over the classes that are
    left, and where a class is asked for more than it has, random askers get it and the others draw again: at most as
    many turns as there are classes. The two agree until classes run out; the tails differ. A client whose prior has
    nothing left draws from what is there.
    """
    _enough(labels, clients)
    classes, available = np.unique(labels, return_counts=True)
    missing = _log_normal_sizes(len(labels), clients, sigma, rng)
    priors = rng.dirichlet(np.full(len(classes), alpha), clients)  # [clients, classes]
    counts = np.zeros((len(classes), clients), dtype=np.int64)
    while missing.any():
        left = np.flatnonzero(available)
        weights = priors[:, left]
        total = weights.sum(axis=1, keepdims=True)
        stuck = ~(np.isfinite(total) & (total > 0))
        weights = np.where(stuck, available[left] / available.sum(), weights / np.where(stuck, 1.0, total))
        asked = rng.multinomial(missing, weights)  # [clients, classes left]
        for column, position in enumerate(left):
            got = asked[:, column]
            if got.sum() > available[position]:
                got = rng.multivariate_hypergeometric(got, available[position], method="marginals")
            counts[position] += got
            missing -= got
            available[position] -= got.sum()
    return _deal(labels, classes, counts, rng)


# --- quantity skew and natural clients --------------------------------------------------------------------------------
def quantity(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    *,
    alpha: Concentration = 0.5,
    min_size: Annotated[int, Field(ge=1)] = 10,
    max_retries: Annotated[int, Field(ge=1)] = 1000,
) -> Partition:
    """NIID-Bench's quantity skew: a random deal, sizes ~ Dir(alpha) (its beta), redrawn until all have `min_size`."""
    _enough(labels, clients, min_size)
    counts = _share_classes(np.array([len(labels)]), clients, rng, alpha, np.inf, min_size, max_retries)
    return _partition(np.split(rng.permutation(len(labels)), np.cumsum(counts[0])[:-1]))


def natural(
    labels: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    test_labels: np.ndarray | None = None,
    owner: np.ndarray | None = None,
) -> Partition:
    """By who the samples came from (`owner` int64 `[train samples]`, a source's `train_owner`).

    With as many clients as owners, client i is the i-th owner in ascending order; with fewer, owners are dealt whole
    and at random, as evenly in number as they go.
    """
    if owner is None:
        raise BadInput("data.partition.name = 'natural' needs a data set that says who each sample came from "
                       "(HDF5: train/client); choose another partition or add it")  # fmt: skip
    owners, rank = np.unique(owner, return_inverse=True)
    if clients > len(owners):
        raise BadInput(f"data.partition.name = 'natural': the data set has {len(owners)} owners for {clients} clients; "
                       "use at most as many clients")  # fmt: skip
    client_of_owner = np.arange(len(owners)) % clients  # as many as clients: the owner's rank, one each
    if clients < len(owners):
        client_of_owner = rng.permutation(client_of_owner)
    client = client_of_owner[rank]
    ends = np.cumsum(np.bincount(client, minlength=clients))
    return _partition(np.split(np.argsort(client, kind="stable"), ends[:-1]))


# --- shared -----------------------------------------------------------------------------------------------------------
def _enough(labels: np.ndarray, clients: int, min_size: int = 1) -> None:
    if clients * min_size > len(labels):
        least = f" of at least {min_size} samples (data.partition.min_size)" if min_size > 1 else ""
        raise BadInput(f"{clients} clients{least} cannot share {len(labels)} samples; use fewer clients")


def _partition(lists: Sequence[np.ndarray]) -> Partition:
    """Ascending lists: the hash depends on who has what alone, and files are read forwards."""
    return Partition(tuple(np.sort(indices).astype(np.int64) for indices in lists))


def _deal(labels: np.ndarray, classes: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> Partition:
    """`counts[class, client]` random samples of every class to every client."""
    parts: list[list[np.ndarray]] = [[] for _ in range(counts.shape[1])]
    for label, row in zip(classes, counts, strict=True):
        order = rng.permutation(np.flatnonzero(labels == label))[: row.sum()]
        for client, part in enumerate(np.split(order, np.cumsum(row)[:-1])):
            parts[client].append(part)
    return _partition([np.concatenate(part) for part in parts])


def _share_classes(
    class_sizes: np.ndarray,
    clients: int,
    rng: np.random.Generator,
    alpha: float,
    quota: float,
    min_size: int,
    max_retries: int,
) -> np.ndarray:
    """How many samples of each class every client gets, int64 `[classes, clients]`: Dir(alpha) over clients per class.

    Classes come in ascending order; a client that holds `quota` or more is closed for the rest. Only numbers are
    redrawn until every client has `min_size`: which samples they are does not depend on them.
    """
    smallest = 0
    for _ in range(max_retries):
        counts = np.zeros((len(class_sizes), clients), dtype=np.int64)
        held = np.zeros(clients, dtype=np.int64)
        for row, size in zip(counts, class_sizes, strict=True):
            share = rng.dirichlet(np.full(clients, alpha)) * (held < quota)
            edges = np.cumsum(share)
            if not (np.isfinite(edges[-1]) and edges[-1] > 0):
                break  # a small alpha gave everything to clients that are closed: draw again
            row[:] = np.diff(np.floor(edges / edges[-1] * size).astype(np.int64), prepend=0)
            held += row
        else:
            if held.min() >= min_size:
                return counts
            smallest = max(smallest, int(held.min()))
    raise BadInput(
        f"data.partition.alpha = {alpha} gave some client fewer than data.partition.min_size = {min_size} samples in "
        f"each of data.partition.max_retries = {max_retries} draws ({class_sizes.sum()} samples, {clients} clients; "
        f"the best draw had {smallest}); raise alpha or max_retries, or lower min_size or the number of clients"
    )


def _log_normal_sizes(samples: int, clients: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Sizes that add up to `samples`, each at least 1, as log-normal draws have it (equal at sigma 0, up to one)."""
    weights = rng.lognormal(0.0, sigma, clients) if sigma > 0 else np.ones(clients)
    exact = weights / weights.sum() * (samples - clients)
    sizes = np.floor(exact).astype(np.int64)
    sizes[np.argsort(sizes - exact, kind="stable")[: samples - clients - sizes.sum()]] += 1  # largest remainders
    return sizes + 1
