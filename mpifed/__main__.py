"""`python -m mpifed COMMAND ...`: a thin dispatcher; every command explains itself with `--help`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import mpifed
from mpifed.errors import BAD_INPUT, MpifedError

COMMANDS = {
    "run": ("mpifed.run", "train: python -m mpifed run [JOB.toml] [key=value ...]"),
    "predict": ("mpifed.predict.command", "bytes, time and memory of a run before it runs"),
    "probe": ("mpifed.predict.probe", "measure collectives and work here, for predict; also under mpirun"),
    "supervise": ("mpifed.supervise", "start a run again after a death or crash, until it is complete"),
    "sweep": ("mpifed.sweep.command", "list, run or resume the jobs of a sweep file"),
    "report": ("mpifed.report.command", "compare runs, or the means of a sweep: tables and figures"),
    "doctor": ("mpifed.doctor.command", "look at this machine: MPI, launcher, files, memory, GPUs, Slurm"),
    "export": ("mpifed.export", "write the final model of a run as safetensors"),
}
"""Module (with a `main(argv) -> exit code`) and one line of help for each command; imported only when used."""


def usage() -> str:
    """The text of `--help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: mpifed COMMAND ...", "", "Federated learning by knowledge distillation over MPI.", "", "commands:"]
        + lines
        + ["", "mpifed COMMAND --help explains a command; mpifed --version prints the version."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`mpifed.errors`); errors meant for the user are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(f"mpifed {mpifed.__version__}")
        return 0
    if command not in COMMANDS:
        print(_unknown(command) if command else usage(), file=sys.stderr)
        return BAD_INPUT
    try:
        return importlib.import_module(COMMANDS[command][0]).main(arguments[1:])
    except MpifedError as error:
        print(f"mpifed: {error}", file=sys.stderr)
        return error.exit_code


def _unknown(command: str) -> str:
    nearest = difflib.get_close_matches(command, COMMANDS, n=1)
    suggestion = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"mpifed: there is no command '{command}'{suggestion} (commands: {', '.join(COMMANDS)})"


if __name__ == "__main__":
    sys.exit(main())
