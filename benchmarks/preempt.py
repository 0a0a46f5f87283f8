"""Interrupt one Slurm run at random moments, again and again, and demand that it ends as an undisturbed one does.

usage:  python benchmarks/preempt.py [--kills 20] [--seed S] [--rounds 200] [--json preempt.json]

A Slurm is brought up on this machine (`tests/slurm/cluster.py`; root, Debian's packages), and
`slurm/cpu.sbatch` is submitted on three ranks, one a node. After every start it is interrupted at a moment drawn
evenly from its start-up and first seconds of training, in a way drawn as well:

  signal    USR1 to the batch script, as Slurm sends before a time limit or a preemption; the script asks for a requeue
  requeue   `scontrol requeue`: TERM, and KILL fifteen seconds later
  node      a node, also the one of the batch script, is set down; Slurm requeues the job

Required: one requeue for each; and at the end server state, every client's state, metrics and ledger equal those of a
run without Slurm that nobody disturbed, bit for bit. Kinds and moments depend on the seed. Exit code 1 for a miss.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from signal import SIGUSR1  # noqa: E402

from mpifed.rng import numpy_generator  # noqa: E402
from tests.faults.outcome import Outcome, differences  # noqa: E402
from tests.launch import run_module  # noqa: E402
from tests.slurm.cluster import Cluster, SlurmUnavailable  # noqa: E402
from tests.slurm.site import JOB, START_S, Site, Submitted  # noqa: E402

KINDS = ("signal", "requeue", "node")
TRAINING_S = 6.0
"""The last moment of an interruption, in seconds after the start-up."""


def interrupt(cluster: Cluster, job: Submitted, kind: str, node: str) -> None:
    """Interrupt the job, and leave the nodes as they were once it is off them."""
    if kind == "signal":
        cluster.signal(job.id, SIGUSR1)
    elif kind == "requeue":
        cluster.scontrol("requeue", job.id)
    else:
        cluster.fail_node(node)
        job.wait("PENDING")
        cluster.repair_node(node)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the run")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--json", type=Path, help="write what was done and how it ended")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    random, rounds = numpy_generator(arguments.seed, "preempt"), f"rounds={arguments.rounds}"

    with (
        tempfile.TemporaryDirectory(prefix="mpifed-slurm-") as folder,
        Cluster(Path(folder) / "cluster", nodes=4) as cluster,
    ):
        started = time.monotonic()
        undisturbed = Path(folder) / "undisturbed"
        run_module(3, "mpifed.run", JOB, f"out={undisturbed}", rounds, timeout=300)
        expected = Outcome.read(undisturbed)
        start_up = time.monotonic() - started - expected.summary["seconds"]["total"]
        print(f"undisturbed: {arguments.rounds} rounds, start-up {start_up:.1f} s", flush=True)

        # so slow that the run is not over before the last interruption
        pace = max(0.5, arguments.kills * (start_up + TRAINING_S) / arguments.rounds)
        (Path(folder) / "site").mkdir()
        job = Site(cluster, Path(folder) / "site", expected).sbatch("cpu.sbatch", str(JOB), rounds, pace=pace)
        cluster.wait(job.id, {"RUNNING"}, START_S)
        kills = []
        for number in range(1, arguments.kills + 1):
            kind, node = str(random.choice(KINDS)), str(random.choice(cluster.nodes[:3]))
            after = float(random.uniform(0.0, start_up + TRAINING_S))
            time.sleep(after)
            done = job.rounds()
            if done >= arguments.rounds - 1:
                print(f"the run was over before kill {number}: give it more --rounds", flush=True)
                break
            interrupt(cluster, job, kind, node)
            job.go_on(pace=pace)
            kills.append({"kind": kind, "node": node if kind == "node" else None, "after_s": after, "rounds": done})
            where = f" {node}" if kind == "node" else ""
            print(f"{number:3d}  {kind + where:<9}  {after:5.1f} s after a start, {done} rounds done", flush=True)
        job.pace(0.0)
        fields = job.wait("COMPLETED", 2 * START_S)
        wrong = differences(expected, Outcome.read(job.run))
        if int(fields["Restarts"]) != len(kills):
            wrong.append(f"{fields['Restarts']} requeues")
        asked = job.text().count("asking for a requeue")
        print(f"{'MISS: ' + ', '.join(wrong) if wrong else 'equal, bit for bit'}; {asked} requeues by the script")
        if wrong:
            print(job.text())
        if arguments.json:
            result = {"seed": arguments.seed, "rounds": arguments.rounds, "kills": kills, "differences": wrong}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SlurmUnavailable as why:
        sys.exit(f"benchmarks/preempt.py: {why}")
