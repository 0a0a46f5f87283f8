"""Errors that mpifed raises on purpose: one sentence that says what was wrong, where, and what to do; and exit codes.

| code | meaning |
|---|---|
| 0 | the run is complete (its `summary.json` says so) |
| 1 | an unexpected error on some rank, with its traceback; or a hung rank, with its stacks |
| 2 | bad input: job file, data set, run folder or world size; nothing was computed |
| 3 | fewer usable replies than `min_replies`; the last checkpoint holds the state before that round |
| 4 | a checkpoint could not be written or read |
| 75 | checkpointed before the end, on a signal or a time limit: start again with `--resume` |
"""

from __future__ import annotations

COMPLETE = 0
UNEXPECTED = 1
BAD_INPUT = 2
TOO_FEW_REPLIES = 3
CHECKPOINT = 4
REQUEUE = 75


class MpifedError(Exception):
    """An error that is explained to the user without a traceback."""

    exit_code = UNEXPECTED


class BadInput(MpifedError):
    """The job, the data set, the run folder or the world size cannot be used; the message names the field."""

    exit_code = BAD_INPUT


class TooFewReplies(MpifedError):
    """Fewer clients answered usably than `min_replies`."""

    exit_code = TOO_FEW_REPLIES


class CheckpointError(MpifedError):
    """A checkpoint could not be written, or none can be read."""

    exit_code = CHECKPOINT
