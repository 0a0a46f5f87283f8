"""Which device a rank takes, and when ranks may share one; with a stand-in for `torch.cuda`, as no GPU is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mpifed.comm.communicator import Communicator
from mpifed.comm.inprocess import run_ranks
from mpifed.errors import BadInput
from mpifed.federation.env import choose_device, crowded, identity
from mpifed.federation.federation import agree_on_device
from mpifed.job import load

NODE = ["a", "a", "a", "b"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Makes torch see GPUs of these UUIDs."""

    def see(uuids: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        properties = lambda device: SimpleNamespace(uuid=uuids[device.index])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    return see


def agreed(*overrides: str, hosts: list[str] = NODE) -> list[torch.device | str]:
    """The device of every rank on these hosts, or the sentence of the refusal."""
    job = load(None, overrides)

    def rank(comm: Communicator) -> torch.device | str:
        try:
            return agree_on_device(job, comm, hosts)
        except BadInput as error:
            return str(error)

    return run_ranks(len(hosts), rank)


def test_auto_is_the_cpu_without_gpus_and_cuda_is_refused(gpus: Callable[[list[str]], None]) -> None:
    gpus([])
    assert agreed() == [torch.device("cpu")] * 4
    assert all("there is no GPU that torch can use here" in str(said) for said in agreed("device=cuda"))


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_every_rank_of_a_node_has_a_gpu_of_its_own(gpus: Callable[[list[str]], None], wanted: str) -> None:
    """Numbers begin anew on the second node, whose GPU 0 is another one than that of the first."""
    gpus(["one", "two", "three"])
    assert agreed(f"device={wanted}") == [torch.device("cuda", index) for index in (0, 1, 2, 0)]


def test_more_ranks_than_gpus_on_a_node_are_refused_or_train_on_the_cpu(
    gpus: Callable[[list[str]], None], caplog: pytest.LogCaptureFixture
) -> None:
    gpus(["one", "two"])
    assert set(agreed("device=cuda")) == {
        "device: 3 ranks on a have 2 GPUs between them; start fewer ranks there, or share them with share_gpus=true"
    }
    with caplog.at_level(logging.INFO, logger="mpifed"):
        assert agreed() == [torch.device("cpu")] * 4  # on every node, so that all compute alike
    assert [record.getMessage() for record in caplog.records] == [
        "3 ranks on a have 2 GPUs between them: training on the CPU; share_gpus=true would share them"
    ]


def test_sharing_deals_the_gpus_in_turn_where_it_is_asked_for(gpus: Callable[[list[str]], None]) -> None:
    gpus(["one", "two"])
    for wanted in ("auto", "cuda"):
        shared = agreed(f"device={wanted}", "share_gpus=true")
        assert shared == [torch.device("cuda", index) for index in (0, 1, 0, 0)]


def test_ranks_that_see_one_gpu_each_and_call_it_0_do_not_share() -> None:
    """As under `--gpus-per-task=1`: what counts is which GPU it is."""
    assert crowded(["a", "a"], ["one", "two"]) == ""
    assert crowded(["a", "b"], ["one", "one"]) == ""
    assert crowded(["b", "a", "a"], ["", "one", "one"]) == "2 ranks on a have 1 GPU between them"
    assert crowded(["a", "a"], ["", ""]) == ""


def test_without_a_uuid_it_is_the_one_that_is_visible(
    gpus: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus([""])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert identity(choose_device("auto", local_rank=5)) == "3"
    assert identity(torch.device("cpu")) == ""
