"""Tests of mpifed. A package, so that a rank can import `tests.<module>:<function>` (see `tests.launch.run_ranks`)."""
