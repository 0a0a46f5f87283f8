"""Every algorithm on 1, 2, 3, 4, 7 and 11 ranks: are the results the same bit for bit?

usage:  python -m benchmarks.equality [--ranks 1 2 3 4 7 11] [--only NAME ...]

Jobs: every row of `tests/algorithm_table.py` (a model with batch normalisation, five clients of which three take part),
and variations: running statistics shared and local, codecs, other ways of sampling, other models, client states
on disk. Compared with the first number of ranks, of every job:

- `ordered`: weights, client states, metrics without seconds, and logical bytes: the same bit for bit, or what differs;
- `resumed`: the same for a run that three ranks stopped after round 2 and that number of ranks went on with;
- `tree`: relative distance of weights and client states from the ordered ones (norm); required: below 1e-6.

Exit code 0 if all is as required. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.mpi.equality import Runs, cases, differences, distance, tolerance

RANKS = (1, 2, 3, 4, 7, 11)


def table(runs: Runs) -> tuple[list[str], bool]:
    """A line for each job, in Markdown, and whether everything is as required."""
    columns = [
        *(f"ordered, {ranks}" for ranks in runs.ordered[1:]),
        *(f"resumed, {ranks}" for ranks in runs.resumed),
        *(f"tree, {ranks}" for ranks in runs.tree),
    ]
    lines = [f"| job | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    fine = True
    for name in runs.jobs:
        reference = runs.reference(name)
        found = [differences(reference, runs.outcome("ordered", ranks, name)) for ranks in runs.ordered[1:]]
        found += [differences(reference, runs.outcome("resumed", ranks, name)) for ranks in runs.resumed]
        away = [distance(reference, runs.outcome("tree", ranks, name)) for ranks in runs.tree]
        fine = fine and not any(found) and max(away, default=0.0) < tolerance(name)
        cells = [", ".join(different) or "same" for different in found] + [f"{far:.1e}" for far in away]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines, fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--only", nargs="+", default=list(cases()), choices=list(cases()), metavar="NAME")
    arguments = parser.parse_args()
    jobs = {name: job for name, job in cases().items() if name in arguments.only}
    with tempfile.TemporaryDirectory(prefix="mpifed-equality-") as folder:
        runs = Runs(Path(folder), jobs, arguments.ranks, arguments.ranks, arguments.ranks)
        runs.train(lambda line: print(line, file=sys.stderr, flush=True))
        lines, fine = table(runs)
    print("\n".join(lines))
    print(f"\n{len(jobs)} jobs on {', '.join(map(str, arguments.ranks))} ranks: {'as' if fine else 'NOT as'} required")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
