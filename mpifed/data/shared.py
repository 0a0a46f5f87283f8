"""Arrays that the processes of a node have in common: one copy, in memory that has no name.

The copy is an anonymous file of Linux (`memfd_create`): nothing lies in /dev/shm or in a folder at any time, so that
nothing stays behind whatever dies and when, and the size of /dev/shm, 64 MB in many containers, is no limit. It is
filled by writing, which fails where memory runs out (a mapping that outgrows it would be a SIGBUS), and then sealed:
from there on nobody, its maker included, can change or shorten it. The others open it through `/proc/PID/fd`, which the
kernel grants to processes of the same user; it lives as long as one of them maps it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

Arrays: TypeAlias = Mapping[str, np.ndarray]

ALIGNMENT = 64
"""Of every array in the file, bytes."""
BLOCK_BYTES = 8 << 20
"""Rows are written in runs of about this many bytes: an array that is a view is never copied whole."""


class Unshareable(Exception):
    """Why these processes cannot have a copy in common."""


class Published:
    """One copy of `arrays` (of numbers), for processes of this node that `attach` what `where` says, until `close`.

    `where` is JSON. Raises `Unshareable` where the system has no such memory, or too little.
    """

    def __init__(self, arrays: Arrays) -> None:
        token = secrets.token_hex(16)
        layout, size = [], len(token)
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise Unshareable(f"{name} holds Python objects")
            start = -(-size // ALIGNMENT) * ALIGNMENT
            layout.append((name, array.dtype.str, list(array.shape), start))
            size = start + array.nbytes
        try:
            self._descriptor = os.memfd_create("mpifed-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError) as error:  # no Linux, or not allowed here
            raise Unshareable(f"no anonymous shared memory ({error})") from error
        try:
            with open(self._descriptor, "wb", closefd=False) as file:
                file.write(token.encode())
                for array, (_, _, _, start) in zip(arrays.values(), layout, strict=True):
                    file.seek(start)
                    _write(file, array)
            os.ftruncate(self._descriptor, size)  # where the last array is empty
            sealed = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, sealed)
        except OSError as error:
            self.close()
            raise Unshareable(f"{size} bytes of shared memory are not to be had ({error.strerror})") from error
        self.where: dict[str, Any] = {
            "pid": os.getpid(),
            "descriptor": self._descriptor,
            "token": token,
            "size": size,
            "layout": layout,
        }

    def close(self) -> None:
        """Nobody attaches any more; those that have keep what they have."""
        os.close(self._descriptor)


def attach(where: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `Published.where`, mapped: read-only, and their memory goes with the last of them.

    Raises `Unshareable` where this process cannot see them.
    """
    try:
        with open(f"/proc/{where['pid']}/fd/{where['descriptor']}", "rb") as file:
            mapped = mmap.mmap(file.fileno(), where["size"], access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise Unshareable(f"the memory of process {where['pid']} cannot be opened ({error})") from error
    if mapped[: len(where["token"])] != where["token"].encode():  # another node's process of that number
        raise Unshareable(f"process {where['pid']} is another one here")
    return {
        name: np.frombuffer(mapped, dtype, int(np.prod(shape)), start).reshape(shape)
        for name, dtype, shape, start in where["layout"]
    }


def _write(file: Any, array: np.ndarray) -> None:
    if array.size == 0:
        return
    rows = max(1, BLOCK_BYTES // max(1, array.nbytes // len(array))) if array.ndim else 1
    for start in range(0, len(array) if array.ndim else 1, rows):
        part = array[start : start + rows] if array.ndim else array
        file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
