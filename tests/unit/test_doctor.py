"""Each thing that `mpifed doctor` looks at, broken for real where that can be done on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mpifed.comm.inprocess import InProcess, run_ranks
from mpifed.comm.launched import local_rank, rank, sizes
from mpifed.doctor import world
from mpifed.doctor.command import OF_A_NODE
from mpifed.doctor.files import LEFT_BEHIND, SHARED_MEMORY, data, existing, folder, hdf5, locks, shared_memory
from mpifed.doctor.finding import Finding, error, from_json, ok, to_json, warning
from mpifed.doctor.isolation import MARK, Isolated
from mpifed.doctor.mpi import family, short
from mpifed.doctor.slurm import of_the_job, of_the_site, slurm

HERE = "tests.unit.test_doctor"


def levels(found: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in found]


# --- a check in a process of its own ----------------------------------------------------------------------------------
def fine(out: Path) -> Iterator[Finding]:
    print("a library says something")
    yield ok("fine", f"in {out}")


def hangs(out: Path) -> Iterator[Finding]:
    subprocess.Popen(["sleep", "60"])
    (out / "pid").write_text(str(os.getpid()))
    time.sleep(60)
    yield ok("hangs", "never said")


def crashes(out: Path) -> Iterator[Finding]:
    os.kill(os.getpid(), 11)
    yield ok("crashes", "never said")


def raises(out: Path) -> Iterator[Finding]:
    raise RuntimeError("no such thing")


def test_a_check_says_what_it_finds(tmp_path: Path) -> None:
    assert Isolated("fine", f"{HERE}:fine", 60).start(tmp_path).findings() == [ok("fine", f"in {tmp_path}")]


def test_a_check_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    running = Isolated("hangs", f"{HERE}:hangs", 90, "pull the plug").start(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running._deadline = began = time.monotonic()  # its time is over; it is in its sleep
    assert running.findings() == [error("hangs", "did not end within 90 s", "pull the plug")]
    assert time.monotonic() - began < 10
    assert living((tmp_path / "pid").read_text()) == []


def living(group: str) -> list[str]:
    """Processes of a group that are more than an entry in a table that nobody has read."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat.parent.name] if its == group and state not in "ZX" else []
    return found


@pytest.mark.parametrize(("name", "what"), [("crashes", "by signal SIGSEGV"), ("raises", "with exit code 1")])
def test_a_check_that_crashes_costs_its_own_line(name: str, what: str, tmp_path: Path) -> None:
    [found] = Isolated(name, f"{HERE}:{name}", 60).start(tmp_path).findings()
    assert found.level == "error" and found.what.startswith(f"failed, {what}: ")
    assert name != "raises" or found.what.endswith("RuntimeError: no such thing")


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    [found] = Isolated("fine", f"{HERE}:fine", 60).start(tmp_path, before=["/no/mpirun", "-n", "2"]).findings()
    assert (found.level, found.what) == ("error", "/no/mpirun cannot be started (No such file or directory)")


def test_what_a_launcher_says_of_itself_comes_with_the_remedy(tmp_path: Path) -> None:
    """As Open MPI's does: the reason in the midst of a frame."""
    text = "-----\\nprterun has detected an attempt to run as root.\\nThis is *strongly* discouraged.\\n-----\\n"
    before = ["sh", "-c", f"printf -- '{text}' >&2; exit 1"]
    [found] = Isolated("two ranks", "", 60).start(tmp_path, before=before).findings()
    assert found.what == "failed, with exit code 1: prterun has detected an attempt to run as root."
    assert found.do == "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"


def test_every_check_of_a_node_is_there_and_has_a_limit() -> None:
    for check in OF_A_NODE:
        module, _, name = check.function.partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))
        assert 0 < check.seconds <= 180


# --- files ------------------------------------------------------------------------------------------------------------
def on_a_small_disk(size: str, at: Path, check: str, out: Path) -> list[Finding]:
    """The check in a mount namespace of its own, where a file system of that size lies over `at`."""
    script = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'
    command = [sys.executable, "-m", "mpifed.doctor.isolation", f"mpifed.doctor.files:{check}", str(out)]
    unshare = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    temporary = os.environ | {"TMPDIR": "/tmp"}
    done = subprocess.run([*unshare, "sh", "-c", script, size, str(at), *command], capture_output=True, text=True,
                          timeout=60, env=temporary)  # fmt: skip
    if MARK not in done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    return from_json(done.stdout.rpartition(MARK)[2])


def test_a_folder_that_is_fine(tmp_path: Path) -> None:
    out = tmp_path / "not" / "yet"
    assert existing(out) == tmp_path
    assert levels(folder(out)) in (["ok"], ["warning"])  # of little space, say
    assert levels([*locks(out), *hdf5(out)]) == ["ok", "ok"]
    assert levels(data(out)) in (["ok"], ["warning"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [folder, locks, hdf5])
def test_a_folder_in_which_nothing_can_be_made(check: object) -> None:
    """/proc takes no files, from root neither."""
    [found] = check(Path("/proc/runs"))  # type: ignore[operator]
    assert found.level == "error" and "/proc" in found.what and "out=" in found.do


def test_a_full_disk(tmp_path: Path) -> None:
    [found] = on_a_small_disk("512k", tmp_path, "folder", tmp_path)
    assert found.level == "error" and "a megabyte cannot be written (No space left on device)" in found.what
    [found] = on_a_small_disk("20m", tmp_path, "folder", tmp_path)
    assert (found.level == "warning" and "21 MB are free" in found.what) or "20 MB are free" in found.what


def test_a_small_dev_shm(tmp_path: Path) -> None:
    [found] = on_a_small_disk("512k", SHARED_MEMORY, "shared_memory", tmp_path)
    assert found.level == "error" and "No space left on device" in found.what
    [found] = on_a_small_disk("64m", SHARED_MEMORY, "shared_memory", tmp_path)
    assert (found.level, found.what) == ("warning", "67 MB are free")


def test_what_dead_jobs_left_in_dev_shm(tmp_path: Path) -> None:
    left = SHARED_MEMORY / LEFT_BEHIND[0].replace("*", f"doctor_{os.getpid()}")
    left.write_bytes(bytes(5000))
    try:
        found = [finding for finding in shared_memory(tmp_path) if "no process uses" in finding.what]
    finally:
        left.unlink()
    assert levels(found) == ["warning"] and "rm /dev/shm/" in found[0].do


def test_hdf5_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")
    done = Isolated("hdf5", "mpifed.doctor.files:hdf5", 60).start(tmp_path).findings()
    assert levels(done) == ["ok"] and "not locked, as HDF5_USE_FILE_LOCKING=FALSE says" in done[0].what


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, to make a file system without locks of this one")
def test_a_file_system_on_which_locking_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flock` as some network file systems have it: ENOLCK."""
    source, library = tmp_path / "flock.c", tmp_path / "flock.so"
    source.write_text("#include <errno.h>\nint flock(int fd, int how) { errno = ENOLCK; return -1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    [found] = Isolated("hdf5", "mpifed.doctor.files:hdf5", 60).start(tmp_path).findings()
    assert found.level == "error" and "unable to lock file" in found.what, found
    assert found.do == "export HDF5_USE_FILE_LOCKING=FALSE"
    [found] = Isolated("locks", "mpifed.doctor.files:locks", 60).start(tmp_path).findings()
    assert found.level == "warning" and "nothing keeps two runs out of one folder" in found.do


# --- ranks ------------------------------------------------------------------------------------------------------------
def test_what_launchers_say() -> None:
    mpich = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "SLURM_NTASKS": "8"}
    openmpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    srun = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "2"}
    assert [(sizes(env), rank(env), local_rank(env)) for env in (mpich, openmpi, srun, {})] == [
        ({"PMI_SIZE": 4}, 3, 1),
        ({"OMPI_COMM_WORLD_SIZE": 2}, 1, 0),
        ({"SLURM_STEP_NUM_TASKS": 5}, 4, 2),
        ({}, 0, 0),
    ]


def test_families_of_libraries() -> None:
    said = {
        "HYDRA build details:\n Version: 5.0.2": "MPICH",
        "MPICH Version:      5.0.2": "MPICH",
        "mpirun (Open MPI) 5.0.11": "Open MPI",
        "Intel(R) MPI Library for Linux* OS, Version 2021.18": "Intel MPI",
        "something": "",
    }
    assert {text: family(text) for text in said} == said
    assert short("Open MPI v5.0.11, package: Open MPI user@host") == "Open MPI v5.0.11"


@pytest.mark.parametrize(
    ("allowed", "on_the_node", "level", "what"),
    [
        ([[0, 1], [0, 1]], 2, "ok", "2 ranks on 2 cores, not bound"),
        ([[0], [1]], 2, "ok", "2 ranks on 2 cores, each bound to its own"),
        ([[0]], 4, "ok", "1 rank on 1 cores, not bound"),
        ([[0, 1]] * 4, 2, "warning", "4 ranks on 2 cores: they take turns"),
        ([[0]] * 3, 8, "warning", "the launcher binds 3 ranks to 1 of 8 cores"),
        ([[0], [0], [1, 2]], 8, "warning", "some of the 3 ranks are bound to the same cores"),
    ],
)
def test_binding(allowed: list[list[int]], on_the_node: int, level: str, what: str) -> None:
    [found] = world.sharing(["a"] * len(allowed), allowed, on_the_node)
    assert found.level == level and found.what.startswith(what)


def test_nodes_that_find_the_same_say_it_once() -> None:
    """Rank 1 is not the first of its node and looked at nothing."""
    found = world.merged(
        ["a", "a", "b", "c"],
        [[ok("x", "1 GB"), ok("y", "fine")], [], [ok("x", "2 GB"), warning("y", "bad", "mend it")], [ok("x", "3 GB")]],
    )
    assert found == [
        ok("x", "1 GB (and so on 2 more nodes)"),
        ok("y", "fine"),
        Finding("warning", "y", "bad", "mend it", "b"),
    ]
    assert world.merged(["a", "a"], [[error("x", "bad")], []]) == [error("x", "bad")]


def test_versions_that_differ() -> None:
    said = [{"host": "a", "version torch": "2.4"}, {"host": "b", "version torch": "2.5"}]
    assert levels(world.same_versions(said)) == ["error"]
    assert levels(world.same_versions(said[:1])) == []


def test_waiting_and_clocks_on_threads() -> None:
    """Threads of one process poll a condition: they take no core, and have one clock."""
    said = [{"host": "a"}, {"host": "b"}, {"host": "b"}]
    found = run_ranks(3, lambda comm: [*world.waiting(comm), *world.clocks(comm, said if comm.rank == 0 else None)])
    assert levels(found[0]) == ["ok", "ok"] and "2 nodes agree to" in found[0][1].what
    assert world.waiting(InProcess.alone()) == []


def test_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = [{"seen": [10.0, 11.0], "uneven": 0.0}, {"seen": [15.0, 16.2], "uneven": 0.5}]
    monkeypatch.setattr(InProcess, "gather_json", lambda comm, value: gathered)
    found = world.clocks(InProcess.alone(), [{"host": "a"}, {"host": "b"}])
    assert [finding.what for finding in found] == [
        "b: the clock was set by 0.5 s meanwhile",
        "b is +5.2 s off a",
    ]


# --- Slurm ------------------------------------------------------------------------------------------------------------
def listed(*types: str) -> subprocess.CompletedProcess[str]:
    """What `srun --mpi=list` prints, on standard error."""
    return subprocess.CompletedProcess(
        [], 0, "", "MPI plugin types are...\n" + "".join(f"\t{name}\n" for name in types)
    )


SITE = {"SLURM_VERSION": "22.05.8", "MpiDefault": "pmi2", "KillOnBadExit": "1"}


def test_srun_types() -> None:
    assert levels(of_the_site(SITE, listed("pmi2", "none"), "MPICH")) == ["ok"]
    [found] = of_the_site(SITE | {"MpiDefault": "none"}, listed("pmi2", "none"), "MPICH")
    assert found.level == "warning" and found.do.startswith("srun --mpi=pmi2")
    [found] = of_the_site(SITE, listed("pmix", "pmix_v4", "pmi2"), "Open MPI")
    assert found.level == "warning" and found.do.startswith("srun --mpi=pmix")
    [found] = of_the_site(SITE, listed("pmi2", "none"), "Open MPI")
    assert found.level == "warning" and "mpirun" in found.do
    found_ = list(of_the_site(SITE | {"KillOnBadExit": "0"}, listed("pmi2"), "MPICH"))
    assert levels(found_) == ["ok", "warning"] and "--wait=60" in found_[1].do


def test_a_slurm_job() -> None:
    job = "JobId=7 JobName=x\n   Requeue=1 Restarts=0 TimeLimit=01:00:00 EndTime=2026-11-25T09:00:00"
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1764061200"}
    assert levels(of_the_job(job, environment)) == ["ok"]
    assert "slurm/run.sh" in next(of_the_job(job, {"SLURM_JOB_ID": "7"})).do
    assert "sbatch --requeue" in next(of_the_job(job.replace("Requeue=1", "Requeue=0"), environment)).do
    assert levels(of_the_job("", environment)) == ["warning"]


def test_no_slurm_and_one_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is a `scontrol` that fails, as Slurm's own does without its controller."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert list(slurm(tmp_path)) == [ok("slurm", "none here")]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert levels(slurm(tmp_path)) == ["error"]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    scontrol.chmod(0o755)
    [found] = slurm(tmp_path)
    assert found.level == "error" and "Unable to contact slurm controller" in found.what


# --- the lines --------------------------------------------------------------------------------------------------------
def test_a_line_says_all() -> None:
    found = Finding("warning", "cores", "too few", "buy some", "n1")
    assert found.line() == "warning  cores     n1: too few; buy some"
    assert found.line(colour=True) == "\033[33mwarning \033[0m cores     n1: too few; buy some"
    assert from_json(to_json([found])) == [found]
