"""`mpifed doctor`: what a machine is like for a run, each thing tried rather than guessed, one line each.

`command` starts every check in a process of its own, with a time limit: a library that crashes or a file system that
hangs costs its own line. `files`, `machine`, `mpi` and `slurm` hold the checks, `world` those that take all ranks.
"""
