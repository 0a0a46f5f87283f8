"""Jobs on a real Slurm: what interrupts them costs nothing, and the run that was interrupted is the undisturbed one.

Every test submits the project's own batch files as docs/slurm.md says, on three nodes, one rank on each; the fourth is
for the job that has to wait for the end of its time.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpifed.errors import BAD_INPUT, REQUEUE
from tests.faults.outcome import Outcome, differences
from tests.slurm.site import JOB, NODES, START_S, Site, Submitted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SLOW = 0.4  # seconds a round, so that there is time to interrupt a run of twelve


@pytest.fixture(scope="session")
def limited(site: Site) -> Submitted:
    """A job whose two minutes end before its rounds do: it computes, and mostly sleeps, beside the other
    tests, on a node of its own.

    Slurm's signal before the end, which may come a minute early, is one that nobody minds.
    """
    options = ("--ntasks=3", "--nodelist=n4", "--time=2", "--signal=B:CONT@1")
    return site.sbatch("cpu.sbatch", options=options, pace=10.0)


@pytest.fixture(autouse=True)
def no_job_is_left(site: Site, limited: Submitted) -> Iterator[None]:
    yield
    for job in site.jobs:
        if job is not limited:
            site.cluster.cancel(job.number)


def test_ranks_on_three_nodes_by_srun(site: Site) -> None:
    job = site.sbatch("nodes.sbatch", options=("--nodes=3", "--ntasks-per-node=1", "--exclude=n4"))
    fields = job.wait("COMPLETED")
    assert fields["JobName"] == "job"  # of the job's file
    assert "by srun of MPICH, pmi2" in job.text() and "3 ranks on 3 nodes" in job.text()
    job.check_equal(site.undisturbed, starts=1)


def test_a_signal_stops_a_run_by_mpirun_which_is_requeued_once(site: Site) -> None:
    """USR1 to the batch script, as before a time limit; a second one changes nothing."""
    job = site.sbatch("cpu.sbatch", options=(*NODES, "--job-name=mine"), pace=SLOW, MPIFED_LAUNCHER="mpirun")
    job.until_round(2)
    for _ in range(2):
        site.cluster.signal(job.id, signal.SIGUSR1)
    assert job.wait("PENDING")["JobName"] == "mine"
    assert job.text().count("asking for a requeue") == 1 and f"exit code {REQUEUE}" in job.text()
    job.go_on()
    job.check_equal(site.undisturbed)
    assert "by mpirun of MPICH" in job.text()


def test_whatever_interrupts_a_run_it_goes_on_and_is_the_same(site: Site) -> None:
    """By srun: a signal, `scontrol requeue`, a node that fails, a job that takes the nodes; each is one requeue."""
    job = site.sbatch("preemptible.sbatch", options=(*NODES, "--cpus-per-task=3"), pace=SLOW)
    job.until_round(1)
    site.cluster.signal(job.id, signal.SIGUSR1)
    job.go_on(SLOW)
    assert job.text().count("asking for a requeue") == 1

    job.until_round(job.rounds() + 1)
    site.cluster.scontrol("requeue", job.id)
    job.go_on(SLOW)
    assert job.text().count("asking for a requeue") == 1  # Slurm's own needs no other

    job.until_round(job.rounds() + 1)
    site.cluster.fail_node("n2")
    job.wait("PENDING")
    site.cluster.repair_node("n2")
    job.go_on(SLOW)

    job.until_round(job.rounds() + 1)
    options = ["--partition=urgent", *NODES, "--cpus-per-task=3"]
    urgent = site.cluster.sbatch(site.script("sleep 1"), cwd=site.folder, options=options)
    site.cluster.wait(urgent, {"COMPLETED"}, START_S)
    job.go_on()
    job.check_equal(site.undisturbed, starts=5)


def test_a_dead_rank_is_requeued_and_a_crash_loop_is_not(site: Site) -> None:
    """Every start dies in round 2, the first after a checkpoint, the second after none; one restart is allowed."""
    job = site.sbatch(
        "cpu.sbatch", options=NODES, MPIFED_LAUNCHER="mpirun", MPIFED_FAILPOINT="client.after:2:1", MPIFED_RESTARTS="1"
    )
    job.until_said("): asking for a requeue")
    assert "died (exit code " in job.text()
    job.go_on()
    assert job.wait("FAILED")["Restarts"] == "1"
    assert "1 restarts, and this start saved nothing new: no requeue is asked for" in job.text()


def test_a_cancelled_job_stays_cancelled(site: Site) -> None:
    """Ranks that are sent TERM leave with a checkpoint, but nobody asks for a requeue."""
    job = site.sbatch("cpu.sbatch", pace=SLOW)
    job.until_round(2)
    site.cluster.cancel(job.id)
    assert job.wait("CANCELLED")["Restarts"] == "0"
    assert "asking for a requeue" not in job.text()


def test_bad_input_is_not_requeued(site: Site) -> None:
    """Nor is a GPU found here that every rank could have one of; the sentence is in the job's output."""
    job = site.sbatch("cpu.sbatch", str(JOB), "device=cuda")
    fields = job.wait("FAILED")
    assert fields["ExitCode"] == f"{BAD_INPUT}:0" and fields["Restarts"] == "0"
    assert "mpifed: device:" in job.text() and not job.run.exists()


def test_an_array_is_a_sweep_and_each_task_is_requeued_by_itself(site: Site) -> None:
    """Two members, of which the second is stopped, and its task alone starts again.

    It is the array's last task, whose number of a job is that of the whole array.
    """
    sweep = site.folder / "two.toml"
    sweep.write_text(f'base = "{JOB}"\nout = "runs/two"\nseeds = [4, 5]\n')
    options = ("--array=0-1", *NODES)
    array = site.sbatch("array.sbatch", str(sweep), options=options, pace=SLOW)
    first, second = (site.task(array, number, Path(f"runs/two/seed{seed}")) for number, seed in enumerate((4, 5)))
    second.until_round(2)
    site.cluster.signal(second.id, signal.SIGUSR1)
    assert second.wait("PENDING")["Restarts"] == "1"
    second.go_on()
    second.wait("COMPLETED")
    assert first.wait("COMPLETED")["Restarts"] == "0"
    outcome = Outcome.read(second.run)
    assert differences(site.undisturbed, outcome) == [] and outcome.summary["resumed"] == 1
    assert Outcome.read(first.run).summary["resumed"] == 0


def test_a_job_leaves_before_its_time_is_up(site: Site, limited: Submitted) -> None:
    """By its own clock, before Slurm ends it; where the machine is slow, it has been started again by now."""
    deadline = time.monotonic() + START_S
    while "asking for a requeue" not in limited.text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "which may not be enough for another round: leaving after round" in limited.text(), limited.text()
    limited.go_on()
    starts = 1 + int(limited.wait("COMPLETED")["Restarts"])
    assert starts >= 2
    limited.check_equal(site.undisturbed, starts)
    assert "asked to leave" not in limited.text() and "DUE TO TIME LIMIT" not in limited.text()
