"""The data set of a job, read once a node: by the first rank on it, for all of them.

A set that its source keeps in memory (`ArraySource`: CIFAR, SVHN, the texts, one's own) becomes one copy in shared
memory (`mpifed.data.shared`). One that is mapped from files (MNIST and its like) is one copy in the page cache. Any
other holds next to nothing, and every rank makes its own (HDF5, synthetic).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mpifed.comm.communicator import Communicator
from mpifed.data.shared import Published, Unshareable, attach
from mpifed.data.source import ArraySource, Source
from mpifed.federation.agreement import on_every_rank
from mpifed.memory import return_freed_memory
from mpifed.types import DataSpec

log = logging.getLogger("mpifed")


def load(comm: Communicator, make: Callable[[], Source]) -> Source:
    """What `make` returns, on every rank, in one copy a node (`comm.nodes`) where that can be: it is then `shared`.

    Where ranks of a node cannot share memory, they make their own copies, and rank 0 says why. Raises BadInput, the
    same on every rank, where `make` does on one.
    """
    node = comm.nodes.group(comm.rank)
    first, several = node[0], len(node) > 1
    leads = comm.rank == first
    source: Source | None = on_every_rank(comm, make if leads else lambda: None)
    published: Published | None = None
    said: dict[str, Any] = {}
    if type(source) is ArraySource and several and not source.mapped:
        try:
            published = Published(source.arrays())
            said = {"where": published.where, "spec": asdict(source.spec)}
        except Unshareable as error:
            said = {"problem": str(error)}
    said = comm.broadcast_json(comm.gather_json(said))[first]
    problem = said.get("problem")
    if "where" in said:
        try:
            source = _attached(said)
        except Unshareable as error:
            problem = str(error)
    agreed = comm.agree(problem and f"{problem} on {comm.host()}")  # by now all have attached who can
    if agreed and comm.rank == 0:
        log.info("data.share: ranks of one node keep a copy each of the data set: %s", agreed)
    if published is not None:
        published.close()
        return_freed_memory()  # the copy that was read
    made: Source = on_every_rank(comm, lambda: make() if source is None else source)
    if type(made) is ArraySource and several and made.mapped:
        made.shared = True
    return made


def _attached(said: dict[str, Any]) -> ArraySource:
    """The source of another rank of the node, over its memory."""
    spec: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in said["spec"].items()
    }
    return ArraySource(DataSpec(**spec), **attach(said["where"]), shared=True)
