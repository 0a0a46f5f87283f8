"""Variants: named settings of an algorithm's switches, the paper's and its authors' code's.

A switch is a field of the dataclass whose default is `OF_VARIANT`; `settle`, called by `__post_init__`, gives those
that the job leaves out the meaning of the job's variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_VARIANT: Any = None
"""Default of a switch: what `variant` says."""

Variants = Mapping[str, Mapping[str, Any]]
"""By name of the variant, the value of every switch by name."""


def settle(algorithm: Any, variants: Variants) -> None:
    """Set the switches of a frozen `algorithm` that are not given, as its `variant` has them."""
    for name, value in variants[algorithm.variant].items():
        if getattr(algorithm, name) is None:
            object.__setattr__(algorithm, name, value)
