"""The harness that starts MPI is itself tested: success, failure, a hang, one rank killed, and nothing left over."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.launch import Launch, launch, mpirun, run_module, run_ranks

HANG = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)
START_UP = 30.0


def sum_of_ranks(offset: int) -> dict[str, int]:
    """On each rank: its number and the sum of (number + offset) over all ranks."""
    import numpy as np
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    total = np.zeros(1, dtype=np.int64)
    MPI.COMM_WORLD.Allreduce(np.array([rank + offset], dtype=np.int64), total)
    return {"rank": rank, "total": int(total[0])}


def one_rank_raises() -> None:
    """Rank 1 raises while the others wait for it."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        raise ValueError("rank one has had enough")
    MPI.COMM_WORLD.Barrier()


def test_output_and_exit_code_come_back() -> None:
    # each line in one write: `print` makes two of them, and another rank's may come in between
    program = "import sys; sys.stdout.write('out\\n'); sys.stderr.write('err\\n')"
    finished = launch(2, ["-c", program], timeout=START_UP)
    assert finished.returncode == 0
    assert finished.stdout.split() == ["out", "out"]
    assert finished.stderr.split() == ["err", "err"]


def test_environment_and_folder_reach_the_ranks(tmp_path) -> None:
    program = "import os, mpifed; print(os.getcwd(), os.environ['COLOUR'], os.environ['OMP_NUM_THREADS'])"
    finished = launch(1, ["-c", program], timeout=START_UP, env={"COLOUR": "green"}, cwd=tmp_path)
    assert finished.stdout.split() == [str(tmp_path), "green", "1"]


def test_a_failure_raises_with_the_output_unless_it_is_asked_for() -> None:
    program = "import sys; print('the reason'); sys.exit(7)"
    with pytest.raises(AssertionError, match=r"exit code 7[\s\S]*the reason"):
        launch(1, ["-c", program], timeout=START_UP)
    assert launch(1, ["-c", program], timeout=START_UP, check=False).returncode == 7


@pytest.mark.parametrize("program", [HANG, STUBBORN], ids=["asleep", "ignores SIGTERM"])
def test_a_hang_fails_within_the_limit_and_leaves_no_process(program: str) -> None:
    """Limit 1 s, then 2 s for a graceful end: over after 3 s, and well before 20 s on a busy machine."""
    started = time.monotonic()
    running = Launch(2, ["-c", program]).start()
    pids = [running.rank_pid(rank) for rank in range(2)]
    with pytest.raises(AssertionError, match="hung: 2 processes of ranks still ran after 1 s"):
        running.wait(1)
    assert time.monotonic() - started < 20
    assert running.processes() == []
    assert not any(alive(pid) for pid in pids)


def test_a_grandchild_is_ended_as_well() -> None:
    """A rank leaves a child in a session of its own behind."""
    program = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=-3, stderr=-3)"
    with Launch(1, ["-c", program]) as running:
        running.wait(START_UP)
    assert running.processes() == []


def test_one_rank_is_found_and_killed() -> None:
    """Each rank has a child with the same environment: the pid must be the rank's own, as it prints it."""
    program = (
        "import os, subprocess, time; child = subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3);"
        "print('pid', os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')), os.getpid(), flush=True);"
        "time.sleep(600)"
    )
    with Launch(3, ["-c", program]) as running:
        deadline = time.monotonic() + START_UP
        while running.output().count("pid") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        printed = {
            int(line.split()[1]): int(line.split()[2]) for line in running.output().splitlines() if "pid" in line
        }
        assert {rank: running.rank_pid(rank) for rank in range(3)} == printed
        running.kill(1)
        finished = running.wait(START_UP)  # the launcher ends the others
    assert finished.returncode != 0
    assert running.processes() == []


def test_a_rank_that_does_not_exist_is_not_found() -> None:
    with Launch(1, ["-c", "pass"]) as running, pytest.raises(AssertionError, match="rank 5 of .* did not appear"):
        running.rank_pid(5)


def test_a_signal_to_the_launcher_reaches_the_ranks() -> None:
    program = (
        "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75));"
        "print('ready', flush=True); time.sleep(600)"
    )
    with Launch(1, ["-c", program]) as running:
        deadline = time.monotonic() + START_UP
        while "ready" not in running.output() and time.monotonic() < deadline:
            time.sleep(0.05)
        running.signal(signal.SIGUSR1)
        assert running.wait(START_UP).returncode == 75


def test_a_function_runs_on_every_rank() -> None:
    """Ranks 0, 1, 2 with offset 10: 10 + 11 + 12 = 33."""
    results = run_ranks("tests.unit.test_launch:sum_of_ranks", 3, timeout=START_UP, arguments={"offset": 10})
    assert results == [{"rank": rank, "total": 33} for rank in range(3)]


def test_an_exception_on_one_rank_ends_all_and_is_shown() -> None:
    with pytest.raises(AssertionError, match="rank 1, .*one_rank_raises:[\\s\\S]*rank one has had enough"):
        run_ranks("tests.unit.test_launch:one_rank_raises", 3, timeout=START_UP)


def test_a_module_is_run_with_its_arguments() -> None:
    assert run_module(1, "json.tool", "--help", timeout=START_UP).stdout.startswith("usage")


def test_shared_memory_of_a_killed_rank_is_removed() -> None:
    """MPICH removes its file in /dev/shm at an orderly end only; other libraries have none of that name."""
    program = (
        "from mpi4py import MPI; import os, signal;"
        "lines = open('/proc/self/maps').read().splitlines();"
        "print(*{line.split()[5] for line in lines if '/dev/shm/mpich_shm_' in line}, flush=True);"
        "MPI.COMM_WORLD.Barrier();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    finished = launch(2, ["-c", program], timeout=START_UP, check=False)
    mapped = {word for word in finished.stdout.split() if word.startswith("/dev/shm/")}
    assert mapped or mpirun()[1] != "mpich"
    assert not any(Path(path).exists() for path in mapped)


def test_ranks_die_with_the_test_process() -> None:
    """A test process that is killed takes its launcher along, and the launcher its ranks."""
    program = (
        "import os; from tests.launch import Launch;"
        f"inner = Launch(2, ['-c', {HANG!r}]).start();"
        "print(inner.rank_pid(0), inner.rank_pid(1), flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    finished = launch(1, ["-c", program], timeout=START_UP, check=False)
    pids = [int(word) for word in finished.stdout.splitlines()[0].split()]
    assert len(pids) == 2
    deadline = time.monotonic() + START_UP
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has collected yet has no command line any more."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False
