"""What rank 0 shows while a run goes on: a bar on a terminal, plain lines in a log, and a closing block."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mpifed.output import say
from mpifed.storage.summary import number, total

LINE_SECONDS = 2.0
LINE_SHARE = 0.01
"""Plain lines are at least so many seconds, and this share of the time passed, apart; but for the first and last."""


def megabytes(count: int | float) -> str:
    """Bytes in units of 10^6 with three digits that count: `1,228`, `12.3`, `0.0204`."""
    return _three_digits(count / 1e6)


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:#.3g}"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage without its sign: `91.20`; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def duration(seconds: float) -> str:
    """`4.2 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Progress of a run of `rounds` rounds on `stream`.

    Args:
        rounds: rounds of the whole run.
        stream: where to print, standard error as a rule.
        interactive: a bar that is drawn over itself; by default where `stream` is a terminal.
        start_round: rounds that were done before (a resumed run); `earlier_rows` are their metrics rows, whose bytes
            and last accuracy are counted in.
    """

    def __init__(
        self,
        rounds: int,
        stream: TextIO,
        interactive: bool | None = None,
        start_round: int = 0,
        earlier_rows: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._rounds = rounds
        self._stream = stream
        self._start = start_round
        self._began = time.monotonic()
        self._printed: float | None = None
        self._accuracy: float | None = None
        self._up = self._down = 0.0
        for row in earlier_rows:
            self._count(row)
        interactive = stream.isatty() if interactive is None else interactive
        self._bar: tqdm | None = None
        if interactive:
            self._bar = tqdm(
                total=rounds,
                initial=start_round,
                file=stream,
                dynamic_ncols=True,
                bar_format="round {n_fmt}/{total_fmt} |{bar:10}| {desc}",
            )

    def round(self, row: Mapping[str, Any]) -> None:
        """Show a finished round; `row` as in `metrics.jsonl`."""
        self._count(row)
        done = int(row["round"])
        text = self._text(row, done)
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        apart = max(LINE_SECONDS, LINE_SHARE * (now - self._began))  # a night's log is still read in one go
        if self._printed is None or done >= self._rounds or now - self._printed >= apart:
            self._printed = now
            say(f"round {done:{len(str(self._rounds))}d}/{self._rounds}  {text}\n", self._stream)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.clear()
        say(f"{text}\n", self._stream)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def _count(self, row: Mapping[str, Any]) -> None:
        self._up += total([row], "bytes", "logical", "up")
        self._down += total([row], "bytes", "logical", "down")
        accuracy = number(row, "accuracy")
        self._accuracy = self._accuracy if accuracy is None else accuracy

    def _text(self, row: Mapping[str, Any], done: int) -> str:
        each = (time.monotonic() - self._began) / max(1, done - self._start)
        parts = [f"up {megabytes(self._up)} MB", f"down {megabytes(self._down)} MB", f"{_three_digits(each)} s/round"]
        if self._accuracy is not None:
            parts.insert(0, f"accuracy {percent(self._accuracy)} %")
        if row.get("absent"):
            parts.append(f"{len(row['absent'])} absent")
        if done < self._rounds:
            parts.append(f"{duration(each * (self._rounds - done))} left")
        return "  ".join(parts)


def closing_lines(summary: Mapping[str, Any], run_folder: str | Path) -> str:
    """The last lines of a run, from its summary."""
    accuracy, sent, seconds = summary["accuracy"], summary["bytes"], summary["seconds"]
    rounds = summary["rounds"]
    lines = []
    if accuracy["final"] is not None:
        lines.append(f"accuracy  {percent(accuracy['final'])} % at the end, {percent(accuracy['best'])} % at best")
    lines += [
        f"payload   {megabytes(sent['logical']['up'])} MB up, {megabytes(sent['logical']['down'])} MB down"
        f" (over MPI {megabytes(sent['mpi']['sent'])} MB sent, {megabytes(sent['mpi']['received'])} MB received)",
        f"time      {duration(seconds['total'])} for {rounds} round{'s' if rounds != 1 else ''}"
        f" (training {duration(seconds['train'])}, communication {duration(seconds['communicate'])})",
    ]
    if summary["absent"]:
        clients = sorted(
            {str(absence["client"]) for absence in summary["absent"]}, key=lambda client: (len(client), client)
        )
        shown = ", ".join(clients[:5]) + (", ..." if len(clients) > 5 else "")
        lines.append(f"absent    {len(summary['absent'])} replies, of clients {shown}")
    if not summary["complete"]:
        lines.append("The run is not complete: start it again with --resume.")
    lines.append(f"results   {run_folder}")
    return "\n".join(lines)
