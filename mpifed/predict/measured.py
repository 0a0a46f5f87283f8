"""The file that `mpifed probe` writes and `mpifed predict --probe` reads: numbers in JSON, nothing that is executed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from mpifed.errors import BadInput
from mpifed.predict.bytes import Operation
from mpifed.predict.compute import Compute
from mpifed.predict.cost import Curve, Measured, Places
from mpifed.predict.units import size

VERSION = 1
LARGEST_FILE = 16 << 20


@dataclass(frozen=True)
class Probe:
    """What was measured, and of which job on which ranks."""

    job: str  # canonical
    hosts: Sequence[str]  # by rank
    cores: int  # of rank 0's node
    contention: float
    curves: Mapping[Operation, Curve]  # empty where there was one rank
    compute: Compute
    reference: float  # seconds of `mpifed.predict.probe.reference` there

    @property
    def network(self) -> Measured | None:
        """The collectives, where there were some."""
        return Measured(self.curves, Places(self.hosts)) if self.curves else None

    def to_json(self) -> str:
        value = {
            "version": VERSION,
            "job": json.loads(self.job),
            "hosts": list(self.hosts),
            "cores": self.cores,
            "contention": self.contention,
            "collectives": {name: asdict(curve) for name, curve in self.curves.items()},
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
            curves: dict[Operation, Curve] = {
                name: _curve(of) for name, of in value["collectives"].items() if name in get_args(Operation)
            }
            if curves and len(curves) != len(get_args(Operation)):
                raise ValueError("a collective is missing")
            return cls(
                json.dumps(value["job"], sort_keys=True),
                [str(host) for host in value["hosts"]],
                max(1, int(value["cores"])),
                _number(value["contention"]),
                curves,
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
        for name, curve in self.curves.items():
            rate = f"{1e-6 / curve.link.per_byte:,.1f} MB/s" if curve.link.per_byte else "any rate"
            short, long = (f"{1e3 * taken:,.3f} ms" for taken in (curve.seconds[0], curve.seconds[-1]))
            least, most = (size(bytes_) for bytes_ in (curve.sizes[0], curve.sizes[-1]))
            lines.append(f"{name:<10s} {short} for {least} to {long} for {most}; {rate}")
        for phase, (of, *_) in self.compute.client.items():
            parts = (f"{1e3 * seconds:.4g} ms" for seconds in (of.base, of.step, of.sample))
            lines.append("a client's {}: {}, a step {}, a sample {}".format(phase, *parts))
        lines.append(f"cores that are all at work take {self.contention:.2f} times as long each")
        return "\n".join(lines)


def _curve(value: Mapping[str, Any]) -> Curve:
    sizes, seconds = ([_number(number) for number in value[name]] for name in ("sizes", "seconds"))
    if not sizes or len(sizes) != len(seconds) or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError("the sizes of a collective do not ascend, one for each time")
    return Curve(sizes, seconds)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value} is no number of seconds")
    return number


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")
