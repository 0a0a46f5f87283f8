"""What rank 0 shows and writes while a run goes on, and when it ends."""

from __future__ import annotations

import sys
from typing import Any

from mpifed.engine import Engine
from mpifed.output import say
from mpifed.progress import Progress, closing_lines
from mpifed.storage.record import PartitionRecord, software_versions, write_record
from mpifed.storage.run_folder import RunFolder
from mpifed.storage.summary import summarise


class Journal:
    """The progress of a run on standard output, and its files in the run folder; at rank 0 alone."""

    def __init__(self, engine: Engine, folder: RunFolder, started: str, heading: bool = True) -> None:
        self._engine = engine
        self._federation = engine.federation
        self._folder = folder
        self._started = started
        rows = [row for row in engine.records.rows if "open" not in row]
        folder.truncate_metrics(rows)
        if heading:
            self._print_heading()
        self._progress = Progress(self._federation.job.rounds, sys.stdout, start_round=engine.round, earlier_rows=rows)
        engine.row_done = self._row_done

    def _print_heading(self) -> None:
        job, comm, roster = self._federation.job, self._federation.comm, self._federation.roster
        nodes = len(set(self._federation.hosts))
        lines = [
            f"{job.algorithm.name} on {job.data.name}: {roster.clients} clients, "
            f"{comm.size} rank{'s' * (comm.size > 1)} on {nodes} node{'s' * (nodes > 1)}, {job.rounds} rounds, "
            f"{job.model.name} with {self._federation.env.model().layout.size:,} parameters"
        ]
        idle = len(roster.hosts) - roster.clients
        if idle > 0:
            lines.append(
                f"mpifed: {idle} of {comm.size} ranks have no client to train; use fewer ranks or more clients"
            )
        turns = self._engine.turns
        if turns.tokens:
            lines.append(
                f"mpifed: {turns.training} ranks train in {turns.tokens} turn{'s' * (turns.tokens > 1)} on a node, "
                "as many as it has cores for (turns)"
            )
        if not self._federation.env.shared_buffers and self._federation.env.model().buffer_layout.size:
            lines.append(
                'mpifed: model.buffers = "local": the model is tested with its initial running statistics; see "both"'
            )
        if self._engine.round:
            lines.append(f"resumed after round {self._engine.round} of {job.rounds}")
        say("\n".join(lines) + "\n", sys.stdout)

    def _row_done(self, row: dict[str, Any]) -> None:
        self._folder.append_metrics(row)
        self._progress.round(row)

    def close(self, finished: bool) -> None:
        """Write `run.h5` and `summary.json`, and say how it went."""
        self._progress.close()
        federation, records, job = self._federation, self._engine.records, self._federation.job
        rows = [row for row in records.rows if "open" not in row]
        partition = PartitionRecord(
            federation.partition.train, federation.histogram, federation.partition.sha256, federation.partition.test
        )
        provenance = software_versions() | {
            "mpi_library": federation.comm.library(),
            "wire": ": ".join(filter(None, (self._engine.wire.name, self._engine.wire.reason))),
            "ranks": federation.comm.size,
            "hosts": federation.hosts,
            "collectives": job.collectives,
            "device": str(federation.env.device),
            "threads": job.threads,
            "argv": sys.argv,
            "started": self._started,
            "job_sha256": job.sha256,
            "seed": job.seed,
        }
        write_record(
            self._folder.record,
            rows,
            records.ledger.columns(),
            partition,
            provenance,
            records.rank_times,
            records.wire.columns(),
            records.wire.flow_columns(),
        )
        summary = summarise(
            algorithm=job.algorithm.name,
            model=job.model.name,
            data=job.data.name,
            partition_sha256=federation.partition.sha256,
            clients=federation.clients,
            ranks=federation.comm.size,
            seed=job.seed,
            job_sha256=job.sha256,
            parameters=federation.env.model().layout.size,
            metrics_rows=rows,
            bytes_by_kind=records.ledger.by_kind(),
            resumed=records.resumed,
            deaths=records.deaths,
            complete=finished,
        )
        self._folder.write_summary(summary)
        say(closing_lines(summary, self._folder.path) + "\n", sys.stdout)
