"""What a check says: one line, of what was found, how bad it is, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Level = Literal["ok", "warning", "error"]

COLOURS: Mapping[Level, str] = {"ok": "\033[32m", "warning": "\033[33m", "error": "\033[31m"}
_PLAIN = "\033[0m"


@dataclass(frozen=True)
class Finding:
    """`name` is what was looked at, `do` what helps where something is wrong, `host` where it is so of some nodes."""

    level: Level
    name: str
    what: str
    do: str = ""
    host: str = ""

    def line(self, colour: bool = False) -> str:
        """`warning  /dev/shm   64 MB are free; start the container with --shm-size=1g`."""
        level = f"{self.level:8}"
        if colour:
            level = f"{COLOURS[self.level]}{level}{_PLAIN}"
        where = f"{self.host}: " if self.host else ""
        return f"{level} {self.name:9} {where}{self.what}" + (f"; {self.do}" if self.do else "")


Check: TypeAlias = Callable[[Path], Iterable[Finding]]
"""Of the folder that runs are to be written to."""


def ok(name: str, what: str) -> Finding:
    return Finding("ok", name, what)


def warning(name: str, what: str, do: str = "") -> Finding:
    return Finding("warning", name, what, do)


def error(name: str, what: str, do: str = "") -> Finding:
    return Finding("error", name, what, do)


def to_json(findings: Sequence[Finding]) -> str:
    return json.dumps([asdict(finding) for finding in findings])


def from_json(text: str) -> list[Finding]:
    return [Finding(**fields) for fields in json.loads(text)]
