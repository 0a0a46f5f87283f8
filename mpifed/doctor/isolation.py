"""Something that may crash or hang, in a process of its own.

`python -m mpifed.doctor.isolation MODULE:FUNCTION FOLDER` calls a check. The process prints the
findings as JSON behind a mark, since libraries print on standard output too.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpifed.doctor.finding import Finding, error, from_json, to_json
from mpifed.doctor.mpi import KNOWN

MARK = "mpifed doctor: "


@dataclass(frozen=True)
class Isolated:
    """A check by name and place; `hangs` is what to do where it takes more than `seconds`."""

    name: str
    function: str
    seconds: float
    hangs: str = ""

    def start(self, out: Path, before: Sequence[str] = (), given: str = "", **options: object) -> Running:
        """Start it in a session of its own, behind the command `before` (a launcher, say), with `given` to read."""
        command = [*before, sys.executable, "-m", "mpifed.doctor.isolation", self.function, str(out)]
        return Running(self, command, given, **options)  # type: ignore[arg-type]


class Running:
    """A check that is under way."""

    def __init__(
        self,
        check: Isolated,
        command: Sequence[str],
        given: str = "",
        environment: Mapping[str, str] | None = None,
        inherit: bool = False,
    ) -> None:
        self._check, self._given, self._process = check, given, None
        self._deadline = time.monotonic() + check.seconds
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
                close_fds=not inherit,
            )
        except OSError as failed:
            self._failed = f"{command[0]} cannot be started ({failed.strerror})"

    def findings(self) -> list[Finding]:
        """What it found; an error where it crashed, or took too long: then it is ended, with all that it started."""
        check = self._check
        if self._process is None:
            return [error(check.name, self._failed, check.hangs)]
        try:
            left = max(0.0, self._deadline - time.monotonic())
            printed, errors = self._process.communicate(self._given, left)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            try:
                self._process.communicate(timeout=5)
            except subprocess.TimeoutExpired:  # in the kernel, on a dead file system
                pass
            return [error(check.name, f"did not end within {check.seconds:g} s", check.hangs)]
        marked = [line for line in printed.splitlines() if line.startswith(MARK)]
        if marked:
            return from_json(marked[-1].removeprefix(MARK))
        said, do = _reason(errors or printed)
        return [error(check.name, f"failed, {_how(self._process.returncode)}: {said}", do or check.hangs)]


def _how(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _reason(text: str) -> tuple[str, str]:
    """The line that says most, and what to do where it is a known one."""
    lines = [line.strip()[:300] for line in text.splitlines() if any(map(str.isalpha, line))]
    for known, do in KNOWN:
        for line in lines:
            if known in line:
                return line, do
    return (lines[-1] if lines else "it said nothing"), ""


def main(function: str, out: str) -> None:
    module, _, name = function.partition(":")
    found = list(getattr(importlib.import_module(module), name)(Path(out)))
    print(f"\n{MARK}{to_json(found)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
