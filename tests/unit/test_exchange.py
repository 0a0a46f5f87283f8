"""The exchange: what is declared arrives, alike on any number of ranks, and the bytes counted are those moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mpifed.algorithms.base import Each, Field, Mean, Reply, Sum
from mpifed.codecs.half import Half
from mpifed.codecs.identity import Identity, from_bytes, to_bytes
from mpifed.comm import collection
from mpifed.comm.collection import Announcement, Outgoing, Received
from mpifed.comm.communicator import CONTROL, Communicator
from mpifed.comm.exchange import Exchange
from mpifed.comm.inprocess import run_ranks
from mpifed.federation.roster import Assignment
from mpifed.types import Payload
from tests.mpi.checks import recorded

RANKS = (1, 2, 3, 5)
CPU = torch.device("cpu")


def deal(ranks: int, clients: tuple[int, ...]) -> Assignment:
    """Clients in turn to ranks 1, 2, ...; all to rank 0 where it is alone."""
    if ranks == 1:
        return Assignment((tuple(sorted(clients)),))
    return Assignment(((), *(tuple(sorted(clients[rank :: ranks - 1])) for rank in range(ranks - 1))))


@dataclass
class Collected:
    """What all ranks know after an upload."""

    uploads: Received
    known: Announcement
    recorded: list[tuple[int, int]]
    """Bytes (sent, received) by rank as the primitives saw them."""
    counted: list[tuple[dict[str, int], dict[str, int]]]
    """The same by label as the communicator counted them."""
    largest: int
    """Most bytes that rank 0 was sent in one call."""


def upload(
    fields: Mapping[str, Field],
    replies: Mapping[int, Reply | None],
    ranks: int = 1,
    reduction: Any = "ordered",
    codec: Any = None,
    chunk_bytes: int | None = None,
) -> Collected:
    """Clients with None do not answer."""
    dealt = deal(ranks, tuple(replies))
    used: Any = Identity() if codec is None else codec

    def main(comm: Communicator) -> tuple[Any, ...]:
        if chunk_bytes is not None:
            comm.chunk_bytes = chunk_bytes
        exchange = Exchange(comm, lambda way, name: used, reduction, CPU)
        outgoing: dict[int, Outgoing] = {}
        for client in dealt.by_rank[comm.rank]:
            reply = replies[client]
            if reply is not None:
                outgoing[client] = exchange.encode(fields, reply, {}, 0.5)
        with recorded(comm) as calls:
            known = exchange.announce(fields, outgoing, dealt)
            uploads = exchange.collect("p", fields, outgoing, known, dealt)
        moved = sum(sent for _, sent, _ in calls), sum(received for _, _, received in calls)
        return uploads, known, moved, comm.traffic.take(), max(received for _, _, received in calls)

    results = run_ranks(ranks, main)
    assert all(known == results[0][1] for _, known, *_ in results)
    assert all(uploads is None for uploads, *_ in results[1:])
    return Collected(
        results[0][0],
        results[0][1],
        [result[2] for result in results],
        [result[3] for result in results],
        results[0][4],
    )


def one_field(
    values: Mapping[int, Tensor], reduce: Any, weights: Mapping[int, float] | None = None, **how: Any
) -> Received:
    """Replies of one field, `f`."""
    first = next(iter(values.values()))
    fields = {"f": Field(tuple(first.shape), first.dtype, reduce)}
    given = weights or dict.fromkeys(values, 1.0)
    return upload(fields, {c: Reply({"f": value}, given[c]) for c, value in values.items()}, **how).uploads


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- sums, means and single replies -----------------------------------------------------------------------------------
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


@pytest.mark.parametrize("reduction", ["ordered", "tree"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(dtype: torch.dtype, reduction: str) -> None:
    """Clients 2, 5 and 7 send (1, 2), (3, 4), (8, 18) with weights 1, 1 and 2.

    Sum (12, 24); equal mean (4, 8); weighted mean (1 + 3 + 16, 2 + 4 + 36)/4 = (5, 10.5), of integers (5, 10): rounded,
    a half to the even neighbour.
    """
    values = {c: torch.tensor(pair, dtype=dtype) for c, pair in ((2, (1, 2)), (5, (3, 4)), (7, (8, 18)))}
    weights = {2: 1.0, 5: 1.0, 7: 2.0}
    for ranks in (1, 3):
        how: dict[str, Any] = {"ranks": ranks, "reduction": reduction}
        for reduce, take, expected in (
            (Sum(), Received.sum, (12, 24)),
            (Mean("uniform"), Received.mean, (4, 8)),
            (Mean(), Received.mean, (5, 10.5 if dtype.is_floating_point else 10)),
            (Each("reply"), Received.mean, (5, 10.5 if dtype.is_floating_point else 10)),
            (Each("uniform"), Received.mean, (4, 8)),
            (Each(), Received.sum, (12, 24)),
        ):
            received = one_field(values, reduce, weights, **how)
            result = take(received, "f")
            assert result.dtype == dtype and torch.equal(result, torch.tensor(expected, dtype=dtype)), (reduce, ranks)
            assert tuple(received.clients) == (2, 5, 7)
            assert received.weights.tolist() == [1.0, 1.0, 2.0] and received.weights.dtype == torch.float64
        each = one_field(values, Each(), weights, **how).each("f")
        assert [tensor.tolist() for tensor in each] == [[1, 2], [3, 4], [8, 18]]
        assert all(tensor.dtype == dtype for tensor in each)


def test_booleans_are_carried_one_by_one() -> None:
    values = {0: torch.tensor([True, False]), 1: torch.tensor([False, False])}
    each = one_field(values, Each(), ranks=3).each("f")
    assert [(tensor.dtype, tensor.tolist()) for tensor in each] == [
        (torch.bool, [True, False]),
        (torch.bool, [False, False]),
    ]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["ordered", "tree"])
def test_shapes(shape: tuple[int, ...], reduction: str, ranks: int) -> None:
    values = {client: torch.full(shape, float(client)) for client in range(4)}
    how: dict[str, Any] = {"reduction": reduction, "ranks": ranks}
    assert torch.equal(one_field(values, Sum(), **how).sum("f"), torch.full(shape, 6.0))
    assert torch.equal(one_field(values, Mean(), **how).mean("f"), torch.full(shape, 1.5))
    each = one_field(values, Each(), **how).each("f")
    assert [tuple(tensor.shape) for tensor in each] == [shape] * 4
    assert all(torch.equal(tensor, values[client]) for client, tensor in enumerate(each))


@pytest.mark.parametrize("ranks", RANKS)
def test_lengths_that_only_the_clients_know(ranks: int) -> None:
    fields = {"rows": Field((None, 2)), "words": Field((None,), torch.int64), "n": Field((), torch.int64)}
    sent = {c: {"rows": noise(c, c, 2), "words": torch.arange(3 - c), "n": torch.tensor(c)} for c in range(4)}
    collected = upload(fields, {c: Reply(payload) for c, payload in sent.items() if c != 3}, ranks)
    for name in fields:
        for client, tensor in enumerate(collected.uploads.each(name)):
            assert torch.equal(tensor, sent[client][name])
    assert collected.known.logical["up", "rows"] == {0: 0, 1: 8, 2: 16}
    assert collected.known.logical["up", "words"] == {0: 24, 1: 16, 2: 8}
    assert collected.known.logical["up", "n"] == {0: 8, 1: 8, 2: 8}


def test_what_was_not_declared_cannot_be_asked_for() -> None:
    values = {0: torch.ones(2), 1: torch.ones(2)}
    with pytest.raises(TypeError, match="'f' is declared as Sum.*no mean"):
        one_field(values, Sum()).mean("f")
    with pytest.raises(TypeError, match="'f' is declared as Mean.*sum does not arrive"):
        one_field(values, Mean()).sum("f")
    for reduce in (Sum(), Mean()):
        with pytest.raises(TypeError, match="single replies do not arrive"):
            one_field(values, reduce).each("f")
    with pytest.raises(ValueError, match="one unknown length"):
        Field((None, None))


# --- any number of ranks ----------------------------------------------------------------------------------------------
FUSED = {
    "small": Field((3,), torch.bfloat16, Mean()),
    "model": Field((37,), torch.float32, Mean()),
    "control": Field((11,), torch.float32, Sum()),
    "fine": Field((5,), torch.float64, Mean("uniform")),
    "flag": Field((1,), torch.uint8, Sum()),
    "count": Field((2,), torch.int64, Sum()),
    "single": Field((37,), torch.float32, Each("reply")),
}
"""Fields of every size of element, so that slices begin inside some of them."""


def fused_replies() -> dict[int, Reply | None]:
    """Seven clients with awkward weights; 3 and 8 do not answer."""
    replies: dict[int, Reply | None] = {}
    for client in (0, 1, 3, 4, 6, 8, 9):
        payload: Payload = {}
        for number, (name, declared) in enumerate(FUSED.items()):
            shape = tuple(size for size in declared.shape if size is not None)
            if declared.dtype.is_floating_point:
                payload[name] = noise(100 * client + number, *shape, dtype=declared.dtype)
            else:
                payload[name] = torch.full(shape, client, dtype=declared.dtype)
        payload["single"] = payload["model"]
        replies[client] = None if client in (3, 8) else Reply(payload, weight=client + 0.1)
    return replies


def results(uploads: Received) -> dict[str, Tensor]:
    return {
        name: uploads.sum(name) if isinstance(declared.reduce, Sum) else uploads.mean(name)
        for name, declared in FUSED.items()
    }


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_ordered_is_the_sum_in_float64_in_the_order_of_ids() -> None:
    """Computed here the way the docstring says: rounded after the product, and after every addition."""
    replies = {client: reply for client, reply in fused_replies().items() if reply is not None}
    total, weights = torch.zeros(37, dtype=torch.float64), 0.0
    for client in sorted(replies):
        total += replies[client].upload["model"].double() * replies[client].weight
        weights += replies[client].weight
    expected = (total / weights).float()
    assert torch.equal(upload(FUSED, fused_replies(), 3).uploads.mean("model"), expected)


@pytest.fixture(params=[(37, 4), (37, 0), (1 << 14, 4)], ids=["exact, gathered", "exact, reduced", "in order"])
def exact_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model` and `single`, of 37 elements, are added exactly, or nothing is."""
    elements, ranks = request.param
    monkeypatch.setattr(collection, "EXACT_ELEMENTS", elements)
    monkeypatch.setattr(collection, "GATHERED_RANKS", ranks)


@pytest.mark.usefixtures("exact_elements")
@pytest.mark.parametrize("codec", [Identity(), Half()], ids=["identity", "half"])
@pytest.mark.parametrize("ranks", RANKS)
def test_ordered_is_the_same_bit_for_bit(ranks: int, codec: Any) -> None:
    expected = results(upload(FUSED, fused_replies(), 1, codec=codec).uploads)
    assert_equal(results(upload(FUSED, fused_replies(), ranks, codec=codec).uploads), expected)


@pytest.mark.usefixtures("exact_elements")
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("slice_bytes", [1, 40, 130, 600])
def test_slices_change_nothing(slice_bytes: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is 40 + 16 + 148 + 44 + 6 + 1 = 255 bytes: slices of 8, 8, 24 and 120 bytes for five replies."""
    expected = results(upload(FUSED, fused_replies(), ranks).uploads)
    monkeypatch.setattr(collection, "SLICE_BYTES", slice_bytes)
    assert_equal(results(upload(FUSED, fused_replies(), ranks).uploads), expected)


def test_rank_0_is_never_sent_more_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight models of 4,000 bytes, 800 bytes at a time: 8 * 96, since a slice of one reply is a multiple of 8."""
    monkeypatch.setattr(collection, "SLICE_BYTES", 800)
    fields = {"f": Field((1000,), reduce=Mean())}
    collected = upload(fields, {client: Reply({"f": noise(client, 1000)}) for client in range(8)}, ranks=3)
    assert collected.largest == 768


@pytest.mark.usefixtures("exact_elements")
@pytest.mark.parametrize("reduction", ["ordered", "tree"])
@pytest.mark.parametrize("chunk_bytes", [8, 56, 1000])
def test_chunks_change_nothing(chunk_bytes: int, reduction: str) -> None:
    expected = results(upload(FUSED, fused_replies(), 3, reduction).uploads)
    assert_equal(results(upload(FUSED, fused_replies(), 3, reduction, chunk_bytes=chunk_bytes).uploads), expected)


@pytest.mark.usefixtures("exact_elements")
def test_mean_of_each_is_the_ordered_mean_bit_for_bit() -> None:
    for codec in (Identity(), Half()):
        uploads = upload(FUSED, fused_replies(), 3, codec=codec).uploads
        assert torch.equal(uploads.mean("single"), uploads.mean("model"))


@pytest.mark.usefixtures("exact_elements")
@pytest.mark.parametrize("codec", [Identity(), Half()], ids=["identity", "half"])
@pytest.mark.parametrize("ranks", RANKS)
def test_tree_is_close_to_ordered(ranks: int, codec: Any) -> None:
    """float32 crosses as float32, so up to its rounding; everything else is added in float64."""
    ordered = results(upload(FUSED, fused_replies(), 1, codec=codec).uploads)
    tree = results(upload(FUSED, fused_replies(), ranks, "tree", codec=codec).uploads)
    for name, tensor in ordered.items():
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}.get(tensor.dtype, 0.0)
        torch.testing.assert_close(tree[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["ordered", "tree"])
def test_half_averages_what_it_has_rounded(reduction: str) -> None:
    """1 + 2^-12 becomes 1 in float16 (its last place is 2^-10), so the mean with 3 is 2, not 2 + 2^-13."""
    values = {0: torch.tensor([1 + 2**-12]), 1: torch.tensor([3.0])}
    assert one_field(values, Mean(), ranks=2, reduction=reduction, codec=Half()).mean("f").item() == 2.0
    assert one_field(values, Mean(), ranks=2, reduction=reduction).mean("f").item() == 2 + 2**-13


@pytest.mark.parametrize("reduction", ["ordered", "tree"])
@pytest.mark.parametrize("reduce", [Mean(), Sum(), Each()], ids=str)
def test_averaging_changes_no_reply(reduce: Any, reduction: str) -> None:
    """float64 needs no conversion before it is added: a product in place would hit the reply itself."""
    values = {c: torch.tensor([2.0, 4.0], dtype=torch.float64) for c in range(2)}
    uploads = one_field(values, reduce, {0: 1.0, 1: 5.0}, reduction=reduction)
    take = Received.sum if isinstance(reduce, Sum) else Received.mean
    assert torch.equal(take(uploads, "f"), take(uploads, "f"))
    assert all(value.tolist() == [2.0, 4.0] for value in values.values())
    if isinstance(reduce, Each):
        assert [value.tolist() for value in uploads.each("f")] == [[2.0, 4.0], [2.0, 4.0]]


# --- weights ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["ordered", "tree"])
def test_weight_zero(reduction: str) -> None:
    """A reply of weight 0 counts in an equal mean, in a sum and as a client, but not in a weighted mean."""
    values, weights = {0: torch.tensor([5.0]), 1: torch.tensor([7.0])}, {0: 0.0, 1: 3.0}
    how: dict[str, Any] = {"reduction": reduction, "ranks": 2}
    assert one_field(values, Mean(), weights, **how).mean("f").item() == 7.0
    assert one_field(values, Mean("uniform"), weights, **how).mean("f").item() == 6.0
    assert one_field(values, Sum(), weights, **how).sum("f").item() == 12.0
    with pytest.raises(ValueError, match=r"weights of upload 'f' add up to 0\.0"):
        one_field(values, Mean(), {0: 0.0, 1: 0.0}, **how).mean("f")


def test_weights_count_eight_bytes_where_some_mean_uses_them() -> None:
    weighed = {0: 8, 1: 8}
    unweighed = (Mean("uniform"), Sum(), Each())
    for reduce, expected in ((Mean(), weighed), (Each("reply"), weighed), *((rule, None) for rule in unweighed)):
        fields = {"f": Field((2,), reduce=reduce), "g": Field((), reduce=Sum())}
        replies = {client: Reply({"f": torch.ones(2), "g": torch.ones(())}) for client in range(2)}
        assert upload(fields, replies).known.logical.get(("up", "weight")) == expected


# --- replies that do not fit ------------------------------------------------------------------------------------------
GOOD = {"a": torch.ones(2), "n": torch.tensor(3)}
FIELDS = {"a": Field((2,)), "n": Field((), torch.int64)}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply({"a": GOOD["a"]}), r"holds \['a'\], declared are \['a', 'n'\]"),
        (Reply(GOOD | {"z": torch.ones(1)}), r"holds \['a', 'n', 'z'\]"),
        (Reply(GOOD | {"a": torch.ones(3)}), r"'a' is declared as torch.float32 \(2,\), but is torch.float32 \(3,\)"),
        (Reply(GOOD | {"a": torch.ones(1, 2)}), "'a' is declared"),
        (Reply(GOOD | {"a": torch.ones(2).double()}), "torch.float64"),
        (Reply(GOOD | {"n": torch.tensor(3.0)}), "'n' is declared"),
        (Reply(GOOD | {"a": torch.tensor([1.0, float("nan")])}), "non-finite a"),
        (Reply(GOOD | {"a": torch.tensor([1.0, float("-inf")])}), "non-finite a"),
        (Reply(GOOD, weight=-1.0), "weight of the reply is -1"),
        (Reply(GOOD, weight=float("nan")), "weight of the reply is nan"),
        (Reply(GOOD, weight=float("inf")), "weight of the reply is inf"),
    ],
)
def test_a_reply_that_does_not_fit_is_refused(reply: Reply, reason: str) -> None:
    def main(comm: Communicator) -> None:
        exchange = Exchange(comm, lambda way, name: IDENTITY, "ordered", CPU)
        assert exchange.encode(FIELDS, Reply(GOOD), {}, 0.5).data.keys() == FIELDS.keys()
        with pytest.raises(ValueError, match=reason):
            exchange.encode(FIELDS, reply, {}, 0.5)

    run_ranks(1, main)


IDENTITY: Any = Identity()


@dataclass(frozen=True)
class Odometer:
    """A codec that remembers how many elements it has encoded for a client, and how far the run was."""

    plain = False
    stateful = True

    def nbytes(self, shape: Any, dtype: Any, layout: Any) -> int | None:
        return None

    def encode(self, value: Tensor, layout: Any, memory: Any, progress: float, seed: int) -> tuple[Tensor, Any]:
        seen = int(memory.get("seen", torch.tensor(0))) + value.numel()
        return to_bytes(value), {"seen": torch.tensor(seen), "progress": torch.tensor(progress)}

    def decode(self, data: Tensor, shape: Any, dtype: Any, layout: Any) -> Tensor:
        return from_bytes(data, shape, dtype)


def test_a_codec_is_given_its_memory_of_the_client_and_field() -> None:
    def main(comm: Communicator) -> None:
        codec: Any = Odometer()
        exchange = Exchange(comm, lambda way, name: codec if name == "a" else IDENTITY, "ordered", CPU)
        first = exchange.encode(FIELDS, Reply(GOOD), {}, 0.25)
        assert list(first.memory) == ["a"] and first.memory["a"]["seen"] == 2
        assert first.memory["a"]["progress"] == 0.25
        second = exchange.encode(FIELDS, Reply(GOOD), first.memory, 0.5)
        assert second.memory["a"]["seen"] == 4 and first.memory["a"]["seen"] == 2
        other = exchange.encode({"n": FIELDS["n"]}, Reply({"n": GOOD["n"]}), second.memory, 0.5)
        assert other.memory == second.memory  # what other phases' codecs remember stays

    run_ranks(1, main)


# --- download ---------------------------------------------------------------------------------------------------------
def download(
    fields: Mapping[str, Field],
    payload: Payload,
    ranks: int,
    clients: tuple[int, ...] = (1, 2, 5, 6),
    everybody: int = 8,
    codec: Any = IDENTITY,
    chunk_bytes: int | None = None,
) -> tuple[list[Payload], dict[int, Payload], Any, list[tuple[dict[str, int], dict[str, int]]]]:
    """Every rank's shared fields, every client's own, logical bytes, and MPI bytes by rank (checked against calls)."""
    dealt = deal(ranks, clients)

    def main(comm: Communicator) -> tuple[Any, ...]:
        if chunk_bytes is not None:
            comm.chunk_bytes = chunk_bytes
        exchange = Exchange(comm, lambda way, name: codec, "ordered", CPU)
        with recorded(comm) as calls:
            result = exchange.download("p", fields, payload if comm.rank == 0 else None, dealt, everybody, 0.5)
        sent, received = comm.traffic.take()
        assert sum(sent.values()) == sum(size for _, size, _ in calls)
        assert sum(received.values()) == sum(size for *_, size in calls)
        return *result, (sent, received)

    parts = run_ranks(ranks, main)
    assert all(sizes == parts[0][2] for _, _, sizes, _ in parts)
    own = {client: mine for part in parts for client, mine in part[1].items()}
    return [part[0] for part in parts], own, parts[0][2], [part[3] for part in parts]


DOWN = {
    "model": Field((5,)),
    "steps": Field((), torch.int64),
    "batch": Field((None, 3)),
    "mine": Field((2,), to="each"),
    "list": Field((None,), torch.int64, to="each"),
    "news": Field((3,), torch.bfloat16, to="everybody"),
    "empty": Field((0,)),
}


def down_payload() -> Payload:
    return {
        "model": noise(1, 5),
        "steps": torch.tensor(12),
        "batch": noise(2, 4, 3),
        "mine": noise(3, 4, 2),
        "list": torch.arange(12).view(4, 3),
        "news": noise(4, 3, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
    }


@pytest.mark.parametrize("chunk_bytes", [None, 8])
@pytest.mark.parametrize("ranks", RANKS)
def test_download(ranks: int, chunk_bytes: int | None) -> None:
    """Four of eight clients. Logical bytes: 5 * 4; 8; 4 * 3 * 4; own rows 2 * 4 and 3 * 8; 3 * 2 for all eight; 0."""
    payload = down_payload()
    shared, own, sizes, _ = download(DOWN, payload, ranks, chunk_bytes=chunk_bytes)
    for part in shared:
        assert part.keys() == {"model", "steps", "batch", "news", "empty"}
        assert_equal(part, payload)
    assert sorted(own) == [1, 2, 5, 6]
    for row, client in enumerate((1, 2, 5, 6)):
        assert_equal(own[client], {"mine": payload["mine"][row], "list": payload["list"][row]})
    asked = {"model": 20, "steps": 8, "batch": 48, "mine": 8, "list": 24, "empty": 0}
    assert sizes == {("down", name): dict.fromkeys((1, 2, 5, 6), size) for name, size in asked.items()} | {
        ("down", "news"): dict.fromkeys(range(8), 6)
    }


@pytest.mark.parametrize("ranks", RANKS)
def test_own_rows_may_be_given_for_the_whole_federation(ranks: int) -> None:
    """A row for each of eight clients: the four of the phase are sent theirs, and no more is counted."""
    _, own, sizes, _ = download({"mine": Field((2,), to="each")}, {"mine": noise(3, 8, 2)}, ranks)
    assert sorted(own) == [1, 2, 5, 6]
    assert all(torch.equal(mine["mine"], noise(3, 8, 2)[client]) for client, mine in own.items())
    assert sizes == {("down", "mine"): dict.fromkeys((1, 2, 5, 6), 8)}


def test_download_counts_what_each_rank_handed_over() -> None:
    """Three ranks, clients 1 and 5 on rank 1, 2 and 6 on rank 2.

    Shared: one broadcast, sent once by rank 0 and received once by each other rank, however many clients it has. Own
    rows: rank 0 sends all four, each other rank receives two. The header, 5 shared fields and 2 * 4 rows of two int64,
    is 208 bytes of control.
    """
    *_, traffic = download(DOWN, down_payload(), 3)
    (sent, received), *others = traffic
    shared = {"p/down/model": 20, "p/down/steps": 8, "p/down/batch": 48, "p/down/news": 6, "p/down/empty": 0}
    assert sent == {CONTROL: 208, "p/down/mine": 32, "p/down/list": 96} | shared
    assert received == {"p/down/mine": 0, "p/down/list": 0}
    for sent, received in others:
        assert sent == {}
        assert received == {CONTROL: 208, "p/down/mine": 16, "p/down/list": 48} | shared


def test_download_through_a_codec_is_what_the_clients_decode() -> None:
    """Half: 1 + 2^-12 arrives as 1, on rank 0 too; integers arrive as they are."""
    fields = {"model": Field((2,)), "n": Field((), torch.int64), "mine": Field((1,), to="each")}
    payload = {"model": torch.tensor([1 + 2**-12, 2.0]), "n": torch.tensor(2**40), "mine": torch.full((4, 1), 1e9)}
    shared, own, sizes, _ = download(fields, payload, 3, codec=Half())
    for part in shared:
        assert part["model"].tolist() == [1.0, 2.0] and part["n"].item() == 2**40
    assert all(mine["mine"].item() == 65504.0 for mine in own.values())
    assert sizes["down", "model"][1] == 4 and sizes["down", "n"][1] == 8 and sizes["down", "mine"][1] == 2


@pytest.mark.parametrize("codec", [Identity(), Half()], ids=["identity", "half"])
def test_sizes_that_are_declared_are_not_said(codec: Any) -> None:
    """A model of 5, a number, and two elements for each of four clients: no byte of control."""
    fields = {name: DOWN[name] for name in ("model", "steps", "mine")}
    payload = {name: down_payload()[name] for name in fields}
    shared, own, sizes, traffic = download(fields, payload, 3, codec=codec)
    assert not any(CONTROL in labels for pair in traffic for labels in pair)
    for part in shared:
        torch.testing.assert_close(part["model"], payload["model"], rtol=1e-3, atol=1e-3)
        assert part["steps"] == 12
    assert sizes["down", "model"] == dict.fromkeys((1, 2, 5, 6), 20 if codec == Identity() else 10)
    for row, client in enumerate((1, 2, 5, 6)):
        torch.testing.assert_close(own[client]["mine"], payload["mine"][row], rtol=1e-3, atol=1e-3)


def test_a_codec_that_miscounts_is_the_programs_error() -> None:
    codec: Any = Identity()
    miscounting = type("Miscounting", (), {"plain": True, "encode": codec.encode, "decode": codec.decode})()
    miscounting.nbytes = lambda shape, dtype, layout: 7
    with pytest.raises(ValueError, match="the codec of 'model' made 20 bytes, not 7"):
        download({"model": DOWN["model"]}, {"model": torch.ones(5)}, 1, codec=miscounting)


def test_nothing_to_send_costs_nothing() -> None:
    shared, own, sizes, traffic = download({}, {}, 3)
    assert shared == [{}, {}, {}] and own == {1: {}, 2: {}, 5: {}, 6: {}} and sizes == {}
    assert traffic == [({}, {})] * 3


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"model": torch.ones(5)}, r"phase 'p' holds \['model'\], declared are \['mine', 'model'\]"),
        ({"model": torch.ones(4), "mine": torch.ones(4, 2)}, "'model' is declared as"),
        ({"model": torch.ones(5), "mine": torch.ones(3, 2)}, "'mine' has 3 rows for 4 clients"),
        ({"model": torch.ones(5), "mine": torch.ones(4, 3)}, "'mine' is declared as"),
    ],
)
def test_a_download_that_does_not_fit_is_the_programs_error(payload: Payload, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        download({name: DOWN[name] for name in ("model", "mine")}, payload, 3)


# --- exact sums -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("declared", "codec", "exact"),
    [
        (Field((40,), reduce=Mean()), Identity(), True),
        (Field((5, 8), torch.bfloat16, Sum()), Identity(), True),
        (Field((39,), reduce=Mean()), Identity(), False),
        (Field((40,), torch.float64, Sum()), Identity(), False),
        (Field((40,), torch.int32, Sum()), Identity(), False),
        (Field((40,), reduce=Mean()), Half(), False),
        (Field((40,), reduce=Each()), Identity(), False),
    ],
)
def test_what_is_added_exactly(declared: Field, codec: Any, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long plain fields of at most 4 bytes an element, which then carry their peaks: bound 3 * 1 + 2 * 4 = 11."""
    monkeypatch.setattr(collection, "EXACT_ELEMENTS", 40)
    size = torch.Size(shape := tuple(size or 0 for size in declared.shape)).numel()
    values = [torch.full((size,), float(peak)).to(declared.dtype).view(shape) for peak in (3, -2)]
    replies = {
        client: Reply({"f": value}, weight) for client, value, weight in zip((0, 1), values, (1, 4), strict=True)
    }
    known = upload({"f": declared}, replies, 3, codec=codec).known
    weighted = isinstance(declared.reduce, Mean)
    assert known.bounds == ({"f": 11.0 if weighted else 5.0} if exact else {})
    assert upload({"f": declared}, replies, 3, "tree", codec=codec).known.bounds == {}


@pytest.mark.parametrize(
    ("gathered_ranks", "sent", "received"), [(2, [0, 296, 296], 592), (1, [296, 296, 296], 296)], ids=["few", "many"]
)
def test_an_exact_sum_brings_one_vector_a_rank(
    gathered_ranks: int, sent: list[int], received: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """37 * 8 = 296 bytes in float64 of each rank, however many replies it has; of rank 0, which has none, where MPI
    reduces. Slices of at most 240 bytes are received at a time."""
    monkeypatch.setattr(collection, "EXACT_ELEMENTS", 37)
    monkeypatch.setattr(collection, "SLICE_BYTES", 240)
    monkeypatch.setattr(collection, "GATHERED_RANKS", gathered_ranks)
    collected = upload({"model": FUSED["model"]}, {c: Reply({"model": noise(c, 37)}) for c in range(5)}, 3)
    assert [by_kind(counted).get("model", 0) for counted, _ in collected.counted] == sent
    assert [by_kind(counted).get("model", 0) for _, counted in collected.counted] == [received, 0, 0]
    assert collected.known.logical["up", "model"] == dict.fromkeys(range(5), 148)
    assert collected.largest == 240


# --- MPI bytes --------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("exact_elements")
@pytest.mark.parametrize("codec", [Identity(), Half()], ids=["identity", "half"])
@pytest.mark.parametrize("reduction", ["ordered", "tree"])
@pytest.mark.parametrize("ranks", RANKS)
def test_counted_bytes_are_those_handed_over(ranks: int, reduction: str, codec: Any) -> None:
    collected = upload(FUSED, fused_replies(), ranks, reduction, codec)
    for moved, (sent, received) in zip(collected.recorded, collected.counted, strict=True):
        assert moved == (sum(sent.values()), sum(received.values()))


def by_kind(counted: Mapping[str, int]) -> dict[str, int]:
    return {name.removeprefix("p/up/"): size for name, size in counted.items()}


def test_ordered_sends_every_reply_and_tree_one_vector_a_rank() -> None:
    """Five replies on ranks 1 (clients 0, 4, 9) and 2 (clients 1, 6) of three; a model is 37 * 4 = 148 bytes.

    Ordered: 3 and 2 models are sent, 5 received. Tree: each rank, rank 0 with nothing in it too, hands over one vector,
    float32 for float32 (148), float64 for what is not (bfloat16: 3 * 8). Each: every reply, in both.
    Announcement: 7 clients, 2 + 2 * 7 float64 each, is 896 bytes, sent and received by every rank.
    """
    ordered = upload(FUSED, fused_replies(), 3).counted
    assert [by_kind(sent).get("model", 0) for sent, _ in ordered] == [0, 444, 296]
    assert [by_kind(received).get("model", 0) for _, received in ordered] == [740, 0, 0]
    tree = upload(FUSED, fused_replies(), 3, "tree").counted
    assert [by_kind(sent)["model"] for sent, _ in tree] == [148, 148, 148]
    assert [by_kind(sent)["small"] for sent, _ in tree] == [24, 24, 24]
    assert [by_kind(received).get("model", 0) for _, received in tree] == [148, 0, 0]
    for counted in (ordered, tree):
        assert [by_kind(sent).get("single", 0) for sent, _ in counted] == [0, 444, 296]
        assert [(sent[CONTROL], received[CONTROL]) for sent, received in counted] == [(896, 896)] * 3


def test_logical_bytes_of_an_upload() -> None:
    """Per client that answered, after the codec: half shortens float32 and float64 and nothing else."""
    sizes: dict[str, tuple[int, int]] = {
        "small": (6, 6),
        "model": (148, 74),
        "control": (44, 22),
        "fine": (40, 10),
        "flag": (1, 1),
        "count": (16, 16),
        "single": (148, 74),
        "weight": (8, 8),
    }
    for column, codec in enumerate((Identity(), Half())):
        for reduction in ("ordered", "tree"):
            known = upload(FUSED, fused_replies(), 2, reduction, codec).known
            assert known.clients == (0, 1, 4, 6, 9)
            assert known.logical == {
                ("up", name): dict.fromkeys(known.clients, pair[column]) for name, pair in sizes.items()
            }


def test_replies_on_one_rank_only() -> None:
    """Ranks without a reply take part in every collective with nothing."""
    replies: dict[int, Reply | None] = {client: None for client in range(6)}
    replies[4] = Reply({"f": torch.tensor([2.0])}, 3.0)
    for reduce, take in ((Mean(), Received.mean), (Sum(), Received.sum), (Each("reply"), Received.mean)):
        for reduction in ("ordered", "tree"):
            uploads = upload({"f": Field((1,), reduce=reduce)}, replies, 4, reduction).uploads
            assert tuple(uploads.clients) == (4,) and take(uploads, "f").item() == 2.0


def test_a_large_federation_is_announced_exactly() -> None:
    """Ids, weights and sizes cross as float64, exact up to 2^53."""
    fields = {"f": Field((None,))}
    replies = {client: Reply({"f": torch.zeros(client % 7)}, 2.0**52 + client) for client in range(300)}
    known = upload(fields, dict(replies), 4).known
    assert known.clients == tuple(range(300))
    assert known.weights == {client: 2.0**52 + client for client in range(300)}
    assert known.lengths["f"] == {client: client % 7 for client in range(300)}
    assert known.nbytes["f"] == {client: 4 * (client % 7) for client in range(300)}
