"""Quantities as people write them: `10Gbit`, `0.5ms`, `64GB`; and as they read them."""

from __future__ import annotations

import re

from mpifed.errors import BadInput

PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?"


def bandwidth(text: str, key: str = "--bandwidth") -> float:
    """Bytes per second of `100Mbit`, `10Gbit/s`, `25Gbps` (10^6 and 10^9 bits) or `1.2GB/s`. Raises BadInput."""
    found = re.fullmatch(_NUMBER + r"\s*([kKMGT]?)(bit(?:/s)?|bps|B(?:/s)?)", text.strip())
    value = _value(found) if found else 0.0
    if found is None or value <= 0:
        raise BadInput(f"{key}: '{text}' is no bandwidth; write 100Mbit, 10Gbit or 1.2GB/s")
    return value * PREFIXES[found[3]] / (1 if found[4].startswith("B") else 8)


def seconds(text: str, key: str = "--latency") -> float:
    """Seconds of `0.5ms`, `20us`, `1s`. Raises BadInput."""
    found = re.fullmatch(_NUMBER + r"\s*(s|ms|us|µs|ns)", text.strip())
    if found is None:
        raise BadInput(f"{key}: '{text}' is no time; write 0.5ms, 20us or 1s")
    return _value(found) * SECONDS[found[3]]


def _value(found: re.Match[str]) -> float:
    return float(found[1]) * 10.0 ** int(found[2] or 0)


def size(count: float) -> str:
    """Bytes with three digits that count: `812 B`, `1.23 MB`, `45.6 GB`, in powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"
