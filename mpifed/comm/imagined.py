"""Ranks that are only counted: what a plan of a run is made with, on machines that are not there."""

from __future__ import annotations

from collections.abc import Sequence

from mpifed.comm.communicator import Buffer, Communicator


class Imagined(Communicator):
    """Rank 0 of a world of any size that says nothing to anybody: its collectives raise RuntimeError."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)

    def _broadcast(self, buffer: Buffer) -> None:
        self._refuse()

    def _gather(self, send: Buffer, receive: Buffer | None, counts: Sequence[int]) -> None:
        self._refuse()

    def _scatter(self, send: Buffer | None, receive: Buffer, counts: Sequence[int]) -> None:
        self._refuse()

    def _reduce(self, send: Buffer, receive: Buffer | None) -> None:
        self._refuse()

    def _allreduce(self, send: Buffer, receive: Buffer) -> None:
        self._refuse()

    def barrier(self) -> None:
        self._refuse()

    def meet(self, seconds: float) -> bool:
        self._refuse()
        return False

    def abort(self, code: int) -> None:
        raise SystemExit(code)

    def _refuse(self) -> None:
        raise RuntimeError("imagined ranks cannot talk")
