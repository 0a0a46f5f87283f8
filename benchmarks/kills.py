"""Break runs on purpose, hundreds of times, and demand that every one ends, resumes, and equals an undisturbed run.

usage:  python benchmarks/kills.py [--sample] [--random 100] [--seed S] [--ranks 3] [--case TEXT] [--json kills.json]

Parts:
  unreached   fail-points that a rank never comes to, all armed at once: the run completes as if they were not there
  point       SIGKILL at every other fail-point, in the first, a middle and the last round, at the server, the first
              rank with clients and the last; then `--resume`
  resume      a second SIGKILL, at the fail-points of the resume itself; then a third start
  random      SIGKILL of a random rank, of all ranks, of the server or of mpirun, at a random time; then `--resume`
  action      an exception, a hang and a sudden exit at several fail-points; then `--resume`

Required of every case: the whole job has ended within `END_S` seconds of a kill (`RUN_S` after its start otherwise)
with an exit code other than 0; the newest checkpoint holds the state after the last round that can be expected, bit
for bit; the run that went on is complete and equals the undisturbed one in server state, client states, metrics and
ledger, bit for bit. Half of the cases go on with the same number of ranks, half with one rank.

A random case depends on the seed and its number alone: `--seed 7 --case "random 12"` repeats one. Exit code 1 where a
case misses; its folder is then kept and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mpifed import failpoints  # noqa: E402
from mpifed.rng import numpy_generator  # noqa: E402
from mpifed.storage.record import software_versions  # noqa: E402
from mpifed.storage.run_folder import RunFolder  # noqa: E402
from tests.faults.outcome import Outcome, differences, newest, states, states_by_round  # noqa: E402
from tests.launch import Finished, Launch  # noqa: E402

JOB = ROOT / "tests/faults/job.toml"
ROUNDS = 5
END_S = 15.0
"""Seconds within which a job whose rank was killed has ended: every process of it."""
RUN_S = 120.0
"""Seconds within which a whole run has ended, whatever happens to it; a few seconds on an idle machine."""
HANG_S = 5.0
"""`round_timeout` of the runs in which a rank hangs."""
EARLY = 0.1
"""Share of the random kills that come before the run folder exists."""

ABORT_CODES = (1, 9)
"""`mpirun` after an abort with 1: MPICH's may return 9 instead, with which it kills the other ranks meanwhile."""

RESUMING = ("resume.found", "resume.loaded")
COMMITTED = ("checkpoint.renamed", "checkpoint.pruned")
ACTIONS = (
    ("raise", "round.start", 1, 0),
    ("raise", "client.before", 2, 1),
    ("raise", "client.after", 5, -1),
    ("raise", "server.before", 3, 0),
    ("raise", "checkpoint.file_open", 2, -1),
    ("raise", "checkpoint.agreed", 3, 1),
    ("raise", "checkpoint.manifest_written", 4, 0),
    ("hang", "round.after_download", 1, 1),
    ("hang", "client.after", 2, -1),
    ("hang", "server.after", 3, 0),
    ("hang", "checkpoint.file_written", 2, 1),
    ("hang", "checkpoint.renamed", 5, 0),
    ("exit", "round.before_upload", 2, 1),
    ("exit", "server.before", 3, 0),
    ("exit", "checkpoint.file_written", 4, -1),
)
"""(action, fail-point, round, rank; -1 is the last rank)."""


@dataclass
class Result:
    """What a case showed. `to_end`: seconds from the kill to the end of the last process."""

    case: str
    ended: bool = False
    equal: bool = False
    to_end: float | None = None
    exit_code: int | None = None
    checkpoint: int | None = None
    resumed_on: int | None = None
    seconds: float = 0.0
    said: str = ""

    @property
    def part(self) -> str:
        return self.case.split()[0]

    def __str__(self) -> str:
        facts = {
            "exit": self.exit_code,
            "end after": None if self.to_end is None else f"{self.to_end:.2f} s",
            "checkpoint of round": self.checkpoint,
            "resumed on": self.resumed_on,
        }
        listed = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        return f"{'ok  ' if self.equal else 'MISS'} {self.case:<46s} {listed}{'; ' + self.said if self.said else ''}"


class Sweep:
    """The cases of one sweep, in a folder of their own."""

    def __init__(self, folder: Path, ranks: int, seed: int) -> None:
        self.folder = folder
        self.ranks = ranks
        self.seed = seed
        self.results: list[Result] = []
        self._last: Finished | None = None

    # --- the undisturbed run ------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Run undisturbed with every rank and with one; what comes of it is what every other run is compared with."""
        outcomes: dict[int, Outcome] = {}
        for ranks in (self.ranks, 1):
            folder = self.folder / f"undisturbed_{ranks}"
            started = time.monotonic()
            with self.launch(ranks, folder, "checkpoint.keep=100") as running:
                while running.running() and not RunFolder(folder).job.exists():
                    time.sleep(0.005)
                made = time.monotonic()
                while running.running() and not RunFolder(folder).summary.exists():
                    time.sleep(0.005)
                written = time.monotonic()
                assert_that((finished := running.wait(RUN_S)).returncode == 0, str(finished))
            if ranks == self.ranks:
                self.starting_s, self.training_s = made - started, written - made
            outcomes[ranks] = Outcome.read(folder)
        self.expected = outcomes[self.ranks]
        self.by_round = states_by_round(self.folder / f"undisturbed_{self.ranks}")
        wrong = differences(self.expected, outcomes[1])
        assert_that(not wrong, f"1 and {self.ranks} ranks differ undisturbed in {', '.join(wrong)}")

    def launch(self, ranks: int, folder: Path, *overrides: str, failpoint: str = "") -> Launch:
        """A start of the job in `folder`, or of its resume where there is something to resume."""
        exists = RunFolder(folder).job.exists()
        what = ["--resume", str(folder)] if exists else [str(JOB), f"out={folder}", f"clients={max(5, self.ranks)}"]
        environment = {"MPIFED_FAILPOINT": failpoint}
        return Launch(ranks, ["-m", "mpifed.run", *what, *overrides], env=environment, cwd=self.folder)

    # --- what is required of every case -------------------------------------------------------------------------------
    @contextlib.contextmanager
    def case(self, name: str, result: Result | None = None) -> Iterator[tuple[Result, Path]]:
        """One case: a miss is written down, with the folder in which it can be looked at; the sweep goes on."""
        result, folder = result or Result(name), self.folder / name.replace(" ", "_").replace(":", "_")
        started = time.monotonic()
        try:
            yield result, folder
        except Exception as error:  # a miss, of whatever kind
            folder.mkdir(exist_ok=True)
            (folder / "last_output.txt").write_text(str(self._last), encoding="utf-8")
            result.equal, result.said = False, f"{type(error).__name__}: {error} (see {folder})"
        else:
            shutil.rmtree(folder, ignore_errors=True)
        result.seconds = time.monotonic() - started
        self.results.append(result)
        print(result, flush=True)

    def end(self, running: Launch, result: Result, pids: list[int] | None = None) -> Finished:
        """Wait for the end of a job; `pids` are the processes whose death starts the clock, if there are any."""
        deadline = time.monotonic() + RUN_S
        while pids and time.monotonic() < deadline and all(map(_alive, pids)):
            time.sleep(0.005)
        died = time.monotonic()
        until = min(deadline, died + END_S) if pids else deadline
        while (running.running() or running.processes()) and time.monotonic() < until:
            time.sleep(0.02)
        left = running.processes()
        result.to_end = time.monotonic() - died if pids else None
        finished = self._last = running.wait(0.1 if left else 10.0)
        assert_that(not left, f"{len(left)} processes were still there\n{finished}")
        result.ended, result.exit_code = True, finished.returncode
        return finished

    def check_checkpoint(self, folder: Path, result: Result, rounds: set[int]) -> None:
        """The newest checkpoint is of one of these rounds (0: none), and holds exactly what that round left."""
        if not RunFolder(folder).job.exists():
            shutil.rmtree(folder, ignore_errors=True)  # died as it began to make the folder
            assert_that(0 in rounds, "the run folder was not made")
            return
        found = newest(folder)
        result.checkpoint = found.round if found else 0
        assert_that(result.checkpoint in rounds, f"the checkpoint is of round {result.checkpoint}, not of {rounds}")
        if found:
            assert_that(states(found) == self.by_round[found.round], f"{found.path} differs from the undisturbed run")

    def go_on(self, folder: Path, result: Result) -> None:
        """Start again, and compare the end with the undisturbed run's."""
        result.resumed_on = (self.ranks, 1)[len(self.results) % 2]
        with self.launch(result.resumed_on, folder) as running:
            finished = self._last = running.wait(RUN_S)
        assert_that(finished.returncode == 0, f"the next start failed: {finished}")
        wrong = differences(self.expected, Outcome.read(folder))
        assert_that(not wrong, f"differs in {', '.join(wrong)}")
        result.equal = True

    # --- the cases ----------------------------------------------------------------------------------------------------
    def unreached(self, points: list[tuple[str, int, int]]) -> None:
        with self.case(f"unreached ({len(points)} at once)") as (result, folder):
            with self.launch(self.ranks, folder, failpoint=_armed(points)) as running:
                finished = running.wait(RUN_S)
            result.exit_code = finished.returncode
            assert_that(finished.returncode == 0, f"one was reached: {finished}")
            wrong = differences(self.expected, Outcome.read(folder))
            assert_that(not wrong, f"differs in {', '.join(wrong)}")
            result.ended = result.equal = True
            result.said = ", ".join(f"{name}:{round_}:{rank}" for name, round_, rank in points)

    def point(self, name: str, round_: int, rank: int) -> None:
        with self.case(f"point {name}:{round_}:{rank}") as (result, folder):
            with self.launch(self.ranks, folder, failpoint=_armed([(name, round_, rank)])) as running:
                self.end(running, result, [running.rank_pid(rank)])
            assert_that(result.exit_code != 0, "the fail-point was not reached, or mpirun returned 0")
            self.check_checkpoint(folder, result, _rounds_to_expect(name, round_, rank))
            self.go_on(folder, result)

    def resume(self, name: str, round_: int, rank: int) -> None:
        with self.case(f"resume {name}:{round_}:{rank}") as (result, folder):
            crashed = self.folder / f"crashed_{round_}"
            if not crashed.exists():
                point = _armed([("checkpoint.pruned", round_, 0)])
                with self.launch(self.ranks, crashed, failpoint=point) as running:
                    assert_that(running.wait(RUN_S).returncode != 0, "the first crash did not happen")
            shutil.copytree(crashed, folder)
            with self.launch(self.ranks, folder, failpoint=_armed([(name, round_, rank)])) as running:
                self.end(running, result, [running.rank_pid(rank)])
            assert_that(result.exit_code != 0, "the fail-point was not reached, or mpirun returned 0")
            self.check_checkpoint(folder, result, {round_})
            self.go_on(folder, result)

    def random(self, number: int, victims: list[int] | None = None) -> None:
        """`victims` are ranks, none for mpirun; drawn as well, unless they are given."""
        with self.case(f"random {number}") as (result, folder):
            for attempt in range(10):
                shutil.rmtree(folder, ignore_errors=True)
                if self._killed_at_random(result, folder, number, attempt, victims):
                    break
                wrong = differences(self.expected, Outcome.read(folder))  # it was faster than the kill
                assert_that(not wrong, f"undisturbed, it differs in {', '.join(wrong)}")
            else:
                raise AssertionError("ten runs in a row ended before they could be killed")
            complete = RunFolder(folder).complete
            lines = len(RunFolder(folder).read_metrics())
            lost_at_most_one = set(range(min(lines, ROUNDS), ROUNDS + 1))  # a row is written once its round is saved
            self.check_checkpoint(folder, result, {ROUNDS} if complete else lost_at_most_one)
            self.go_on(folder, result)

    def _killed_at_random(
        self, result: Result, folder: Path, number: int, attempt: int, given: list[int] | None
    ) -> bool:
        rng = numpy_generator(self.seed, "kill", number, attempt)
        groups = [[rank] for rank in range(self.ranks)] + [list(range(self.ranks)), []]
        drawn = groups[rng.integers(len(groups))]
        victims = drawn if given is None else given
        early, share = rng.random() < EARLY, rng.random()
        after = share * (self.starting_s if early else self.training_s)
        who = f"ranks {victims}" if victims else "mpirun"
        result.said = f"{who} {after:.3f} s after {'mpirun' if early else 'the run folder'} was there"
        started = time.monotonic()
        with self.launch(self.ranks, folder) as running:
            pids = [running.rank_pid(rank) for rank in victims]
            while not early and running.running() and not RunFolder(folder).job.exists():
                time.sleep(0.002)
            begin = started if early else time.monotonic()
            time.sleep(max(0.0, begin + after - time.monotonic()))
            if not running.running():
                return False
            if not victims:
                running.signal(signal.SIGKILL)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            self.end(running, result)
            result.to_end = time.monotonic() - began
        assert_that(result.to_end <= END_S, f"the job ended only {result.to_end:.1f} s after the kill")
        return result.exit_code != 0

    def action(self, action: str, name: str, round_: int, rank: int) -> None:
        rank = rank % self.ranks
        with self.case(f"action {action} {name}:{round_}:{rank}") as (result, folder):
            overrides = [f"round_timeout={HANG_S}"] if action == "hang" else []
            with self.launch(self.ranks, folder, *overrides, failpoint=f"{name}:{round_}:{rank}:{action}") as running:
                finished = self.end(running, result)
            if action == "exit":
                assert_that(finished.returncode != 0, "mpirun returned 0")
            else:
                _check_said_once(finished, action, rank)
            self.check_checkpoint(folder, result, _rounds_to_expect(name, round_, rank))
            self.go_on(folder, result)


def _check_said_once(finished: Finished, action: str, rank: int) -> None:
    """The exit code of an abort, and the cause is printed once, with the rank."""
    text = finished.stderr
    assert_that(finished.returncode in ABORT_CODES, f"exit code {finished.returncode}")
    cause = {"raise": f"an error on rank {rank} ends the job", "hang": f"rank {rank} came to no exchange"}[action]
    assert_that(text.count(cause) == 1, f"'{cause}' stands {text.count(cause)} times in {finished}")
    trace = {"raise": "Traceback (most recent call last)", "hang": "failpoints.py"}[action]
    assert_that(text.count(trace) == 1, f"'{trace}' stands {text.count(trace)} times in {finished}")


def assert_that(condition: bool, otherwise: str) -> None:
    """Unlike `assert`, with optimisation too."""
    if not condition:
        raise AssertionError(otherwise)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _armed(points: list[tuple[str, int, int]]) -> str:
    return ",".join(f"{name}:{round_}:{rank}" for name, round_, rank in points)


def _rounds_to_expect(name: str, round_: int, rank: int) -> set[int]:
    """Rounds whose checkpoint may be the newest after a death at this point (every round is saved)."""
    if name in COMMITTED or (name == "checkpoint.manifest_written" and rank != 0):
        return {round_}  # the other ranks pass these points when they hear that the rename is done
    if name == "checkpoint.agreed" and rank != 0:
        return {round_ - 1, round_}  # rank 0 goes on by itself
    return {round_ - 1}


def _reached(name: str, rank: int) -> bool:
    """With several ranks the first trains no client, and the server's step is its alone."""
    return rank != 0 if name.startswith("client.") else rank == 0 if name.startswith("server.") else True


def cases(sweep: Sweep, sample: bool, random: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every case of the sweep by name; of the sample, each fail-point once, at another rank and round each time."""
    rounds, ranks = (1, (ROUNDS + 1) // 2, ROUNDS), (0, 1, sweep.ranks - 1)
    names = [name for name in failpoints.NAMES if name not in RESUMING]
    points = [(name, round_, rank) for name in names for round_ in rounds for rank in dict.fromkeys(ranks)]
    yield "unreached", lambda: sweep.unreached([point for point in points if not _reached(point[0], point[2])])
    points = [point for point in points if _reached(point[0], point[2])]
    resumes = [(name, round_, rank) for name in RESUMING for round_ in rounds for rank in dict.fromkeys(ranks)]
    actions = list(ACTIONS)
    if sample:
        by_name = [[point for point in points if point[0] == name] for name in names]
        points = [group[5 * number % len(group)] for number, group in enumerate(by_name)]
        resumes, actions = resumes[1::11], actions[1::5]
    for point in points:
        yield f"point {_armed([point])}", lambda point=point: sweep.point(*point)  # type: ignore[misc]
    for point in resumes:
        yield f"resume {_armed([point])}", lambda point=point: sweep.resume(*point)  # type: ignore[misc]
    for number in range(random):
        yield f"random {number}", lambda number=number: sweep.random(number)  # type: ignore[misc]
    for item in actions:
        yield f"action {item[0]} {item[1]}:{item[2]}", lambda item=item: sweep.action(*item)  # type: ignore[misc]


def table(results: list[Result]) -> str:
    """Part by part: cases, how many ended in time, how many equal the undisturbed run, seconds from kill to end."""
    lines = ["part          cases  ended  equal  to the end: median / most"]
    for part in [*dict.fromkeys(result.part for result in results), "all"]:
        chosen = [result for result in results if part in (result.part, "all")]
        times = [result.to_end for result in chosen if result.to_end is not None]
        seconds = f"{statistics.median(times):.2f} s / {max(times):.2f} s" if times else "-"
        ended, equal = sum(r.ended for r in chosen), sum(r.equal for r in chosen)
        lines.append(f"{part:<12s} {len(chosen):>6d} {ended:>6d} {equal:>6d}  {seconds}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="each fail-point once, and 10 random kills")
    parser.add_argument("--random", type=int, help="number of random kills (100; 10 of the sample)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of the random kills")
    parser.add_argument("--ranks", type=int, default=3, help="at least 2")
    parser.add_argument("--case", default="", metavar="TEXT", help="only the cases whose name begins with TEXT")
    parser.add_argument("--json", type=Path, default=Path("kills.json"), help="where the results are written")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks: at least 2, or there is nobody left to notice")
    random = arguments.random if arguments.random is not None else 10 if arguments.sample else 100
    print(f"seed {arguments.seed}, {arguments.ranks} ranks", flush=True)

    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mpifed-kills-"))
    sweep = Sweep(folder, arguments.ranks, arguments.seed)
    sweep.prepare()
    print(
        f"undisturbed: {sweep.starting_s:.1f} s to the run folder, {sweep.training_s:.1f} s from there to its summary"
    )
    for name, run in cases(sweep, arguments.sample, random):
        if name.startswith(arguments.case):
            run()

    return conclude(sweep, sweep.results, table(sweep.results), started, arguments.json)


def conclude(sweep: Sweep, results: Sequence[Result], shown: str, started: float, file: Path) -> int:
    """Print the table, write all cases into the file, and, where none missed, remove their folders; the exit code."""
    minutes = (time.monotonic() - started) / 60
    print(f"\n{shown}\nseed {sweep.seed}, {sweep.ranks} ranks, {minutes:.1f} minutes")
    misses = [result for result in results if not result.equal]
    about = {
        "seed": sweep.seed,
        "ranks": sweep.ranks,
        "minutes": round(minutes, 1),
        "cores": os.cpu_count(),
        "machine": platform.platform(),
        "software": software_versions(),
        "misses": [result.case for result in misses],
        "cases": [asdict(result) for result in results],
    }
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if misses or not results:
        print(f"{len(misses)} of {len(results)} cases missed; the folders are under {sweep.folder}")
        return 1
    shutil.rmtree(sweep.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
