"""Where runs are written, and the memory that is a file system: checks that write, lock, map and remove again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mpifed.doctor.finding import Finding, error, ok, warning

MB, GB = 10**6, 10**9
SHARED_MEMORY = Path("/dev/shm")
LEFT_BEHIND = ("mpich_shm_*", "sm_segment.*", "vader_segment.*", "psm2_shm.*", "ucx_shm*")
"""What MPI libraries leave in /dev/shm when they are killed."""


def existing(folder: Path) -> Path:
    """The folder, or the one in which it would be made."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def folder(out: Path) -> Iterator[Finding]:
    """Can be written, has space, and how long a megabyte takes to be on disk."""
    where = existing(out)
    name, elsewhere = "folder", "choose another with out=..."
    try:
        with tempfile.NamedTemporaryFile(dir=where, prefix=".mpifed-doctor-") as file:
            began = time.monotonic()
            file.write(bytes(MB))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.monotonic() - began
    except OSError as failed:
        yield error(name, f"{where}: a megabyte cannot be written ({failed.strerror})", elsewhere)
        return
    space = os.statvfs(where)
    free = space.f_bavail * space.f_frsize
    said = f"{where}: {_size(free)} are free, a megabyte is on disk in {seconds:.2f} s"
    if free < GB:
        yield warning(name, said, f"checkpoints take clients x model x keep; {elsewhere}")
    elif seconds > 1:
        yield warning(name, said, f"checkpoints will be slow, checkpoint.every_rounds makes them fewer; or {elsewhere}")
    elif space.f_files and space.f_favail < 1000:
        yield warning(name, f"{where}: only {space.f_favail} more files can be made", elsewhere)
    else:
        yield ok(name, said)


def locks(out: Path) -> Iterator[Finding]:
    """By which two runs do not share a run folder: a second process asks for what the first one has."""
    from mpifed.storage.run_folder import RunFolder

    where, name = existing(out), "locks"
    nothing = "nothing keeps two runs out of one folder: see to it yourself"
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix=".mpifed-doctor-") as made:
            first = RunFolder(made)
            first.occupy()
            program = f"from mpifed.storage.run_folder import RunFolder; RunFolder({made!r}).occupy()"
            second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            del first
        if "another run is going on in this folder" in second.stderr:
            yield ok(name, f"{where}: a run folder is kept for one run at a time")
        else:
            yield warning(name, f"{where}: a lock does not keep another process out", nothing)
    except OSError as failed:
        yield error(name, f"{where}: cannot be written ({failed.strerror})", "choose another with out=...")


def hdf5(out: Path) -> Iterator[Finding]:
    """HDF5 in this folder, and its own locking."""
    from mpifed.storage.probe import opens_twice, versions

    where, name, setting = existing(out), "hdf5", "HDF5_USE_FILE_LOCKING"
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix=".mpifed-doctor-") as made:
            twice = opens_twice(Path(made, "probe.h5"))
    except OSError as failed:
        reason = " ".join(str(failed).split())
        do = f"export {setting}=FALSE" if "lock" in reason else "choose another with out=..."
        yield error(name, f"{versions()}: {where}: no file can be written ({reason})", do)
        return
    if twice and os.environ.get(setting):
        yield ok(name, f"{versions()}; {where}: files are not locked, as {setting}={os.environ[setting]} says")
    elif twice:
        yield warning(name, f"{versions()}; {where}: a file can be opened twice, it is not locked",
                      "do not read run.h5 while it is written")  # fmt: skip
    else:
        yield ok(name, f"{versions()}; {where}: a file that is being written cannot be opened by another process")


def shared_memory(out: Path) -> Iterator[Finding]:
    """/dev/shm, in which MPI moves messages within a node, and what dead jobs left there."""
    name = "/dev/shm"
    try:
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY, prefix="mpifed-doctor-") as file:
            file.write(bytes(MB))
        space = os.statvfs(SHARED_MEMORY)
    except OSError as failed:
        yield error(name, f"a megabyte cannot be written ({failed.strerror})", "MPI needs it within a node: mount it, "
                    "or remove what fills it")  # fmt: skip
        return
    free = space.f_bavail * space.f_frsize
    if free < 100 * MB:
        yield warning(
            name, f"{_size(free)} are free", "give the container more (--shm-size=1g), or remove what fills it"
        )
    else:
        yield ok(name, f"{_size(free)} are free")
    orphans = [file for pattern in LEFT_BEHIND for file in SHARED_MEMORY.glob(pattern) if _mine(file)]
    orphans = [file for file in orphans if str(file) not in _mapped()] if orphans else []
    if orphans:
        size = sum(file.stat().st_blocks * 512 for file in orphans if file.exists())
        shown = " ".join(str(file) for file in orphans[:3]) + (" ..." if len(orphans) > 3 else "")
        yield warning(name, f"{len(orphans)} files of MPI jobs that no process uses take {_size(size)}", f"rm {shown}")


def data(out: Path) -> Iterator[Finding]:
    """One copy of a data set for the ranks of a node, and the memory that there is for it."""
    import numpy as np

    from mpifed.data.shared import Published, Unshareable

    available = _available()
    try:
        published = Published({"x": np.arange(1000)})
        program = (
            "import json, sys; from mpifed.data.shared import attach; "
            "sys.exit(int(attach(json.loads(sys.argv[1]))['x'].sum()) != 499500)"
        )
        command = [sys.executable, "-c", program, json.dumps(published.where)]
        reader = subprocess.run(command, capture_output=True, text=True)
        published.close()
        reason = "" if reader.returncode == 0 else (reader.stderr.strip().splitlines() or ["it is not the same"])[-1]
    except Unshareable as failed:
        reason = str(failed)
    if reason:
        yield warning("memory", f"{_size(available)} are available; ranks of a node cannot share a data set ({reason})",
                      "each will hold its own copy; start fewer ranks where that is too much")  # fmt: skip
    elif available < GB:
        yield warning("memory", f"only {_size(available)} are available", "a rank takes some 250 MB before its model")
    else:
        yield ok("memory", f"{_size(available)} are available; the ranks of a node share one copy of a data set")


def _available() -> int:
    """Bytes that processes can still have: of the machine, or of the control group where that has less."""
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = [int(value) * 1024 for name, value, *_ in fields if name == "MemAvailable:"]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        group = Path("/sys/fs/cgroup") / line.split(":", 2)[2].lstrip("/")
        for path in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" is no number
                free.append(int((path / "memory.max").read_text()) - int((path / "memory.current").read_text()))
    return max(0, min(free))


def _mine(file: Path) -> bool:
    with suppress(OSError):
        return file.stat().st_uid == os.getuid()
    return False


def _mapped() -> set[str]:
    """Files in /dev/shm that a living process uses."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            found |= {line.split(None, 5)[-1] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return found


def _size(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / MB:.0f} MB"
