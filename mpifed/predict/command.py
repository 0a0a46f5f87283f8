"""`python -m mpifed predict [JOB.toml] [key=value ...] --ranks N [--nodes M]`: what a run will cost, before it runs."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpifed.errors import COMPLETE, BadInput
from mpifed.output import say

if TYPE_CHECKING:
    from mpifed.job import Job
    from mpifed.predict.compute import Compute
    from mpifed.predict.measured import Probe
    from mpifed.predict.prediction import Prediction
    from mpifed.predict.timeline import Network

SAME_WORK = ("algorithm", "model", "client_models", "local", "codec", "transfer", "device", "threads")
"""Keys that two jobs have to share for a client's work to take as long in both; and the data, but for who has it."""


def main(argv: Sequence[str]) -> int:
    """Print the prediction; the exit code. Raises `BadInput` where the job or an option cannot be used."""
    arguments = _arguments(argv)
    logging.basicConfig(format="mpifed %(message)s", level=logging.WARNING, stream=sys.stderr)
    from mpifed.federation.federation import Federation
    from mpifed.memory import keep_freed_memory
    from mpifed.predict.measured import Probe
    from mpifed.predict.prediction import predict
    from mpifed.predict.probe import cores as usable_cores
    from mpifed.predict.timeline import Cores
    from mpifed.predict.trial import resident
    from mpifed.run import read_job

    keep_freed_memory()  # as a run does
    job = read_job(arguments.job)
    places = hosts(arguments.ranks, arguments.nodes)
    probe = Probe.read(arguments.probe) if arguments.probe else None
    network = network_of(arguments.bandwidth, arguments.latency, probe, arguments.nodes)
    process = resident()
    federation = Federation.planned(job, places)
    compute = None if arguments.bytes or network is None else compute_of(job, probe, arguments.seconds)
    contention = 1.0 if probe is None else probe.contention
    count = arguments.cores or (usable_cores() if probe is None else probe.cores)
    cores = Cores(places, max(1, count // job.threads), contention, turns=job.turns != "off")
    prediction = predict(federation, compute, network, cores, process)
    say(prediction.to_json() if arguments.json else prediction.text(), sys.stdout)
    if arguments.save:
        _save(arguments.save, job, prediction)
    return COMPLETE


def _save(path: str, job: Job, prediction: Prediction) -> None:
    """Into a run's folder. Raises BadInput where it is that of another job."""
    from mpifed.job import load
    from mpifed.storage.run_folder import RunFolder

    folder = RunFolder.open(path)
    ran = load(folder.job.read_text(encoding="utf-8"), [], str(folder.job))
    if (ran.sha256, ran.rounds) != (job.sha256, job.rounds):
        raise BadInput(f"--save: {path} is a run of another job; predict {folder.job}")
    folder.write_prediction(prediction.values())


def hosts(ranks: int, nodes: int) -> list[str]:
    """By rank, the node: in blocks, the first nodes with one more where they do not divide evenly."""
    if nodes > ranks:
        raise BadInput(f"--nodes: {nodes} nodes for {ranks} ranks; a node has a rank at least")
    return [f"node{rank * nodes // ranks + 1}" for rank in range(ranks)]


def network_of(rate: str, delay: str, probe: Probe | None, nodes: int) -> Network | None:
    """Collectives by the textbook with this network, or as measured; None where several nodes have neither."""
    from mpifed.predict.cost import Link, Textbook
    from mpifed.predict.units import bandwidth, seconds

    if rate:
        return Textbook(Link(seconds(delay or "50us"), 1 / bandwidth(rate)))
    if delay:
        raise BadInput(f"--latency: {delay} without --bandwidth; give both")
    measured = None if probe is None else probe.network
    if nodes == 1 and measured is None:
        return Textbook(Link(0.0, 0.0))
    if measured is not None and nodes > 1 and measured.places.nodes == 1:
        raise BadInput("--probe: measured on one node, it says nothing of a network; give --bandwidth as well")
    return measured


def compute_of(job: Job, probe: Probe | None, seconds: float) -> Compute:
    """What the probe measured, where it was of the same work; else a trial here, in the probe's machine's time."""
    from mpifed.predict.probe import reference
    from mpifed.predict.trial import try_out

    if probe is not None and work_key(job.canonical()) == work_key(probe.job):
        return probe.compute
    measured = try_out(job, seconds)
    if probe is None or socket.gethostname() in probe.hosts:
        return measured
    return measured.times(probe.reference / reference())


def work_key(canonical: str) -> str:
    """What decides a job's work in one client's round."""
    job = json.loads(canonical)
    data = {key: value for key, value in job["data"].items() if key != "partition"}
    return json.dumps([{key: job.get(key) for key in SAME_WORK}, data], sort_keys=True)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mpifed predict", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("job", nargs="*", metavar="JOB.toml | key=value", help="a job file, then overrides")
    parser.add_argument("--ranks", type=_positive, default=1, metavar="N", help="MPI ranks, the server's too")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="M", help="on which they are, in equal blocks")
    parser.add_argument("--bandwidth", default="", help="of a node's link, such as 10Gbit")
    parser.add_argument("--latency", default="", help="of a message between nodes, such as 20us (default 50us)")
    parser.add_argument("--probe", default="", metavar="FILE", help="what mpifed probe measured")
    parser.add_argument("--cores", type=_positive, metavar="C", help="of a node (default: the probe's, or these)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of a trial of the job's work here")
    parser.add_argument("--bytes", action="store_true", help="leave out seconds, for which the job is tried out")
    parser.add_argument("--save", default="", metavar="RUN", help="write it into a run folder, for mpifed report")
    parser.add_argument("--json", action="store_true", help="print numbers (bytes, seconds) as JSON")
    return parser.parse_intermixed_args(list(argv))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
