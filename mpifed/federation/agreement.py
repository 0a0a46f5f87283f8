"""What every rank does, or none: an error that is the user's is everybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpifed.comm.communicator import Communicator
from mpifed.errors import BadInput


def on_every_rank(comm: Communicator, act: Callable[[], Any]) -> Any:
    """`act()` on every rank; where it raises BadInput on some, every rank raises the first rank's."""
    result, problem = None, None
    try:
        result = act()
    except BadInput as error:
        problem = str(error)
    agreed = comm.agree(problem)
    if agreed is not None:
        raise BadInput(agreed)
    return result
