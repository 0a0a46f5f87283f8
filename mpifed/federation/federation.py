"""What a rank makes of a job before round 1: data, partition, roster, environment; its clients' samples later."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpifed.algorithms.base import Algorithm, Model, field_names
from mpifed.codecs import Codec, make
from mpifed.comm.communicator import Communicator
from mpifed.comm.imagined import Imagined
from mpifed.comm.routes import Nodes, Route
from mpifed.component import accepts
from mpifed.data.partition import Partition
from mpifed.data.public import Public, Relabelled, Rest
from mpifed.data.selection import Selected
from mpifed.data.source import Rows, Source, Split, part, shared
from mpifed.errors import BadInput
from mpifed.federation.agreement import on_every_rank
from mpifed.federation.env import RunEnv, choose_device, crowded, identity
from mpifed.federation.load import load
from mpifed.federation.roster import Roster
from mpifed.job import Job
from mpifed.learning.local import HEAD
from mpifed.memory import return_freed_memory
from mpifed.rng import numpy_generator

log = logging.getLogger("mpifed")

Tests: TypeAlias = tuple[Tensor | Rows, Tensor]
"""Samples as stored, all at once or batch by batch, and their labels."""


@dataclass
class Federation:
    """A job set up on this rank."""

    job: Job
    comm: Communicator
    algorithm: Algorithm
    source: Source | None  # None once this rank has taken its samples
    histogram: npt.NDArray[np.int64]  # training samples of each client by class, [clients, classes]
    partition: Partition
    roster: Roster
    env: RunEnv
    hosts: list[str]
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _own_tests: dict[int, Tests] = field(default_factory=dict)
    _settled: bool = False

    @classmethod
    def build(cls, job: Job, comm: Communicator) -> Federation:
        """Set up everything but states. Raises BadInput, the same on every rank, where the job cannot be run."""
        torch.set_num_threads(job.threads)
        hosts = comm.find_nodes()
        device = agree_on_device(job, comm, hosts)
        share = job.data.share == "auto"
        sets = [load(comm, make) if share else on_every_rank(comm, make) for make in _data_sets(job)]
        federation: Federation = on_every_rank(comm, lambda: cls._build(job, comm, hosts, device, sets))
        return federation

    @classmethod
    def planned(cls, job: Job, hosts: Sequence[str]) -> Federation:
        """The same for a plan, as rank 0 of ranks on these hosts would have it, without any rank but this process."""
        torch.set_num_threads(job.threads)
        sets = [make() for make in _data_sets(job)]
        comm = Imagined(len(hosts))
        comm.nodes = Nodes.of(hosts)
        return cls._build(job, comm, list(hosts), choose_device(job.device, 0), sets)

    @classmethod
    def _build(
        cls, job: Job, comm: Communicator, hosts: list[str], device: torch.device, sets: Sequence[Source]
    ) -> Federation:
        algorithm: Algorithm = job.algorithm.make()
        source, public = divide(job, *sets, device=device)
        partition = make_partition(job, source)
        if algorithm.pooled:
            everything = np.sort(np.concatenate(partition.train))
            partition = Partition((everything,) * job.architectures)
        if public is not None and job.data.public_classes == "union":
            source = Relabelled(source, public.classes)
        elif public is not None and _learns_from(job) and public.classes > source.spec.classes:
            raise BadInput(
                f"transfer.public_epochs: the public set has {public.classes} classes and the private one "
                f"{source.spec.classes}, so that models have no output for all public labels; set "
                'data.public_classes = "union", or transfer.public_epochs = 0'
            )
        env = RunEnv(job, source.spec, len(partition.train), device, public)
        _check_names(job, algorithm, env)
        for table in ("codec", "collectives"):
            _check_fields(table, getattr(job, table), job, algorithm, env)
        roster = Roster(
            seed=job.seed,
            ranks=comm.size,
            examples=[len(indices) for indices in partition.train],
            participation=1.0 if algorithm.pooled else job.participation,
            sampling=job.sampling,
            stateful=algorithm.stateful or _kept_beside(job, algorithm, env),
        )
        env.model()  # an unfit model is found here, before round 1
        hosted = roster.deal(range(roster.clients)).by_rank[comm.rank]
        for client in {id(env.model(client)): client for client in hosted}.values():  # one of each architecture
            algorithm.check_models(env, client)
            _check_head(job, env.model(client))
        classes = source.spec.classes
        histogram = np.stack([np.bincount(source.train_labels[mine], minlength=classes) for mine in partition.train])
        return cls(job, comm, algorithm, source, histogram, partition, roster, env, hosts)

    @property
    def clients(self) -> int:
        return self.roster.clients

    @cached_property
    def mean_examples(self) -> float:
        return sum(self.roster.examples) / self.clients

    def settle(self) -> None:
        """Take the samples that this rank needs, and let go of the data set where it needs no others.

        That is so where every client stays on its rank. Where clients are dealt anew each round, any rank may train any
        client: then their samples are taken round by round, from the file or from a copy of the set on each rank. What
        the ranks of a node share is one copy already, and samples are taken out of it when they are wanted.
        """
        if self._settled or self.source is None:
            return
        self._settled = True
        if self.job.data.share == "auto" and len(set(self.hosts)) < self.comm.size:
            self._share()
        if shared(self.source):
            if self.job.evaluate.own:
                own = self._own_test_indices()
                self._own_tests = {client: _rows(self.source, "test", own[client]) for client in self._hosted}
            return
        tests_server = self.algorithm.evaluates != "clients" and self.comm.rank == 0
        tests_clients = self.algorithm.evaluates != "server" and self.comm.rank in self.roster.hosts
        if tests_server or tests_clients:
            self.test_set  # noqa: B018  (kept from here on)
        if self.job.evaluate.own:
            own = self._own_test_indices()
            self._own_tests = {client: self.source.take("test", own[client]) for client in self._hosted}
        if self.roster.fixed:
            for client in self._hosted:
                self._kept[client] = self.source.take("train", self.partition.train[client])
            self.source = None
            return_freed_memory()

    def _share(self) -> None:
        """One copy a node of what every rank would keep of a source that is not shared: on all ranks, or on none."""
        assert self.source is not None
        source, public = self.source, self.env.public
        if self.algorithm.evaluates != "server" and self._anywhere(not shared(source)):
            everything = np.arange(len(source.test_labels))
            tests = load(self.comm, lambda: part(source, "test", everything))
            self.test_set = _rows(tests, "train", everything)
        if isinstance(public, Public) and self._anywhere(not public.at_hand):
            public.share(partial(load, self.comm))

    def _anywhere(self, lacking: bool) -> bool:
        return self.comm.agree("lacking" if lacking else None) is not None

    @cached_property
    def _hosted(self) -> tuple[int, ...]:
        """The clients of this rank, when all take part."""
        return self.roster.deal(range(self.clients)).by_rank[self.comm.rank]

    def own_tests(self) -> dict[int, Tests]:
        """With `evaluate.own`, the own test samples, as stored, of every client that this rank hosts."""
        return self._own_tests

    def _own_test_indices(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Those of the partition, or, where it gives none, all test samples of the labels that a client trains on."""
        if self.partition.test is not None:
            return self.partition.test
        assert self.source is not None
        labels = self.source.test_labels
        return tuple(np.flatnonzero(row[labels] > 0) for row in self.histogram)

    def samples(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's training samples on the device: x `[n, *input_shape]` as models take it, and y int64 `[n]`."""
        if self.source is None:
            x, y = self._kept[client]
        else:
            x, y = self.source.take("train", self.partition.train[client])
        return self.env.spec.standardise(x.to(self.env.device)), y.to(self.env.device)

    @cached_property
    def test_set(self) -> Tests:
        """The whole test set as stored: x `[n, *input_shape]` and y int64 `[n]`."""
        assert self.source is not None, "this rank tests no model"
        everything = np.arange(len(self.source.test_labels))
        return _rows(self.source, "test", everything) if shared(self.source) else self.source.take("test", everything)

    def codec(self, direction: str, name: str) -> Codec:
        """The codec of one exchanged field."""
        return _codec(self.job.codec_of(direction, name), f"codec.{direction}.{name}")  # type: ignore[arg-type]

    def route(self, direction: str, name: str) -> Route:
        """The route of one exchanged field."""
        return cast(Route, self.job.route_of(direction, name))  # type: ignore[arg-type]


def _rows(source: Source, split: Split, indices: npt.NDArray[np.int64]) -> Tests:
    labels = source.train_labels if split == "train" else source.test_labels
    return Rows(source, split, indices), torch.from_numpy(labels[indices])


def agree_on_device(job: Job, comm: Communicator, hosts: Sequence[str]) -> torch.device:
    """This rank's device. Where ranks would share a GPU unasked, `auto` is the CPU everywhere, and `cuda` BadInput."""
    local_rank = hosts[: comm.rank].count(hosts[comm.rank])
    device: torch.device = on_every_rank(comm, lambda: choose_device(job.device, local_rank))
    said = comm.gather_bytes(identity(device).encode())
    problem = comm.broadcast_json(None if said is None else crowded(hosts, [gpu.decode() for gpu in said]))
    if problem and not job.share_gpus:
        if job.device == "cuda":
            raise BadInput(f"device: {problem}; start fewer ranks there, or share them with share_gpus=true")
        if comm.rank == 0:
            log.info("%s: training on the CPU; share_gpus=true would share them", problem)
        return torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _learns_from(job: Job) -> bool:
    """Whether the labels of the public set are learnt from, and not its samples alone."""
    return job.transfer is not None and job.transfer.public_epochs > 0


def _check_names(job: Job, algorithm: Algorithm, env: RunEnv) -> None:
    """Raise BadInput where a phase or a field has a name that the ledger cannot hold."""
    phases = algorithm.phases(env)
    for name in (*(phase.name for phase in phases), *(name for _, name in field_names(phases))):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise BadInput(
                f"algorithm.name: {job.algorithm.name} names a phase or field '{name}'; use letters, digits, _, -"
            )


def _check_fields(table: str, by_field: str | Mapping[str, str], job: Job, algorithm: Algorithm, env: RunEnv) -> None:
    """Raise BadInput where a table of the job names a field that the algorithm does not exchange."""
    known = dict.fromkeys(f"{way}.{name}" for way, name in field_names(algorithm.phases(env)))
    for name in {} if isinstance(by_field, str) else by_field:
        if "." in name and name not in known:
            raise BadInput(
                f"{table}.{name}: {job.algorithm.name} exchanges no such field; known: {', '.join(known) or 'none'}"
            )


def _check_head(job: Job, model: Model) -> None:
    """Raise BadInput where the head is to decay and the model has none."""
    if job.local.head_decay and HEAD not in model.layout.names:
        raise BadInput(
            f"local.head_decay: {type(model.module).__name__} has no trained '{HEAD}'; set it to 0, or call the model's"
            " last layer `head`"
        )


def _kept_beside(job: Job, algorithm: Algorithm, env: RunEnv) -> bool:
    """Clients keep something that is not the algorithm's: their own running statistics, or a codec's memory."""
    if env.own_buffers and env.model().buffer_layout.size > 0:
        return True
    names = dict.fromkeys(name for direction, name in field_names(algorithm.phases(env)) if direction == "up")
    return any(_codec(job.codec_of("up", name), f"codec.up.{name}").stateful for name in names)


@lru_cache(maxsize=64)
def _codec(text: str, key: str) -> Codec:
    return make(text, key)


def _data_sets(job: Job) -> list[Callable[[], Source]]:
    """What reads the job's private data set, and its public one where `[data.public]` names one."""
    public = job.data.public
    return [job.data.make] if public is None else [job.data.make, partial(public.make, job.data.root)]


def divide(
    job: Job, source: Source, public: Source | None = None, *, device: torch.device
) -> tuple[Source, Public | None]:
    """The job's private data set and its public one, `public` the one of `[data.public]`. Raises BadInput where they do
    not fit each other."""
    source = Selected(source, job.data.only_classes) if job.data.only_classes else source
    table, held_out = job.data.public, job.data.public_held_out
    if held_out:
        order = numpy_generator(job.seed, "public").permutation(len(source.train_labels))
        samples = round(held_out * len(order))
        if not 0 < samples < len(order):
            raise BadInput(f"data.public_held_out: {held_out} of {len(order)} samples are {samples}; choose another")
        return Rest(source, np.sort(order[samples:])), Public(source, np.sort(order[:samples]), device)
    if table is None or public is None:
        return source, None
    if public.spec.input_shape != source.spec.input_shape:
        raise BadInput(
            f"data.public.name: '{table.name}' has samples of shape {public.spec.input_shape}, but '{job.data.name}' "
            f"of {source.spec.input_shape}; choose a public data set of the same shape"
        )
    if public.spec.vocabulary or source.spec.vocabulary:
        raise BadInput(
            f"data.public.name: '{table.name}' beside '{job.data.name}': a text's token ids are those of its own "
            "data set, so that no other can be public beside it; hold out a part of it, data.public_held_out"
        )
    samples = len(public.train_labels)
    most = job.data.public_samples or samples
    if most > samples:
        raise BadInput(f"data.public_samples: '{table.name}' has only {samples} samples, but the job says {most}")
    chosen = np.sort(numpy_generator(job.seed, "public").permutation(samples)[:most])
    return source, Public(public, chosen, device)


def make_partition(job: Job, source: Source) -> Partition:
    """Who holds what: a function of the data's labels, the seed and the job. Raises BadInput."""
    table = job.data.partition
    given: dict[str, Any] = {}
    if accepts(table.target, "owner"):
        given["owner"] = source.train_owner
    partition: Partition = table.target(
        source.train_labels,
        job.clients,
        numpy_generator(job.seed, "partition"),
        source.test_labels,
        **given,
        **table.parameters,
    )
    partition.check(len(source.train_labels), len(source.test_labels))
    if len(partition.train) != job.clients:
        raise BadInput(
            f"data.partition.name: '{table.name}' made {len(partition.train)} clients, not clients = {job.clients}"
        )
    return partition
