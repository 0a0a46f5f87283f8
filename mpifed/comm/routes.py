"""Along which tree of ranks a message goes, where that is not left to the MPI library. A leaf: plain numbers.

- `library`: MPI's own collective; the library chooses, by size and by ranks, and does not say what.
- `flat`: rank 0 sends to every rank, and receives from every rank, by itself.
- `tree`: a binomial tree over all ranks, whatever node they are on: rank 0 sends to log2(n) others, which pass it on.
- `hierarchical`: a binomial tree over the nodes' first ranks, their leaders, then one over the ranks of each node: what
  is for all of a node, or the sum of its ranks, crosses the network once.

A copy for everybody, or a sum, is of one size wherever it goes. Where every rank has a part of its own, to be gathered
or dealt out, passing on adds to what crosses the network: there `tree` is `flat`, and `hierarchical` is a node's ranks
to their leader, and all leaders to rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias

Route: TypeAlias = Literal["library", "flat", "tree", "hierarchical"]


@dataclass(frozen=True)
class Nodes:
    """Which ranks are on one node: by node, in the order of their first ranks, its ranks in ascending order."""

    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, hosts: Sequence[str]) -> Nodes:
        """From the host of every rank."""
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            found.setdefault(host, []).append(rank)
        return cls(tuple(map(tuple, found.values())))

    def group(self, rank: int) -> tuple[int, ...]:
        """The ranks of a rank's node; the first is its leader."""
        return next(group for group in self.groups if rank in group)

    @cached_property
    def size(self) -> int:
        """How many ranks there are."""
        return sum(map(len, self.groups))


@dataclass(frozen=True)
class Tree:
    """A tree over the ranks whose root is rank 0; `parents` by rank, rank 0's being itself."""

    parents: tuple[int, ...]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """By rank: to whom it passes on, those first that have most to pass on themselves."""
        found: list[list[int]] = [[] for _ in self.parents]
        for rank, parent in enumerate(self.parents[1:], start=1):
            found[parent].append(rank)
        weight = [1] * len(self.parents)
        for rank in sorted(range(1, len(self.parents)), key=self._depth, reverse=True):
            weight[self.parents[rank]] += weight[rank]
        return tuple(tuple(sorted(some, key=lambda rank: -weight[rank])) for some in found)

    @cached_property
    def below(self) -> tuple[tuple[int, ...], ...]:
        """By rank: everybody to whom its messages go in the end, child by child, each before those below it."""
        found: list[tuple[int, ...]] = [()] * len(self.parents)
        for rank in sorted(range(len(self.parents)), key=self._depth, reverse=True):
            found[rank] = tuple(other for child in self.children[rank] for other in (child, *found[child]))
        return tuple(found)

    def _depth(self, rank: int) -> int:
        depth = 0
        while rank:
            rank, depth = self.parents[rank], depth + 1
        return depth


@lru_cache
def tree_of(route: Route, nodes: Nodes, parts: bool) -> Tree:
    """The tree of a route but `library`; `parts`: every rank has a part of its own, that is gathered or dealt out."""
    parents = [0] * nodes.size
    if route == "tree" and not parts:
        _hang(parents, range(nodes.size), parts)
    elif route == "hierarchical":
        for members in ([group[0] for group in nodes.groups], *nodes.groups):
            _hang(parents, members, parts)
    return Tree(tuple(parents))


def _hang(parents: list[int], members: Sequence[int], parts: bool) -> None:
    """The members below the first of them: in a binomial tree, or, of `parts`, directly."""
    for place, member in enumerate(members[1:], start=1):
        parents[member] = members[0 if parts else place & (place - 1)]
