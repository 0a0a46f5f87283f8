"""Text for people, on standard output and error: a luxury that never ends a run."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO


def say(text: str, stream: TextIO) -> None:
    """Write and flush; a reader that has gone away (`| head`) is no reason to fail, here or at the next word."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:  # the stream is closed
        pass
