"""Codecs in a run: memories and states that stay in step, the same bits on any number of ranks and after a resume."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mpifed.codecs.quantize import Quantize
from mpifed.comm.inprocess import run_ranks
from mpifed.errors import BadInput
from mpifed.job import check_resume
from tests.algorithm_table import (
    CLIENTS,
    PARTICIPANTS,
    ROWS,
    Outcome,
    Row,
    assert_same_bits,
    engine_of,
    job_of,
    run,
    with_changes,
)

COMPRESSED: Mapping[str, tuple[str, Any]] = {
    "fedavg, svd both ways": (
        "fedavg",
        {"down.model": "svd(energy=0.95)", "up.update": "svd(energy=0.7, feedback=true)"},
    ),
    "fedavg, feedback down": ("fedavg", {"down.model": "svd(energy=0.7, feedback=true)"}),
    "fedavg, svd schedule": ("fedavg", {"up.update": "svd(energy=[0.6, 0.98])"}),
    "scaffold, topk": ("scaffold", {"up.update": "topk(fraction=0.3)", "up.control_update": "topk(fraction=0.3)"}),
    "scaffold-derived, topk": ("scaffold-derived", {"up.update": "topk(fraction=0.3)", "down.control": "half"}),
    "feddyn, quantize": ("feddyn", "quantize(bits=4, norm='max')"),
    "fedprox, powersgd": ("fedprox", {"up.update": "powersgd(rank=1, min_rate=1.0)"}),
}
"""Row of the table and `codec` of the job."""

every_case = pytest.mark.parametrize(("row", "codec"), COMPRESSED.values(), ids=COMPRESSED.keys())
row_of = {row.id: row for row in ROWS}


@every_case
def test_one_rank_equals_many_bit_for_bit(row: str, codec: Any, tmp_path: Path) -> None:
    """States, the codecs' memories, metrics, and bytes; with `tree` the same bytes."""
    job = job_of(row_of[row], codec=codec)
    alone = run(job, tmp_path / "1")
    for ranks in (2, 3, 5):
        outcome = run(job, tmp_path / str(ranks), ranks)
        assert_same_bits(outcome.tensors(), alone.tensors())
        assert (outcome.metrics(), outcome.logical()) == (alone.metrics(), alone.logical())
    plain = run(job_of(row_of[row]), tmp_path / "plain")
    assert not torch.equal(plain.server["model"], alone.server["model"])
    remembers = any(re.search(word, str(codec)) for word in ("up.update.*feedback", "topk", "powersgd"))
    assert any("codec" in record for record in alone.clients.values()) == remembers


@every_case
def test_a_resumed_run_equals_the_uninterrupted_one(row: str, codec: Any, tmp_path: Path) -> None:
    """Stopped by a signal after round 2 of 4, and resumed on as many ranks and on others."""
    job = job_of(row_of[row], rounds=4, codec=codec)
    whole = run(job, tmp_path / "whole", 3)
    for ranks in (3, 2):
        folder = tmp_path / str(ranks)

        def stopped(comm: Any, folder: Path = folder) -> bool:
            engine = engine_of(job, comm, folder)
            train, rounds = engine._run_round, iter(range(1, 5))

            def one_round(round_: int) -> bool:
                engine._stop.asked = next(rounds) == 2
                return train(round_)

            engine._run_round = one_round  # type: ignore[method-assign]
            return engine.run()

        assert run_ranks(3, stopped) == [False] * 3
        again = run(job, folder, ranks, resume=True)
        assert_same_bits(again.tensors(), whole.tensors())
        assert (again.metrics(), again.logical()) == (whole.metrics(), whole.logical())


@every_case
def test_it_learns(row: str, codec: Any, tmp_path: Path) -> None:
    rows = run(job_of(row_of[row], rounds=12, participation=1.0, codec=codec), tmp_path).rows
    assert rows[-1]["accuracy"] > 0.5 and rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert all(entry["absent"] == [] for entry in rows)


def everyones(outcome: Outcome, name: str) -> torch.Tensor:
    """The mean of a client state over all clients; zero for those that never took part."""
    records = [record["state"][name].double() for record in outcome.clients.values()]
    return torch.stack(records).sum(dim=0) / CLIENTS


@pytest.mark.parametrize(
    "codec", ["half", "quantize(bits=4)", "svd(energy=0.7)", {"up": "topk(fraction=0.2)"}], ids=str
)
@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.table["name"] in ("scaffold", "feddyn")], ids=lambda r: r.id
)
def test_client_states_move_by_what_the_server_received(row: Row, codec: Any, tmp_path: Path) -> None:
    """The server's control variate and memory stay the means of the clients' where codecs change what is sent."""
    if isinstance(codec, dict):
        fields = ["update"] + ["control_update"] * (row.table["name"] == "scaffold" and "payload" not in row.table)
        codec = {f"up.{field}": codec["up"] for field in fields}
    name = {"scaffold": "control", "feddyn": "memory"}[str(row.table["name"])]
    outcome = run(job_of(row, rounds=7, codec=codec), tmp_path, 3)
    exact = run(job_of(row, rounds=7), tmp_path / "exact", 3)
    scale = float(outcome.server[name].abs().max())
    torch.testing.assert_close(outcome.server[name].double(), everyones(outcome, name), rtol=0, atol=2e-6 * scale)
    assert (outcome.server[name] - exact.server[name]).norm() > 1e-5


def test_everybody_counts_the_bytes_of_the_formula(tmp_path: Path) -> None:
    """FedPAQ with 4 bits: 4 bytes a tensor and half a byte an entry, of 12, 3, 3, 9 and 3 parameters."""
    outcome = run(job_of({"name": "fedavg"}, codec={"up.update": "quantize(bits=4)"}), tmp_path)
    assert outcome.logical()[1, "up.update"] == PARTICIPANTS * (5 * 4 + 6 + 2 + 2 + 5 + 2)


def test_every_draw_of_a_run_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of rounding that clients, rounds or fields had in common would not average out: no two seeds are equal.

    SCAFFOLD's three fields down, and three up from each of three clients, in two rounds.
    """
    seeds, encode = list[int](), Quantize.encode

    def watched(self: Quantize, value: Any, layout: Any, memory: Any, progress: float, seed: int = 0) -> Any:
        seeds.append(seed)
        return encode(self, value, layout, memory, progress, seed)

    monkeypatch.setattr(Quantize, "encode", watched)
    run(job_of({"name": "scaffold"}, rounds=2, codec="quantize"), tmp_path)
    assert len(set(seeds)) == len(seeds) == 2 * (3 + 3 * PARTICIPANTS)


def test_rounds_stay_as_they_are_under_a_schedule() -> None:
    """Energies depend on round/rounds; with a constant one the number of rounds may change."""
    constant, rising = (job_of({"name": "fedavg"}, codec=text) for text in ("svd(energy=0.9)", "svd"))
    check_resume(constant, with_changes(constant, "rounds=9"), 2)
    with pytest.raises(BadInput, match=r"cannot be resumed with another rounds \(3 -> 9\)"):
        check_resume(rising, with_changes(rising, "rounds=9"), 2)
    assert constant.resume_sha256 == with_changes(constant, "rounds=9").resume_sha256
    assert rising.resume_sha256 != with_changes(rising, "rounds=9").resume_sha256
