"""The file that `mpifed probe` writes and `mpifed predict --probe` reads: numbers in JSON, nothing that is executed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from mpifed.errors import BadInput
from mpifed.predict.bytes import Operation
from mpifed.predict.compute import Compute
from mpifed.predict.cost import Fitted, Link, Places

VERSION = 1
LARGEST_FILE = 16 << 20


@dataclass(frozen=True)
class Probe:
    """What was measured, and of which job on which ranks."""

    job: str  # canonical
    hosts: Sequence[str]  # by rank
    cores: int  # of rank 0's node
    contention: float
    lines: Mapping[Operation, Link]  # empty where there was one rank
    compute: Compute
    reference: float  # seconds of `mpifed.predict.probe.reference` there

    @property
    def network(self) -> Fitted | None:
        """The collectives, where there were some."""
        return Fitted(self.lines, Places(self.hosts)) if self.lines else None

    def to_json(self) -> str:
        value = {
            "version": VERSION,
            "job": json.loads(self.job),
            "hosts": list(self.hosts),
            "cores": self.cores,
            "contention": self.contention,
            "collectives": {name: asdict(line) for name, line in self.lines.items()},
            "compute": self.compute.to_json(),
            "reference": self.reference,
        }
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Probe:
        """Read such a file. Raises BadInput where it is none."""
        path = Path(path)
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ValueError("it is too large for one")
            value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
            if value["version"] != VERSION:
                raise ValueError(f"its version is {value['version']}, not {VERSION}")
            lines: dict[Operation, Link] = {
                name: Link(_number(of["latency"]), _number(of["per_byte"]))
                for name, of in value["collectives"].items()
                if name in get_args(Operation)
            }
            if lines and len(lines) != len(get_args(Operation)):
                raise ValueError("a collective is missing")
            return cls(
                json.dumps(value["job"], sort_keys=True),
                [str(host) for host in value["hosts"]],
                max(1, int(value["cores"])),
                _number(value["contention"]),
                lines,
                Compute.from_json(value["compute"]),
                _number(value["reference"]),
            )
        except OSError as error:
            raise BadInput(f"--probe: {path} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"--probe: {path} is no file of mpifed probe ({error}); measure anew") from None

    def text(self) -> str:
        """What was measured, in a few lines."""
        nodes = len(set(self.hosts))
        lines = [f"{len(self.hosts)} ranks on {nodes} node{'s' * (nodes > 1)}, {self.cores} cores on rank 0's"]
        for name, line in self.lines.items():
            rate = f"{1e-6 / line.per_byte:,.1f} MB/s" if line.per_byte else "any rate"
            lines.append(f"{name:<10s} {1e3 * line.latency:8.3f} ms + bytes at {rate}")
        for phase, of in self.compute.client.items():
            lines.append(f"a client's {phase}: {of[0].base:.4f} s + {1e3 * of[0].slope:.4f} ms a sample and pass")
        lines.append(f"cores that are all at work take {self.contention:.2f} times as long each")
        return "\n".join(lines)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value} is no number of seconds")
    return number


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")
