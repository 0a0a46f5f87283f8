"""The client store: what is put is what is got, whether it stayed in memory or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mpifed.errors import CheckpointError
from mpifed.federation.store import ClientStore
from mpifed.types import State


def state_of(client: int, version: int = 0) -> State:
    """48 bytes: ten float32 (40) and one int64 (8)."""
    return {"model": torch.full((10,), client + version / 8), "nested": {"version": torch.tensor(version), "none": {}}}


def same(a: State | None, b: State | None) -> bool:
    if not isinstance(a, dict) or not isinstance(b, dict):
        return a is b is None
    return list(a) == list(b) and all(
        same(value, b[name]) if isinstance(value, dict) else torch.equal(value, b[name])  # type: ignore[arg-type]
        for name, value in a.items()
    )


@pytest.mark.parametrize("limit", [100, 10**9])
def test_the_limit_changes_nothing_but_memory(tmp_path: Path, limit: int) -> None:
    """1,000 puts and gets of 30 clients in an irregular order, beside a plain dictionary."""
    store, plain = ClientStore(limit, tmp_path / "scratch"), dict[int, State]()
    for step in range(1000):
        client = step * 7 % 30 if step % 3 else step * step % 30
        assert same(store.get(client), plain.get(client))
        store.put(client, state_of(client, step))
        plain[client] = state_of(client, step)
        assert store.memory_bytes <= limit
        if step % 100 == 99:
            assert same(store.pop(client), plain.pop(client))
    assert list(store) == sorted(plain) and len(store) == len(plain)
    for (client, state), expected in zip(store.items(), sorted(plain), strict=True):
        assert client == expected and same(state, plain[client])
        assert store.memory_bytes <= limit
    assert len(list((tmp_path / "scratch").glob("*"))) == len(plain) - store.memory_bytes // 48
    store.close()
    assert list(store) == [] and store.memory_bytes == 0 and not (tmp_path / "scratch").exists()


def test_bits_survive_the_file(tmp_path: Path) -> None:
    """A NaN with payload, -0.0, bfloat16 and bool: compared as bytes."""
    state: State = {
        "f": torch.tensor([0x7FC12345, -0x80000000], dtype=torch.int32).view(torch.float32),
        "h": torch.tensor([1, -1], dtype=torch.int16).view(torch.bfloat16),
        "b": torch.tensor([True, False]),
    }
    store = ClientStore(0, tmp_path)
    store.put(3, state)
    back = store.get(3)
    assert back is not None and store.memory_bytes == 0
    for name, tensor in state.items():
        assert isinstance(tensor, torch.Tensor) and back[name].dtype is tensor.dtype  # type: ignore[union-attr]
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))  # type: ignore[union-attr]


def test_the_longest_unused_is_spilled_first(tmp_path: Path) -> None:
    """Three states fit. After 1, 2, 3 and a look at 1, a fourth drives out 2."""
    store = ClientStore(3 * 48, tmp_path)
    for client in (1, 2, 3):
        store.put(client, state_of(client))
    store.get(1)
    store.put(4, state_of(4))
    assert os.listdir(tmp_path) == ["client_2.h5"]
    store.get(2)  # back in memory, for which 3 makes room
    assert os.listdir(tmp_path) == ["client_3.h5"]


def test_what_is_put_shares_no_memory(tmp_path: Path) -> None:
    """A state that views the model of the rank, as a model's flat parameters do, is not changed by its next use."""
    model = torch.zeros(4)
    store = ClientStore(10**6, tmp_path)
    store.put(0, {"model": model, "part": model[:1], "wide": model[:1].expand(9)})
    model += 1
    assert same(store.get(0), {"model": torch.zeros(4), "part": torch.zeros(1), "wide": torch.zeros(9)})
    assert store.memory_bytes == (4 + 1 + 9) * 4


def test_an_unknown_client_has_no_state_and_an_empty_one_has(tmp_path: Path) -> None:
    store = ClientStore(0, tmp_path)
    store.put(2, {})
    assert store.get(1) is None and store.pop(1) is None
    assert store.get(2) == {} and list(store) == [2]


def test_files_of_an_earlier_run_are_deleted_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "client_5.h5").touch()
    (tmp_path / "notes.txt").touch()
    store = ClientStore(0, tmp_path)
    assert store.get(5) is None
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_nothing_is_made_until_it_is_needed(tmp_path: Path) -> None:
    store = ClientStore(48, tmp_path / "a" / "b")
    store.put(1, state_of(1))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named_and_the_state_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = ClientStore(48, tmp_path / "file" / "scratch")
    store.put(1, state_of(1))
    with pytest.raises(CheckpointError, match="scratch"):
        store.put(2, state_of(2))
    assert same(store.get(1), state_of(1))
    assert store.memory_bytes == 48
