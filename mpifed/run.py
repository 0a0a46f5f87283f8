"""`python -m mpifed.run [JOB.toml] [key=value ...] [--resume RUN] [--dry-run]`, alone or under mpirun or srun.

Without a job file: the built-in default, which needs no download. Exit codes: `mpifed.errors`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpifed.comm.communicator import Communicator, RanksDied
from mpifed.comm.mpi import world
from mpifed.comm.wire import mpi_t
from mpifed.errors import COMPLETE, REQUEUE, BadInput, CheckpointError, MpifedError
from mpifed.guard import Deadline, StopSignal, Watchdog, guarded
from mpifed.memory import keep_freed_memory
from mpifed.output import say

if TYPE_CHECKING:
    from mpifed.federation.federation import Federation
    from mpifed.federation.turns import Turns
    from mpifed.job import Job
    from mpifed.storage.checkpoint import Checkpoints, Found
    from mpifed.storage.run_folder import RunFolder
    from mpifed.survival import Survival


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job on this rank; the exit code."""
    started = time.time()
    stop = StopSignal()
    stop.install()  # before MPI and the imports, which take seconds
    keep_freed_memory()
    if _wants_mpi_to_count(sys.argv[1:] if argv is None else argv):
        mpi_t.enable()
    try:
        comm = world()
    except MpifedError as error:
        print(f"mpifed: {error}", file=sys.stderr)
        return error.exit_code
    return comm.leave(guarded(comm, lambda: _main(list(sys.argv[1:] if argv is None else argv), comm, started, stop)))


def _main(argv: list[str], comm: Communicator, started: float, stop: StopSignal) -> int:
    arguments = _arguments(argv, comm)
    logging.basicConfig(format=f"mpifed [rank {comm.rank}] %(message)s", level=logging.INFO, stream=sys.stderr)
    job, resumed = _job(arguments, comm)

    from mpifed import survival
    from mpifed.federation.federation import Federation

    survival.check(job, comm)
    if arguments.dry_run:
        federation = Federation.build(job, comm)
        if comm.rank == 0:
            from mpifed.federation.plan import describe

            say(job.to_toml() + describe(federation) + "\n", sys.stdout)
        return COMPLETE
    deadline = Deadline.of(started, job.time_limit, os.environ)
    return _train(Federation.build(job, comm), resumed, arguments.resume is not None, stop, deadline)


def _wants_mpi_to_count(argv: Sequence[str]) -> bool:
    """Whether the job says so, as far as it can be seen before MPI starts, and with it the agreement on the job.

    Where a rank cannot read the file, `OMPI_MCA_pml_monitoring_enable` in the environment is needed.
    """
    import tomllib

    said = [word.partition("=")[2].strip("'\"") for word in argv if word.startswith("measure_wire=")]
    if said:
        return said[-1] == "mpi_t"
    resumed = [Path(folder) / "job.toml" for word, folder in itertools.pairwise(argv) if word == "--resume"]
    for path in [*resumed, *(Path(word) for word in argv if word.endswith(".toml"))]:
        try:
            if tomllib.loads(path.read_text(encoding="utf-8")).get("measure_wire") == "mpi_t":
                return True
        except (OSError, ValueError):  # which is said where the job is read
            continue
    return False


def argument_parser() -> argparse.ArgumentParser:
    """Of the command line: `job` (a file and overrides), `resume`, `dry_run`."""
    parser = argparse.ArgumentParser(prog="python -m mpifed.run", description=__doc__.split("\n")[0])
    parser.add_argument("job", nargs="*", metavar="JOB.toml | key=value", help="a job file, then overrides")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, from its newest checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job, who is hosted where, the bytes; and exit"
    )
    return parser


def _arguments(argv: list[str], comm: Communicator) -> argparse.Namespace:
    said: dict[str, Any] = {}
    if comm.rank == 0:
        try:
            said = vars(argument_parser().parse_intermixed_args(argv))
        except SystemExit as leaving:
            said = {"leave": leaving.code}
    said = comm.broadcast_json(said)
    if "leave" in said:
        raise _Leave(said["leave"])
    return argparse.Namespace(**said)


class _Leave(MpifedError):
    """Every rank leaves with this code; argparse has said all there is to say."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.exit_code = code


# --- the job, the same on every rank ----------------------------------------------------------------------------------
def _job(arguments: argparse.Namespace, comm: Communicator) -> tuple[Job, RunFolder | None]:
    """Rank 0 reads and validates; the others get the canonical text. With the run folder, where one is resumed."""
    from mpifed.job import Job

    said: dict[str, Any] = {}
    folder: RunFolder | None = None
    if comm.rank == 0:
        try:
            job, folder = job_and_folder(arguments.job, arguments.resume)
            said = {"job": job.canonical()}
        except BadInput as error:
            said = {"problem": str(error)}
    said = comm.broadcast_json(said)
    if "problem" in said:
        raise BadInput(said["problem"])
    return Job.from_canonical(said["job"]), folder


def job_and_folder(words: Sequence[str], resume: str | None) -> tuple[Job, RunFolder | None]:
    """The job of a command line, `words` being a file and overrides; with the run folder, where one is resumed.

    Raises BadInput.
    """
    from mpifed.job import check_resume, load
    from mpifed.storage.run_folder import RunFolder

    files, overrides = _sorted_out(words)
    if resume is not None:
        if not resume:
            raise BadInput("--resume: names no folder; give the folder of a run")
        if files:
            raise BadInput(f"--resume: the job is the one in {resume}; leave out {files[0]}")
        folder = RunFolder.open(resume)
        text = _text(folder.job)
        old, job = load(text, [], str(folder.job)), load(text, overrides, str(folder.job))
        check_resume(old, job)
        if job.out != old.out:
            raise BadInput("out: a resumed run stays in its folder; leave it out")
        return job, folder
    return read_job(words), None


def read_job(words: Sequence[str]) -> Job:
    """The job of a file, or the default one, with the overrides `key=value` among these words. Raises BadInput."""
    from mpifed.job import load
    from mpifed.sweep.plan import is_sweep

    files, overrides = _sorted_out(words)
    if len(files) > 1:
        raise BadInput(f"one job file at a time, not {' and '.join(files)}")
    if files and is_sweep(files[0]):
        raise BadInput(f"{files[0]} is a sweep, of many jobs: python -m mpifed sweep {files[0]}")
    if not files:
        return load(None, overrides, "the default job")
    return load(_text(Path(files[0])), overrides, files[0])


def _sorted_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Job files, and overrides."""
    return [word for word in words if _is_file(word)], [word for word in words if not _is_file(word)]


def _is_file(word: str) -> bool:
    """A job file, though its path may hold a `=` as overrides do."""
    return "=" not in word or (word.endswith(".toml") and Path(word).is_file())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInput(f"the job file {path} cannot be read: {reason}") from None


# --- training ---------------------------------------------------------------------------------------------------------
def _train(
    federation: Federation, resumed: RunFolder | None, resume: bool, stop: StopSignal, deadline: Deadline
) -> int:
    from mpifed.federation.agreement import on_every_rank
    from mpifed.federation.federation import Federation
    from mpifed.storage.checkpoint import Checkpoints
    from mpifed.survival import Survival

    job, comm = federation.job, federation.comm
    watchdog = Watchdog(comm, job.round_timeout)
    comm.waiting = watchdog.waiting
    watchdog.start()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    here: Federation | None = federation
    del federation
    own = [] if resumed is None else [resumed]
    survival = Survival(comm)
    while True:
        try:
            here = here or Federation.build(job, comm)
            folder = _folder(here, own)
            checkpoints = Checkpoints(folder.checkpoints, job.checkpoint.keep, comm, job.resume_sha256)
            found = _newest(checkpoints, job) if resume or survival.lost else None
            if resume and found is None and comm.rank == 0:
                say(f"mpifed: {folder.path} has no checkpoint yet; the run starts again at round 1\n", sys.stderr)
            on_every_rank(comm, lambda: None if resumed is None else _renew(resumed, job))
            finished = _start(here, folder, found, checkpoints, stop, deadline, survival, started)
            break
        except RanksDied:
            if job.on_rank_death == "abort":
                raise
        here = None  # and all else that was made for the ranks of before
        survival.regroup()
    watchdog.stop()
    return COMPLETE if finished else REQUEUE


def _newest(checkpoints: Checkpoints, job: Job) -> Found | None:
    """The checkpoint to go on from. Raises where those that are there cannot be used."""
    found = checkpoints.newest()
    if found is None and checkpoints.skipped:
        raise CheckpointError(
            f"--resume: none of the {len(checkpoints.skipped)} checkpoints in {checkpoints.folder} can be used "
            "(the lines above say why); start a new run with out=..."
        )
    if found is not None and found.round > job.rounds:
        raise BadInput(f"rounds: {found.round} rounds of this run are done, but the job says {job.rounds}")
    return found


def _start(
    federation: Federation,
    folder: RunFolder,
    found: Found | None,
    checkpoints: Checkpoints,
    stop: StopSignal,
    deadline: Deadline,
    survival: Survival,
    started: str,
) -> bool:
    """From a checkpoint, or from nothing, to the last round (True) or to a signal; raises RanksDied on all that live.

    Nothing that is made here outlives it, so that after a death everything is made for the ranks that are left.
    """
    from mpifed.engine import Engine
    from mpifed.federation.store import ClientStore
    from mpifed.journal import Journal

    job, comm = federation.job, federation.comm
    again = bool(survival.lost)
    store = ClientStore(job.client_state_mb * 1_000_000, folder.scratch / f"rank_{comm.rank:04d}")
    with closing(store), closing(_turns(federation)) as turns:
        engine = Engine(federation, checkpoints, store, stop, turns, deadline)
        if found is None:
            engine.begin()
        else:
            engine.restore(found)
        survival.go_on(engine)
        journal = Journal(engine, folder, started, heading=not again) if comm.rank == 0 else None
        finished = engine.run()
        if journal is not None:
            journal.close(finished)
    comm.finish()  # polled, where the other ranks' MPI_Finalize would burn their cores while rank 0 finishes
    return finished


def _turns(federation: Federation) -> Turns:
    """Who waits for whom on a node with more training ranks than cores."""
    from mpifed.federation.turns import Turns

    job, roster = federation.job, federation.roster
    if job.turns == "off":
        return Turns.none(federation.comm)

    def cost(client: int) -> float:
        return roster.examples[client] if job.local.steps is None else job.local.steps

    on_cores = federation.env.device.type == "cpu"
    return Turns.agree(federation.comm, federation.hosts, roster.hosts, on_cores, job.threads, cost)


def _folder(federation: Federation, own: list[RunFolder]) -> RunFolder:
    """The run folder: rank 0's `own`, or a new one made by it now that nothing else can be wrong with the job."""
    from mpifed.federation.agreement import on_every_rank
    from mpifed.storage.run_folder import RunFolder

    job, comm = federation.job, federation.comm

    def make() -> RunFolder | None:
        if comm.rank != 0:
            return None
        if not own:
            path = Path(job.out).expanduser() if job.out else Path(new_folder(job))
            own.append(RunFolder.create(path, job.to_toml()))
        own[0].occupy()
        return own[0]

    made = on_every_rank(comm, make)
    return RunFolder(comm.broadcast_json(str(made.path.absolute()) if made is not None else None))


def _renew(resumed: RunFolder, job: Job) -> None:
    """Write the job of a resumed run anew: `rounds`, and what is not part of the results, may have changed."""
    from mpifed.storage.run_folder import replacing

    try:
        with replacing(resumed.job) as draft:
            draft.write_text(job.to_toml(), encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"--resume: {resumed.job} cannot be written ({error.strerror}); make the run folder writable"
        ) from error


def new_folder(job: Job) -> str:
    """A run folder under `runs/` that does not exist, for a job that names none."""
    stem = f"runs/{job.algorithm.name}-{job.data.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}".replace(":", ".")
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


if __name__ == "__main__":
    sys.exit(main())
