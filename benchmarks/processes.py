"""What the benchmarks share: start a run, follow the rounds that it writes down, and look at its processes in /proc.

Linux only. Nothing here imports torch, so that watching costs next to nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_RANK = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def mpifed(ranks: int, overrides: Sequence[str], launcher: str = "") -> list[str]:
    """The command line of a run on that many ranks; the `mpirun` beside this python, else the first on `PATH`."""
    beside = Path(sys.executable).parent / "mpirun"  # not resolved: a virtual environment's python is a link
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if not launcher and found is None:
        raise SystemExit("no mpirun found; install one: pip install 'mpifed[mpi]'")
    start = launcher.split() or [str(found)]
    return [*start, "-n", str(ranks), sys.executable, "-m", "mpifed.run", *overrides]


def environment(**more: str) -> dict[str, str]:
    """The environment of a run: one thread a process, and the modules of this folder importable by name."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PATH": path}
    return dict(os.environ) | variables | more


def follow(commands: Sequence[Sequence[str]], lines: Path, log: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Start the commands together and yield every JSON line that appears in the file `lines`, until all have ended.

    A line is yielded within 20 ms, with the moment (`"at"`, seconds) and the pids of all processes (`"pids"`). The
    commands' output goes to `log`; SystemExit shows its end where one fails or takes more than `seconds`.
    """
    deadline, seen = time.monotonic() + seconds, 0
    with log.open("ab") as output:
        started = [
            subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
            for command in commands
        ]
        try:
            running = True
            while running:
                running = any(process.poll() is None for process in started)
                text = lines.read_text(encoding="utf-8") if lines.exists() else ""
                whole = text[: text.rfind("\n") + 1].splitlines()
                for line in whole[seen:]:
                    pids = tree([process.pid for process in started])
                    yield {**json.loads(line), "at": time.perf_counter(), "pids": pids}
                seen = len(whole)
                failed = any(process.returncode not in (None, 0) for process in started)
                if failed or time.monotonic() > deadline:
                    what = "failed" if failed else f"took more than {seconds:g} s"
                    raise SystemExit(f"{commands[0]} {what}:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.02)
        finally:
            for process in started:
                process.terminate()
                process.wait()


def tree(roots: Sequence[int]) -> list[int]:
    """These processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                children.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
    found = list(roots)
    for pid in found:  # grows as it is walked
        found += children.get(pid, [])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes and of those that they have waited for."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += sum(int(field) for field in _stat(pid)[11:15])
    return total / _TICKS


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (`state`) on; the second may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def ranks(pids: Sequence[int]) -> dict[int, int]:
    """Rank -> pid of those processes that are ranks of an MPI job."""
    found: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError):
            if b"mpifed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                continue
            pairs = (item.partition(b"=") for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            variables = {name.decode(): value.decode(errors="replace") for name, _, value in pairs}
            number = next((variables[name] for name in _RANK if name in variables), None)
            if number is not None:
                found[int(number)] = pid
    return dict(sorted(found.items()))


def memory(pid: int) -> tuple[float, float]:
    """Resident memory now and at its highest, in MB (10^6 bytes)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    now, highest = (int(status[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return now, highest


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
