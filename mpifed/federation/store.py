"""The states of a rank's clients: the recently used in memory, the others each in a scratch file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mpifed.errors import CheckpointError
from mpifed.storage.states import empty, read_state, write_scratch
from mpifed.types import State, map_state, nbytes

_FILE = re.compile(r"client_[0-9]+\.h5")
_GROUP = "client"


class ClientStore:
    """Client states by client id, of which at most `limit_bytes` are held in memory.

    A state is copied to host memory when it is put, so that it shares nothing with a model or another state; what is
    given out is the store's own, in host memory, bit for bit as put, and is not changed in place: a new state is put.

    `folder` belongs to this rank of this run alone. Files that an earlier run left there are deleted; it is made when
    the first state is spilled. Where a file cannot be written or read, `CheckpointError` names it.
    """

    def __init__(self, limit_bytes: int, folder: Path) -> None:
        self.limit_bytes = limit_bytes
        self.folder = folder
        self._held: dict[int, State] = {}  # the longest unused first
        self._spilled: set[int] = set()
        self._bytes = 0
        self._delete_files()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors that are held in memory."""
        return self._bytes

    def get(self, client: int) -> State | None:
        """The client's state, or None if it has none yet."""
        if client in self._held:
            self._held[client] = self._held.pop(client)  # now the last to go
            return self._held[client]
        if client not in self._spilled:
            return None
        state = self._load(client)
        if nbytes(state) <= self.limit_bytes:
            self._drop(client)
            self._hold(client, state)
        return state

    def put(self, client: int, state: State) -> None:
        """Keep a copy of `state` in place of the client's former one."""
        own = map_state(lambda tensor: empty(tensor.shape, tensor.dtype).copy_(tensor.detach()), state)
        self._drop(client)
        self._hold(client, own)

    def pop(self, client: int) -> State | None:
        """Take the client's state out of the store."""
        state = self._held[client] if client in self._held else self._load(client) if client in self._spilled else None
        self._drop(client)
        return state

    def __len__(self) -> int:
        return len(self._held) + len(self._spilled)

    def __iter__(self) -> Iterator[int]:
        """Ids of the clients that have a state, ascending."""
        return iter(sorted([*self._held, *self._spilled]))

    def items(self) -> Iterator[tuple[int, State]]:
        """Every client's id and state, ids ascending; spilled ones are loaded one at a time and not kept."""
        for client in self:
            yield client, self._held[client] if client in self._held else self._load(client)

    def close(self) -> None:
        """Forget everything and delete the files."""
        self._held.clear()
        self._spilled.clear()
        self._bytes = 0
        self._delete_files()
        with suppress(OSError):  # never made, or something else is in it
            self.folder.rmdir()

    def _path(self, client: int) -> Path:
        return self.folder / f"client_{client}.h5"

    def _load(self, client: int) -> State:
        return read_state(self._path(client), _GROUP)

    def _hold(self, client: int, state: State) -> None:
        size = nbytes(state)
        while self._held and self._bytes + size > self.limit_bytes:
            oldest = next(iter(self._held))
            self._spill(oldest, self._held[oldest])
            self._bytes -= nbytes(self._held.pop(oldest))
        if size > self.limit_bytes:
            self._spill(client, state)
        else:
            self._held[client] = state
            self._bytes += size

    def _spill(self, client: int, state: State) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be made ({error.strerror}); client states that exceed client_state_mb go there"
            ) from error
        write_scratch(self._path(client), _GROUP, state)
        self._spilled.add(client)

    def _drop(self, client: int) -> None:
        if client in self._held:
            self._bytes -= nbytes(self._held.pop(client))
        elif client in self._spilled:
            self._spilled.remove(client)
            self._path(client).unlink()

    def _delete_files(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if _FILE.fullmatch(path.name):
                    path.unlink()
