"""`python -m mpifed predict [JOB.toml] [key=value ...] --ranks N`: what a run will cost, before it runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from mpifed.errors import COMPLETE, BadInput
from mpifed.output import say


def main(argv: Sequence[str]) -> int:
    """Print the prediction; the exit code. Raises `BadInput` where the job or an option cannot be used."""
    arguments = _arguments(argv)
    logging.basicConfig(format="mpifed %(message)s", level=logging.INFO, stream=sys.stderr)
    from mpifed.federation.federation import Federation
    from mpifed.predict.prediction import predict
    from mpifed.run import read_job

    job = read_job(arguments.job)
    federation = Federation.planned(job, hosts(arguments.ranks, arguments.nodes))
    prediction = predict(federation)
    say(prediction.to_json() if arguments.json else prediction.text(), sys.stdout)
    return COMPLETE


def hosts(ranks: int, nodes: int) -> list[str]:
    """By rank, the node: in blocks, the first nodes with one more where they do not divide evenly."""
    if nodes > ranks:
        raise BadInput(f"--nodes: {nodes} nodes for {ranks} ranks; a node has a rank at least")
    return [f"node{rank * nodes // ranks + 1}" for rank in range(ranks)]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mpifed predict", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("job", nargs="*", metavar="JOB.toml | key=value", help="a job file, then overrides")
    parser.add_argument("--ranks", type=_positive, default=1, metavar="N", help="MPI ranks, the server's too")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="M", help="on which they are, in equal blocks")
    parser.add_argument("--json", action="store_true", help="print numbers (bytes, seconds) as JSON")
    return parser.parse_intermixed_args(list(argv))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
