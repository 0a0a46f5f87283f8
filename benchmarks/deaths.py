"""Kill ranks of runs that are to get over it, and demand that every one ends complete and equal to an undisturbed run.

usage:  python benchmarks/deaths.py [--kills 20] [--ranks 6] [--seed S] [--case TEXT] [--json deaths.json]

Parts:
  shrink   SIGKILL of a random client rank at a random time, under `on_rank_death = "shrink"`: the others go on
  twice    two of them, at two random times
  point    SIGKILL at fail-points of the round and of the checkpoint's commit: of rank 1, and, as the round is
           repeated, of the next that has this number, until rank 0 is alone or the round is saved
  hang     a rank that hangs is ended by itself, and the others go on
  server   SIGKILL of rank 0: the job ends, not with exit code 0, and `--resume` ends it well
  raise    an exception outside a client's own work: the job ends with one traceback, and `--resume` ends it well
  restart  SIGKILL of a random client rank under the default, by `mpifed supervise`

All but `restart` need Open MPI 5 or newer; with another MPI, that part alone is run. The job is that of
`benchmarks/kills.py`, SCAFFOLD with a state on every client, about half of whose time is communication.

A case depends on the seed and its number alone: `--seed 7 --case "shrink 12"` repeats one. Exit code 1 where a case
misses; its folder is then kept and named.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kills import HANG_S, JOB, ROUNDS, Result, Sweep, assert_that, conclude  # noqa: E402
from mpifed.errors import COMPLETE, UNEXPECTED  # noqa: E402
from mpifed.rng import numpy_generator  # noqa: E402
from mpifed.storage.run_folder import RunFolder  # noqa: E402
from tests.faults.outcome import Outcome, differences  # noqa: E402
from tests.launch import Launch, Supervised, mpirun  # noqa: E402

POINTS = (
    ("round.after_download", 1),
    ("client.after", 3),
    ("round.before_upload", 2),
    ("round.after_upload", 5),
    ("checkpoint.file_written", 2),
    ("checkpoint.agreed", 4),
    ("checkpoint.pruned", 5),
)
"""(fail-point, round)."""


@dataclass
class Survived(Result):
    """What a case showed, with seconds: from a kill to the first survivor's notice, and from there to going on."""

    detect: list[float] = field(default_factory=list)
    recover: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        listed = ", ".join(f"{1000 * detect:.0f}" for detect in self.detect)
        again = ", ".join(f"{1000 * recover:.0f}" for recover in self.recover)
        return super().__str__() + (f"; ms to detect {listed or '-'}, to recover {again}" if self.recover else "")


def _rounds(folder: Path) -> int:
    """Rounds that the run has written down; -1 before it has made its folder's files."""
    metrics = RunFolder(folder).metrics
    return metrics.read_bytes().count(b"\n") if metrics.exists() else -1


class Deaths(Sweep):
    """The cases, in a folder of their own."""

    def start(self, folder: Path, *overrides: str, failpoint: str = "", how: type[Launch] = Launch) -> Launch:
        """The job, or its resume, under `shrink`; or under `mpifed supervise`."""
        exists = RunFolder(folder).job.exists()
        what = ["--resume", str(folder)] if exists else [str(JOB), f"out={folder}", f"clients={max(5, self.ranks)}"]
        options: dict[str, Any] = {"env": {"MPIFED_FAILPOINT": failpoint}, "cwd": self.folder}
        if how is Supervised:
            return Supervised(self.ranks, ["--wait", "0"], [*what, *overrides], **options)
        words = ["-m", "mpifed.run", *what, "on_rank_death=shrink", *overrides]
        return Launch(self.ranks, words, survive=True, **options)

    @contextlib.contextmanager
    def survived(self, name: str) -> Iterator[tuple[Survived, Path]]:
        with self.case(name, Survived(name)) as (result, folder):
            assert isinstance(result, Survived)
            yield result, folder

    def check_complete(self, folder: Path, result: Survived, running: Launch, kills: Sequence[float] = ()) -> None:
        """The command ends with 0, leaves nothing behind, and its run equals the undisturbed one."""
        self.end(running, result)
        assert_that(result.exit_code == COMPLETE, f"exit code {result.exit_code}: {self._last}")
        outcome = Outcome.read(folder)
        wrong = differences(self.expected, outcome)
        assert_that(not wrong, f"differs in {', '.join(wrong)}")
        deaths = outcome.summary["deaths"]
        result.recover = [death["recovered_s"] for death in deaths]
        noticed = [datetime.datetime.fromisoformat(death["noticed"]).timestamp() for death in deaths]
        if len(kills) == len(noticed):
            result.detect = [at - killed for at, killed in zip(noticed, kills, strict=True)]
        result.equal = True

    # --- the cases ----------------------------------------------------------------------------------------------------
    def random_kills(self, part: str, number: int, kills: int, how: type[Launch] = Launch) -> None:
        """So many client ranks, each at a random time in a random round; in another run, where one had left before."""
        with self.survived(f"{part} {number}") as (result, folder):
            for attempt in range(10):
                shutil.rmtree(folder, ignore_errors=True)
                if self._killed(result, folder, (part, number, attempt), kills, how):
                    return
            raise AssertionError("ten runs in a row ended before they could be killed")

    def _killed(
        self, result: Survived, folder: Path, draw: tuple[str, int, int], kills: int, how: type[Launch]
    ) -> bool:
        rng = numpy_generator(self.seed, "death", *draw)
        ranks = [int(rank) for rank in 1 + rng.permutation(self.ranks - 1)[:kills]]
        moments = sorted((int(rng.integers(1, ROUNDS - 1)), rng.random()) for _ in ranks)
        result.said = ", ".join(
            f"rank {rank} {round_ + later:.2f} rounds after the beginning"
            for rank, (round_, later) in zip(ranks, moments, strict=True)
        )
        killed: list[float] = []
        with self.start(folder, how=how) as running:
            pids = [running.rank_pid(rank) for rank in ranks]
            while running.running() and _rounds(folder) < 0:
                time.sleep(0.002)
            began = time.monotonic()
            for pid, (round_, later) in zip(pids, moments, strict=True):
                while running.running() and _rounds(folder) < round_:
                    time.sleep(0.002)
                time.sleep(later * (time.monotonic() - began) / round_)
                if not running.running() or RunFolder(folder).summary.exists():
                    return False
                killed.append(time.time())
                os.kill(pid, signal.SIGKILL)
            self.check_complete(folder, result, running, killed)
            if how is Supervised:
                return "starting again" in running.output()
            deaths = Outcome.read(folder).summary["deaths"]
            return sorted(rank for death in deaths for rank in death["ranks"]) == sorted(ranks)

    def repeated(self, name: str, round_: int) -> None:
        """Rank 1 dies there, and in the repeated round the next, until rank 0 is alone or the round is saved."""
        with self.survived(f"point {name}:{round_}") as (result, folder):
            with self.start(folder, failpoint=f"{name}:{round_}:1") as running:
                self.check_complete(folder, result, running)
            assert_that(len(result.recover) > 0, "nobody died")

    def hang(self) -> None:
        with self.survived("hang client.after:3:1") as (result, folder):
            with self.start(folder, f"round_timeout={HANG_S}", failpoint="client.after:3:1:hang") as running:
                self.check_complete(folder, result, running)
            assert_that(result.recover != [] and "rank 1 is ended" in str(self._last), f"{self._last}")

    def server(self) -> None:
        with self.survived("server server.after:3:0") as (result, folder):
            with self.start(folder, failpoint="server.after:3:0") as running:
                finished = self.end(running, result, [running.rank_pid(0)])
            assert_that(finished.returncode != COMPLETE, "mpirun returned 0")
            said = finished.stderr.count("rank 0, the server, died; the job ends")
            assert_that(said == 1, f"that is said {said} times in {finished}")
            with self.start(folder) as running:
                self.check_complete(folder, result, running)

    def exception(self) -> None:
        with self.survived("raise client.before:3:1") as (result, folder):
            with self.start(folder, failpoint="client.before:3:1:raise") as running:
                finished = self.end(running, result)
            assert_that(finished.returncode == UNEXPECTED, f"{finished}")
            assert_that(finished.stderr.count("Traceback") == 1, f"{finished}")
            with self.start(folder) as running:
                self.check_complete(folder, result, running)

    def cases(self, kills: int) -> Iterator[tuple[str, Callable[[], None]]]:
        if mpirun()[1] == "openmpi":
            for number in range(kills):
                yield f"shrink {number}", lambda number=number: self.random_kills("shrink", number, 1)  # type: ignore[misc]
            for number in range(kills):
                yield f"twice {number}", lambda number=number: self.random_kills("twice", number, 2)  # type: ignore[misc]
            for point in POINTS:
                yield f"point {point[0]}:{point[1]}", lambda point=point: self.repeated(*point)  # type: ignore[misc]
            yield "hang", self.hang
            yield "server", self.server
            yield "raise", self.exception
        for number in range(kills):
            yield (
                f"restart {number}",
                lambda number=number: self.random_kills("restart", number, 1, Supervised),  # type: ignore[misc]
            )


def table(results: Sequence[Survived]) -> str:
    """Part by part: cases, how many are as required, milliseconds to detect and to recover."""

    def times(values: Sequence[float]) -> str:
        return f"{1000 * statistics.median(values):6.0f} / {1000 * max(values):6.0f}" if values else f"{'-':>15s}"

    lines = ["part          cases  as required   ms to detect: median / most   ms to recover: median / most"]
    for part in dict.fromkeys(result.part for result in results):
        chosen = [result for result in results if result.part == part]
        detect = [value for result in chosen for value in result.detect]
        recover = [value for result in chosen for value in result.recover]
        equal = sum(result.equal for result in chosen)
        lines.append(f"{part:<12s} {len(chosen):>6d} {equal:>12d}   {times(detect):>27s}   {times(recover):>28s}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random kills of each kind (20)")
    parser.add_argument("--ranks", type=int, default=6, help="at least 4")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of the random kills")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only cases that begin so; may be repeated")
    parser.add_argument("--json", type=Path, default=Path("deaths.json"), help="where the results are written")
    arguments = parser.parse_args()
    if arguments.ranks < 4:
        parser.error("--ranks: at least 4, so that two can die")
    print(f"seed {arguments.seed}, {arguments.ranks} ranks", flush=True)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mpifed-deaths-"))
    sweep = Deaths(folder, arguments.ranks, arguments.seed)
    sweep.prepare()
    print(f"undisturbed: {sweep.training_s:.1f} s from the run folder to its summary", flush=True)
    for name, run in sweep.cases(arguments.kills):
        if name.startswith(tuple(arguments.case or [""])):
            run()
    results = [result for result in sweep.results if isinstance(result, Survived)]
    return conclude(sweep, results, table(results), started, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
