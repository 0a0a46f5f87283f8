"""SCAFFOLD whose rounds take as long as a test wants, with the same results: there is time to interrupt a run."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from mpifed.algorithms.base import Payload, State
from mpifed.algorithms.scaffold import Scaffold

PACE = "MPIFED_TEST_PACE"
"""Environment variable: a file that holds the seconds by which each round is longer; without it, none."""


@dataclass(frozen=True)
class Paced(Scaffold):
    """SCAFFOLD; the server waits before it sends a round's model."""

    def download(self, server: State, round_: int) -> Payload:
        if PACE in os.environ:
            time.sleep(float(Path(os.environ[PACE]).read_text()))
        return super().download(server, round_)
