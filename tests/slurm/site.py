"""A user's folder on the cluster: jobs are submitted as docs/slurm.md says, interrupted, and looked at afterwards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from mpifed.storage.run_folder import RunFolder
from tests.faults.outcome import Outcome, differences
from tests.launch import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.paced import PACE

JOB = Path(__file__).parent / "job.toml"
START_S = 120.0
"""Seconds within which a start computes its first rounds; a few on an idle machine."""
NODES = ("--ntasks=3", "--nodes=3", "--exclude=n4")


@dataclass
class Submitted:
    """A job that was submitted; its rounds take `pace` seconds more than they need."""

    cluster: Cluster
    number: int
    run: Path
    output: Path
    pace_file: Path
    task: str = ""
    restarts: int = 0

    @property
    def id(self) -> str:
        """As `squeue` names it: `12`, or `12_0` for a task of an array."""
        return f"{self.number}{self.task}"

    def pace(self, seconds: float) -> None:
        """Let rounds take so much longer from now on."""
        draft = self.pace_file.with_suffix(".new")
        draft.write_text(str(seconds))
        draft.replace(self.pace_file)

    def rounds(self) -> int:
        """Rounds that the run has written down."""
        metrics = RunFolder(self.run).metrics
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def until_round(self, round_: int, seconds: float = START_S) -> None:
        """Wait until the run has done so many rounds."""
        deadline = time.monotonic() + seconds
        while self.rounds() < round_:
            fields = self.cluster.job(self.id)
            alive = fields["JobState"] in ("PENDING", "CONFIGURING", "RUNNING") and time.monotonic() < deadline
            assert alive, f"{self.rounds()} rounds: {fields}\n{self.text()}\n{self.cluster.logs()}"
            time.sleep(0.1)

    def until_said(self, text: str, seconds: float = START_S) -> None:
        """Wait until the job has printed that."""
        deadline = time.monotonic() + seconds
        while text not in self.text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert text in self.text(), f"{self.text()}\n{self.cluster.logs()}"

    def text(self) -> str:
        """What the job has printed, over all its starts."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait(self, state: str, seconds: float = START_S) -> dict[str, str]:
        """The job's fields once it is in that state."""
        return self.cluster.wait(self.id, {state}, seconds, self.output)

    def go_on(self, pace: float = 0.0) -> None:
        """Let the job start again at once, or as soon as it has been requeued."""
        self.pace(pace)
        self.restarts += 1
        self.cluster.start_again(self.id, self.restarts, START_S)

    def check_equal(self, undisturbed: Outcome, starts: int = 2) -> None:
        """The job completes; its run equals the undisturbed one bit for bit, and took that many starts."""
        fields = self.wait("COMPLETED")
        assert fields["Restarts"] == str(starts - 1), f"{fields}\n{self.text()}"
        outcome = Outcome.read(self.run)
        assert differences(undisturbed, outcome) == [], self.text()
        assert outcome.summary["resumed"] == starts - 1, self.text()
        assert [line for line in self.text().splitlines() if ", start " in line][-1].find(f"start {starts}:") > 0


@dataclass
class Site:
    """`folder` holds `slurm/`, and the runs under `runs/`."""

    cluster: Cluster
    folder: Path
    undisturbed: Outcome
    jobs: list[Submitted] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "slurm").symlink_to(ROOT / "slurm")

    def sbatch(
        self, script: str, *arguments: str, options: tuple[str, ...] = NODES, pace: float = 0.0, **variables: str
    ) -> Submitted:
        """`sbatch OPTIONS slurm/SCRIPT JOB ARGUMENTS`, in the job's usual places."""
        pace_file = self.folder / f"pace{len(self.jobs)}"
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", PACE: str(pace_file)} | variables
        pace_file.write_text(str(pace))
        number = self.cluster.sbatch(
            Path("slurm") / script, *(arguments or (str(JOB),)), cwd=self.folder, options=options, env=environment
        )
        run, output = self.folder / f"runs/slurm-{number}", self.folder / f"mpifed-{number}.out"
        self.jobs.append(Submitted(self.cluster, number, run, output, pace_file))
        return self.jobs[-1]

    def task(self, array: Submitted, number: int, run: Path) -> Submitted:
        """One task of an array that was submitted, whose run is in the folder `run`."""
        output = self.folder / f"mpifed-{array.number}_{number}.out"
        return Submitted(self.cluster, array.number, self.folder / run, output, array.pace_file, f"_{number}")

    def script(self, line: str) -> Path:
        """A batch script of that one line."""
        script = self.folder / "line.sbatch"
        script.write_text(f"#!/bin/bash\n#SBATCH --output=line-%j.out\n{line}\n")
        return script
