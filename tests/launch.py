"""The one way in which the tests start MPI: `mpirun` as a subprocess, under a time limit, with nothing left behind.

    finished = launch(4, ["-m", "mpifed.run", "job.toml"], timeout=60)      # AssertionError if it fails or hangs
    results = run_ranks("tests.mpi.test_collectives:ring", 4, timeout=30)    # one JSON value per rank
    with Launch(4, ["-m", "mpifed.run", "job.toml"]) as running:             # to interfere while it runs
        running.kill(2)
        finished = running.wait(60)

Every process of a launch carries a token in its environment, so that its ranks are found in `/proc` whatever process
groups and sessions the launcher makes. A hang is a failure: it raises, with the output, after the whole tree is dead.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder; on the path of every rank, so that ranks import `mpifed` and `tests` without installation."""

TOKEN = "MPIFED_TEST_LAUNCH"
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
_OUTER_MPI = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MPI_LOCAL", "HYDI_")
_OUTPUT_SHOWN = 8000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """In the new process: be ended when the test process dies, however it dies.

    MPICH's ranks die with a killed launcher; Open MPI's may live on, but go when their launcher is asked to end.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM if mpirun()[1] == "openmpi" else signal.SIGKILL)


@functools.cache
def mpirun() -> tuple[str, str]:
    """Path and kind (`"mpich"`, `"openmpi"` or `"intel"`) of this environment's launcher, else the first on `PATH`."""
    beside = Path(sys.executable).parent / "mpirun"  # not resolved: a virtual environment's python is a link
    path = str(beside) if beside.is_file() else shutil.which("mpirun")
    if path is None:
        raise RuntimeError("the tests need an mpirun: install one with  pip install -e '.[mpi]'")
    environment = os.environ | {"PATH": f"{Path(path).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, env=environment).stdout
    for mark, kind in {"HYDRA": "mpich", "Open MPI": "openmpi", "Intel": "intel"}.items():
        if mark in version:
            return path, kind
    raise RuntimeError(f"{path} is no launcher that the tests know: {version[:200]!r}")


@dataclass(frozen=True)
class Finished:
    """A launch that has ended: exit code of the launcher (negative: killed by that signal), output of all ranks."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        parts = [f"exit code {self.returncode} after {self.seconds:.1f} s"]
        for name, text in (("stdout", self.stdout), ("stderr", self.stderr)):
            cut = "... " if len(text) > _OUTPUT_SHOWN else ""
            parts.append(f"--- {name}\n{cut}{text[-_OUTPUT_SHOWN:]}")
        return "\n".join(parts)


class Launch:
    """`mpirun -n RANKS python ARGS...`, running; a context manager that leaves no process and no shared memory.

    `env` is laid over this process's environment, from which the variables of an outer `mpirun` are taken out. With
    `survive` Open MPI lets ranks outlive others (ULFM).
    """

    def __init__(
        self,
        ranks: int,
        args: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        survive: bool = False,
    ) -> None:
        path, kind = mpirun()
        self.ranks = ranks
        self.command = [path, "-n", str(ranks), sys.executable, *(os.fspath(arg) for arg in args)]
        self.token = uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OUTER_MPI)}
        self.environment = inherited | {
            "PATH": os.pathsep.join([str(Path(path).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        if kind == "openmpi":
            self.command[1:1] = ["--oversubscribe", *(["--with-ft", "ulfm"] if survive else [])]
            self.environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self.environment |= {**(env or {}), TOKEN: self.token}
        self.cwd = cwd

    def start(self) -> Launch:
        self._shared_memory_before = _shared_memory()
        # Files, not pipes: output can be read while the ranks run, and nobody blocks on a full or inherited pipe.
        self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        return self

    def __enter__(self) -> Launch:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def output(self) -> str:
        """What all ranks have printed so far, standard output and error."""
        return _read(self._stdout) + _read(self._stderr)

    def running(self) -> bool:
        """Whether the launcher still runs."""
        return self._process.poll() is None

    def processes(self) -> list[int]:
        """Every living process of this launch: the launcher, its helpers, the ranks and what they started."""
        return [pid for pid in _all_processes() if _environment(pid).get(TOKEN) == self.token]

    def rank_pid(self, rank: int, within: float = 30.0) -> int:
        """Process id of a rank, waiting up to `within` seconds for it to appear."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            mine = [pid for pid in self.processes() if _rank_of(pid) == rank]
            # A rank's own children inherit its environment; the rank is the one whose parent is none of them.
            for pid in mine:
                if _parent(pid) not in mine:
                    return pid
            if not self.running():
                break
            time.sleep(0.02)
        raise AssertionError(f"rank {rank} of {self._shown()} did not appear within {within} s\n{self.output()}")

    def kill(self, rank: int, signal_: int = signal.SIGKILL) -> None:
        """Send a signal to one rank."""
        os.kill(self.rank_pid(rank), signal_)

    def signal(self, signal_: int) -> None:
        """Send a signal to the launcher, which passes USR1 and TERM on to the ranks."""
        self._process.send_signal(signal_)

    def wait(self, timeout: float) -> Finished:
        """Wait for the end.

        Raises `AssertionError` with the output, after everything is dead, if it takes longer than `timeout` seconds.
        """
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            left = len([pid for pid in self.processes() if _rank_of(pid) is not None])
            self.stop()
            raise AssertionError(
                f"{self._shown()} hung: {left} processes of ranks still ran after {timeout} s\n{self._finished()}"
            ) from None
        self.stop()
        return self._finished()

    def stop(self) -> None:
        """End whatever still runs: SIGTERM to the launcher, then SIGKILL to all processes of this launch."""
        if self.running():
            self._process.terminate()
            _wait_until(lambda: not self.running(), 2.0)
        while remaining := self.processes():
            for pid in remaining:
                _kill(pid)
            self._process.poll()
            time.sleep(0.02)
        self._process.wait()
        self._remove_shared_memory()

    def _remove_shared_memory(self) -> None:
        """MPICH leaves its file in /dev/shm behind when a rank dies; a few hundred kills would fill the memory."""
        new = _shared_memory() - self._shared_memory_before
        orphans = new and new - _mapped_shared_memory()
        if orphans:
            time.sleep(0.05)  # a job that starts beside this one may have made its file and not mapped it yet
            for path in orphans - _mapped_shared_memory():
                path.unlink(missing_ok=True)

    def _finished(self) -> Finished:
        seconds = time.monotonic() - self._started
        return Finished(self._process.returncode, _read(self._stdout), _read(self._stderr), seconds)

    def _shown(self) -> str:
        return " ".join(self.command)


class Supervised(Launch):
    """`mpifed supervise OPTIONS -- mpirun -n RANKS python -m mpifed.run ARGS...`, running."""

    def __init__(self, ranks: int, options: Sequence[str], args: Sequence[str | os.PathLike[str]], **more: Any) -> None:
        super().__init__(ranks, ["-m", "mpifed.run", *args], **more)
        self.command = [sys.executable, "-m", "mpifed", "supervise", *options, "--", *self.command]

    def launcher_pid(self, within: float = 30.0) -> int:
        """Process id of the `mpirun` that runs now, waiting up to `within` seconds for it to appear."""
        started: list[int] = []
        _wait_until(lambda: bool(started.extend(self._children()) or started), within)
        assert started, f"{self._shown()} started nothing within {within} s\n{self.output()}"
        return started[0]

    def _children(self) -> list[int]:
        return [pid for pid in self.processes() if _parent(pid) == self._process.pid]


def launch(
    ranks: int,
    args: Sequence[str | os.PathLike[str]],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> Finished:
    """Run `mpirun -n RANKS python ARGS...` to its end.

    Raises `AssertionError` with the output if it runs longer than `timeout` seconds or, with `check`, if it fails.
    """
    with Launch(ranks, args, env=env, cwd=cwd) as running:
        finished = running.wait(timeout)
    if check and finished.returncode != 0:
        raise AssertionError(f"{running._shown()} failed: {finished}")
    return finished


def run_module(ranks: int, module: str, *args: str | os.PathLike[str], timeout: float, **options: Any) -> Finished:
    """`launch` for `python -m MODULE ARGS...`; `options` are those of `launch`."""
    return launch(ranks, ["-m", module, *args], timeout=timeout, **options)


def run_ranks(
    function: str, ranks: int, *, timeout: float, arguments: Mapping[str, Any] | None = None, **options: Any
) -> list[Any]:
    """Call `function` (`"module:function"`) on every rank and return what it returned on each, in order of ranks.

    `arguments` are its keyword arguments; they and the results travel as JSON, so that many checks share one `mpirun`.
    Raises `AssertionError` with the traceback if the function raises on any rank; the other ranks are then ended.
    """
    with tempfile.TemporaryDirectory(prefix="mpifed-ranks-") as folder:
        args = ["-m", "tests.rank_main", function, folder, json.dumps(dict(arguments or {}))]
        finished = launch(ranks, args, timeout=timeout, **options)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        missing = [rank for rank, file in enumerate(files) if not file.is_file()]
        if missing:
            raise AssertionError(f"{function} left no result on ranks {missing}: {finished}")
        return [json.loads(file.read_text()) for file in files]


def in_environment(python: str, code: str, task: Mapping[str, Any]) -> str:
    """What `code` prints in the environment of that python, with `task` as JSON on its standard input."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-c", code], input=json.dumps(task), capture_output=True, text=True, timeout=150, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- /proc -----------------------------------------------------------------------------------------------------------
def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> dict[str, str]:
    """Environment with which a process was started; empty if it is gone, a zombie, or somebody else's."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def alive(pid: int) -> bool:
    """Whether a process of this user still runs; a zombie does not."""
    return bool(_environment(pid))


def _rank_of(pid: int) -> int | None:
    environment = _environment(pid)
    return next((int(environment[name]) for name in RANK_VARIABLES if name in environment), None)


def _parent(pid: int) -> int | None:
    try:
        # "pid (command) state parent ...": the command may hold spaces and parentheses
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _shared_memory() -> set[Path]:
    """This user's shared memory of MPICH."""
    files = Path("/dev/shm").glob("mpich_shm_*")
    return {file for file in files if _owner(file) == os.getuid()}


def _owner(file: Path) -> int | None:
    try:
        return file.stat().st_uid
    except OSError:
        return None


def _mapped_shared_memory() -> set[Path]:
    """Shared memory of MPICH that a living process has mapped: a parallel run of somebody else."""
    mapped = set()
    for pid in _all_processes():
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        mapped |= {Path(line.split()[5]) for line in lines if "/dev/shm/mpich_shm_" in line}
    return mapped


def _read(file: Any) -> str:
    """All of a file that a running process appends to; its own position is left alone (they share the descriptor)."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()
